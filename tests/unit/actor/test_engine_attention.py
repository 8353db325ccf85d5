"""Transformer Engine's attention is refused where only whole matrices of scores are left.

The engine here is a stand-in that answers as Transformer Engine 2.20 did on a GPU; tests/gpu runs
the real one.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_rlsd.actor import engine_attention
from megatron_rlsd.actor.engine_attention import SWITCH, require_fused_attention
from megatron_rlsd.runtime.errors import UserError

from megatron.core.transformer.transformer_config import (  # isort: skip
    MLATransformerConfig,
    TransformerConfig,
)

CPU = torch.device("cpu")
COMMON: dict[str, Any] = {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 4}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Calls of the stand-in, whose fused attention is missing where a test says so."""
    calls: list[dict[str, Any]] = []

    class DotProductAttention(torch.nn.Module):
        fused = True

        def __init__(self, heads: int, sizes: Any, **settings: Any) -> None:
            super().__init__()
            self.sizes = sizes
            calls.append({"heads": heads, "sizes": sizes, **settings})

        def forward(self, query: Any, key: Any, value: Any, **settings: Any) -> torch.Tensor:
            assert os.environ[SWITCH] == "0"
            if not self.fused:
                raise ValueError("No dot product attention backend is available for the inputs.")
            return query.sum() + key.sum() + value.sum()

    module = ModuleType("transformer_engine.pytorch")
    module.DotProductAttention = DotProductAttention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)
    monkeypatch.delenv(SWITCH, raising=False)
    return calls


def bfloat16(**settings: Any) -> TransformerConfig:
    return TransformerConfig(**COMMON, params_dtype=torch.bfloat16, **settings)


def test_fused_attention_is_tried_in_the_models_shape_and_leaves_no_variable(engine) -> None:
    require_fused_attention(bfloat16(num_query_groups=2, tensor_model_parallel_size=2), CPU)
    (call,) = engine
    assert (call["heads"], call["sizes"], call["num_gqa_groups"]) == (2, (16, 16), 1)
    assert (call["qkv_format"], call["attn_mask_type"]) == ("thd", "padding_causal")
    # Megatron refuses to build a model where it is set to 0.
    assert SWITCH not in os.environ


def test_latent_attention_has_other_sizes(engine) -> None:
    config = MLATransformerConfig(
        **COMMON,
        params_dtype=torch.bfloat16,
        multi_latent_attention=True,
        qk_head_dim=128,
        qk_pos_emb_head_dim=64,
        v_head_dim=96,
    )
    require_fused_attention(config, CPU)
    assert engine[0]["sizes"] == (192, 96)
    assert engine[0]["num_gqa_groups"] == 4


def test_whole_matrices_of_scores_are_refused_with_the_libraries(engine, tmp_path, monkeypatch):
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r--p 0 00:00 1 /usr/lib/libcudnn.so.9.14.0\n"
        "7f01-7f02 r--p 0 00:00 2 /site/nvidia/cudnn/lib/libcudnn.so.9\n"
        "7f02-7f03 r--p 0 00:00 3 /site/torch/lib/libtorch.so\n"
    )
    monkeypatch.setattr(engine_attention, "MAPPED_FILES", maps)
    sys.modules["transformer_engine.pytorch"].DotProductAttention.fused = False
    with pytest.raises(
        UserError,
        match=r"no fused attention .*4 heads: No dot product.*in this process: "
        r"/site/nvidia/cudnn/lib/libcudnn.so.9, /usr/lib/libcudnn.so.9.14.0\. Let CUDNN_PATH",
    ):
        require_fused_attention(bfloat16(), CPU)
    assert SWITCH not in os.environ


def test_users_and_float32_may_have_them(engine, monkeypatch) -> None:
    sys.modules["transformer_engine.pytorch"].DotProductAttention.fused = False
    require_fused_attention(TransformerConfig(**COMMON, params_dtype=torch.float32), CPU)
    monkeypatch.setenv(SWITCH, "1")
    require_fused_attention(bfloat16(), CPU)
    assert os.environ[SWITCH] == "1"
    assert not engine
