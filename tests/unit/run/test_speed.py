"""Speed per GPU: counted as the planner counts, missing where it cannot be known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_rlsd.config import parse_config
from megatron_rlsd.hf_bridge import family_for
from megatron_rlsd.planning.rates import peak_tflops
from megatron_rlsd.run.speed import Speed, gpus_of
from tests.conftest import raw_config

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
HF_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 16,
    "vocab_size": 50,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}
STEP = {
    "perf/tokens_per_second": 600.0,
    "time/update_s": 2.0,
    "train/tokens": 1250,
    "train/padding_share": 0.2,
    "rollout/prompt_tokens_mean": 30.0,
    "rollout/response_tokens_mean": 10.0,
}


@pytest.fixture
def speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def make(
        device: torch.device = GPU, name: str = "NVIDIA H100 80GB HBM3", **model: str
    ) -> Speed:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        raw = raw_config(tmp_path, tmp_path)
        raw["model"] |= {"dtype": "bfloat16", **model}
        dims = family_for(HF_CONFIG).dims(HF_CONFIG)
        return Speed(parse_config(raw), dims, world_size=3, device=device)

    return make


def test_mfu_counts_each_product_of_the_step(speed) -> None:
    hidden, heads, groups, head, ffn, layers, vocabulary = 8, 4, 2, 6, 16, 3, 50
    weights = 2 * hidden * heads * head + 2 * hidden * groups * head + 3 * hidden * ffn
    # A causal mask leaves half of a sequence of 40: scores and values, two operations each.
    attention = 2 * 2 * heads * head * 40 / 2
    # Two operations for each parameter, those of norms too.
    weights += 2 * hidden + 2 * head
    tokens = 1000
    forward = tokens * (layers * (2 * weights + attention) + 2 * hidden)
    forward += tokens / 4 * 2 * vocabulary * hidden
    counted = speed().operations(STEP)
    assert counted == pytest.approx(3 * forward)
    found = speed()(STEP)
    assert found["perf/mfu"] == pytest.approx(counted / (2.0 * 3 * 989e12))
    assert found["perf/tokens_per_second_per_gpu"] == 200.0


def test_what_is_not_known_is_missing(speed) -> None:
    assert speed(CPU)(STEP) == {}
    only_tokens = {"perf/tokens_per_second_per_gpu": 200.0}
    assert speed(name="NVIDIA Something New")(STEP) == only_tokens
    assert speed(dtype="float32")(STEP) == only_tokens
    without_update = {k: v for k, v in STEP.items() if not k.startswith(("train/", "time/"))}
    assert speed()(without_update) == only_tokens
    assert speed()(STEP | {"train/tokens": 0}) == only_tokens
    warm_start = {"train/tokens": 1250, "train/padding_share": 0.2, "train/target_tokens": 250.0}
    assert speed().operations(warm_start) is None
    assert speed().operations(warm_start | {"data/examples_too_long": 0.0}) > 0


def test_servers_have_gpus_too(tmp_path: Path) -> None:
    raw = raw_config(tmp_path, tmp_path)
    assert gpus_of(parse_config(raw), 4) == 4
    raw["distributed"] = {"timeout_seconds": 1800}
    raw["rollout"] |= {"engine": "sglang", "sglang": {"num_servers": 3, "tensor_parallel": 2}}
    assert gpus_of(parse_config(raw), 4) == 10


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", None),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 2060", None),
    ],
)
def test_peaks_go_by_whole_words_of_the_name(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak
