"""Overlapped tensor parallelism on two GPUs: the same step as without, to bfloat16's rounding."""

from __future__ import annotations

import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

if missing := [name for name in ("megatron", "transformer_engine") if find_spec(name) is None]:
    pytest.skip(f"not installed: {', '.join(missing)}", allow_module_level=True)

from megatron_rlsd.actor.packing import Sequence
from megatron_rlsd.actor.precision import CAPABILITY
from megatron_rlsd.actor.update_inputs import TokenValues
from megatron_rlsd.actor.userbuffers import ENGINE_VERSION
from megatron_rlsd.config import parse_config
from megatron_rlsd.ops import PolicyLossConfig
from tests.actors import actor_of
from tests.distributed.ranks import run_on_ranks

SIZES = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
TOKENS = 1024
RESPONSE = 32


@pytest.mark.parametrize(
    "precision",
    [{"fp8": "none"}, {"fp8": "current", "last_layers_bf16": 1}],
    ids=["bfloat16", "current"],
)
def test_a_step_with_overlap_is_the_step_without(tmp_path: Path, precision: Any) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, found {torch.cuda.device_count()}")
    release = tuple(map(int, version("transformer-engine").split(".")[:2]))
    if release < ENGINE_VERSION:
        pytest.skip(f"needs transformer-engine >= {ENGINE_VERSION}, found {release}")
    fp8 = precision["fp8"]
    if fp8 != "none" and torch.cuda.get_device_capability() < CAPABILITY[fp8]:
        pytest.skip(f"{fp8} needs compute capability {CAPABILITY[fp8]}")
    model = tmp_path / "model"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(model)
    # Fresh processes for each: userbuffers are made once in a process.
    for name in ("plain", "overlap"):
        run_on_ranks(step, 2, str(model), precision, name, str(tmp_path), seconds=300)
    plain, found = (load_file(tmp_path / f"{n}.safetensors") for n in ("plain", "overlap"))
    noise = (found.pop("log_probs") - plain.pop("log_probs")).abs()
    print(f"{fp8}, overlap against none: log-probs {noise.mean():.1e}, {noise.max():.1e} max")
    assert noise.mean() < (0.02 if fp8 == "none" else 0.1)
    norms = [float(tensors.pop("grad_norm")) for tensors in (plain, found)]
    assert norms[1] == pytest.approx(norms[0], rel=0.02 if fp8 == "none" else 0.1)
    for name, weight in plain.items():
        assert (found[name] - weight).norm() <= 1e-2 * weight.norm(), name


def step(model: str, precision: dict[str, Any], name: str, out: str) -> None:
    """On both ranks: scores of packs of different lengths, an update, and the weights after it."""
    import transformer_engine_torch as tex

    if not tex.device_supports_multicast():
        os.environ["UB_SKIPMC"] = "1"
    config = parse_config(
        {
            "run_dir": out,
            "model": {
                "hf_path": model,
                "dtype": "bfloat16",
                "precision": {"layers": "transformer_engine", **precision},
                "tp_comm_overlap": name == "overlap",
            },
            "parallel": {"tensor": 2, "sequence": True},
            "prompts": {"max_prompt_tokens": 256, "max_hint_tokens": 256},
            "rollout": {"max_response_tokens": 256},
            "train": {"max_tokens_per_microbatch": TOKENS},
            "data": {"train": [{"kind": "jsonl", "path": "unused"}]},
            "reward": {"functions": [{"name": "exact_match"}]},
            "optimizer": {"lr": 1e-4},
        }
    )
    generator = torch.Generator().manual_seed(1)
    drawn = [
        torch.randint(0, SIZES["vocab_size"], (n,), generator=generator).tolist()
        for n in (640, 300, 500, 700, 90)
    ]
    sequences = [Sequence.of(ids[:-RESPONSE], ids[-RESPONSE:]) for ids in drawn]
    rows = RESPONSE * len(sequences)
    with actor_of(config, 10, seconds=200) as actor:
        device = actor.groups.device
        log_probs = actor.token_log_probs([sequences], 1.0)
        assert log_probs is not None
        token_values = TokenValues(
            advantages=torch.linspace(-1, 1, rows, device=device),
            loss_weights=torch.full((rows,), 1 / rows, device=device),
        )
        result = actor.update([sequences], token_values, PolicyLossConfig(rlsd_lambda=0.0), 1.0)
        found = {key: tensor.float().cpu().clone() for key, tensor in actor.hf_tensors()}
        if actor.groups.rank == 0:
            found["log_probs"] = log_probs.float().cpu()
            found["grad_norm"] = torch.tensor(result.grad_norm)
            save_file(found, Path(out) / f"{name}.safetensors")
