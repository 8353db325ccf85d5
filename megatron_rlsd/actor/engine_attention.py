"""Refuses Transformer Engine's attention where it would form whole matrices of scores.

Transformer Engine chooses between flash-attn's kernels, cuDNN's, and plain products with a softmax
of heads x tokens x tokens numbers. It takes the last one without a word where neither of the others
is usable; on an H100 with two cuDNN libraries in one process that made a scoring pass 3.3 times as
slow, and an update run out of memory.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rlsd.runtime.errors import UserError

SWITCH = "NVTE_UNFUSED_ATTN"
"""Transformer Engine's variable: 1 admits matrices of scores. Set by the user it is left alone."""
MAPPED_FILES = Path("/proc/self/maps")
TOKENS = 64


def require_fused_attention(config: TransformerConfig, device: torch.device) -> None:
    """Run a pack of two sequences through attention of this model's shape, forward and backward.

    Must come before the model is built: Megatron then sets ``NVTE_UNFUSED_ATTN`` itself. Does
    nothing in float32, which has no other attention there, or where the variable is set already.
    Raises UserError that names the cuDNN libraries of this process.
    """
    if config.params_dtype == torch.float32 or SWITCH in os.environ:
        return
    os.environ[SWITCH] = "0"
    try:
        _attend(config, device)
    except (ValueError, RuntimeError) as error:
        heads, reason = config.num_attention_heads, str(error).splitlines()[0]
        raise UserError(
            f"Transformer Engine has no fused attention for packs of this model's {heads} heads: "
            f"{reason} cuDNN in this process: {loaded('libcudnn.so')}. Let CUDNN_PATH name the "
            "folder of torch's own cuDNN, or install flash-attn; with "
            f"{SWITCH}=1 it would form matrices of heads x tokens x tokens"
        ) from error
    finally:
        del os.environ[SWITCH]


def _attend(config: TransformerConfig, device: torch.device) -> None:
    from transformer_engine.pytorch import DotProductAttention

    tp = config.tensor_model_parallel_size
    heads = config.num_attention_heads // tp
    groups = max(1, (config.num_query_groups or config.num_attention_heads) // tp)
    key_size = value_size = config.kv_channels
    if config.multi_latent_attention:
        key_size = config.qk_head_dim + config.qk_pos_emb_head_dim
        value_size, groups = config.v_head_dim, heads
    attention = DotProductAttention(
        heads,
        (key_size, value_size),
        num_gqa_groups=groups,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal",
    )
    sizes = (heads, key_size), (groups, key_size), (groups, value_size)
    query, key, value = (
        torch.zeros(TOKENS, *size, dtype=config.params_dtype, device=device, requires_grad=True)
        for size in sizes
    )
    bounds = torch.tensor([0, TOKENS // 4, TOKENS], dtype=torch.int32, device=device)
    lengths = {"max_seqlen_q": TOKENS - TOKENS // 4, "max_seqlen_kv": TOKENS - TOKENS // 4}
    out = attention(query, key, value, cu_seqlens_q=bounds, cu_seqlens_kv=bounds, **lengths)
    out.sum().backward()


def loaded(library: str) -> str:
    """Paths of the loaded files whose name holds ``library``, or "none"."""
    lines = MAPPED_FILES.read_text().splitlines() if MAPPED_FILES.exists() else []
    paths = {line.split()[-1] for line in lines if library in line}
    return ", ".join(sorted(paths)) or "none"
