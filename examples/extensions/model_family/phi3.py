"""Phi3ForCausalLM as a plug-in: Phi-4, and Phi-3 without its attention window.

Llama's layers, but stored differently: queries, keys and values in one tensor, gate and up in
another. Name this file under ``plugins``, or give it to tools/convert_hf_checkpoint.py --plugin.
"""

from __future__ import annotations

from megatron_rlsd.hf_bridge import Family, register_family
from megatron_rlsd.hf_bridge.config_table import SUPPORTED_VALUES, ConfigTable
from megatron_rlsd.hf_bridge.families import decoder
from megatron_rlsd.hf_bridge.family import ParameterRow, ParameterTable
from megatron_rlsd.hf_bridge.mappings import FusedGateUp, FusedQKV, RowParallel, Stacked

PHI3 = register_family(
    Family(
        name="phi3",
        architectures=("Phi3ForCausalLM",),
        # Every key that a config.json may hold, in one of the tables; any other is an error.
        config=ConfigTable(
            required=decoder.REQUIRED,
            derived={
                "num_key_value_heads": ("num_query_groups", lambda c: c["num_attention_heads"]),
                "head_dim": ("kv_channels", decoder.head_dim),
            },
            # What the architecture itself says to Megatron's TransformerConfig.
            fixed={"qk_layernorm": False, "add_qkv_bias": False},
            # Keys with the only values that Megatron's model would honour.
            supported={**SUPPORTED_VALUES, "resid_pdrop": (0.0,), "embd_pdrop": (0.0,)},
            checks={
                "sliding_window": decoder.window_that_never_cuts,
                # It only matters with rope scaling, which is refused.
                "original_max_position_embeddings": decoder.anything,
            },
        ),
        # Every parameter: its name in Megatron, its name in the checkpoint, and how one becomes
        # the other. Without the prefixes decoder.layers.N. and model.layers.N.
        parameters=ParameterTable(
            first=decoder.FIRST,
            layer=(
                *decoder.NORMS,
                ParameterRow(
                    "self_attention.linear_qkv.weight",
                    "self_attn.qkv_proj.weight",
                    Stacked(FusedQKV("hidden_size")),
                ),
                decoder.ATTENTION_OUTPUT,
            ),
            dense_layer=(
                ParameterRow(
                    "mlp.linear_fc1.weight",
                    "mlp.gate_up_proj.weight",
                    Stacked(FusedGateUp("ffn_hidden_size", "hidden_size")),
                ),
                ParameterRow(
                    "mlp.linear_fc2.weight",
                    "mlp.down_proj.weight",
                    RowParallel("hidden_size", "ffn_hidden_size"),
                ),
            ),
            last=decoder.LAST,
        ),
    )
)
