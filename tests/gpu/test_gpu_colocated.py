"""What colocated trainers and servers leave each other of a GPU's memory."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

if find_spec("megatron") is None:
    pytest.skip("not installed: megatron-core", allow_module_level=True)

from megatron_rlsd.actor.packing import Sequence
from megatron_rlsd.actor.update_inputs import TokenValues
from megatron_rlsd.config import SGLangConfig, parse_config
from megatron_rlsd.ops import PolicyLossConfig
from megatron_rlsd.rollout.sglang import SGLangEngine, giving_memory_back
from megatron_rlsd.rollout.sglang.process import PROJECT_PYTHON
from megatron_rlsd.types import GenerationRequest, SamplingParams
from megatron_rlsd.weight_sync import IpcTransport, SyncSettings
from tests.actors import actor_of
from tests.models import save_random_model

pytestmark = pytest.mark.whole_gpu
SIZES: dict[str, Any] = {
    "vocab_size": 8000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
SEQUENCES = [Sequence.of([3, 4, 5], [6, 7, 8, 9]), Sequence.of([10], [11, 12])]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.Qwen3Config(**SIZES)
    return save_random_model(config, tmp_path_factory.mktemp("qwen3"), dtype=torch.bfloat16)


def test_room_is_made_and_updates_stay_the_same_bit_for_bit(model: Path) -> None:
    stayed, _ = train(model, moves=False)
    moved, freed = train(model, moves=True)
    parameters = sum(tensor.numel() for name, tensor in stayed.items() if name.startswith("0 "))
    # Float32 gradients, masters and two moments.
    assert freed > 0.95 * 16 * parameters
    for name, tensor in stayed.items():
        assert torch.equal(tensor, moved[name]), name


def train(model: Path, *, moves: bool) -> tuple[dict[str, torch.Tensor], int]:
    """Weights after each update, and the most bytes that were freed between two of them."""
    config = parse_config(
        {
            "run_dir": "unused",
            "model": {"hf_path": str(model), "dtype": "bfloat16"},
            "data": {"train": [{"kind": "jsonl", "path": "unused"}]},
            "reward": {"functions": [{"name": "exact_match"}]},
            "optimizer": {"lr": 0.01, "distributed": True},
        }
    )
    weights: dict[str, torch.Tensor] = {}
    freed = 0
    with actor_of(config, 3, seconds=60, seed=1) as actor:
        device = actor.groups.device
        values = TokenValues(
            advantages=torch.linspace(-1, 1, 6, device=device),
            loss_weights=torch.full((6,), 1.0, device=device),
        )
        for number in range(3):
            if moves:
                before = torch.cuda.memory_allocated()
                actor.make_room()
                freed = max(freed, before - torch.cuda.memory_allocated())
                actor.take_room()
            actor.update([SEQUENCES], values, PolicyLossConfig(rlsd_lambda=0.0), 1.0)
            weights |= {f"{number} {n}": t.cpu() for n, t in actor.hf_tensors()}
    return weights, freed


@pytest.mark.skipif(
    not (PROJECT_PYTHON.parents[1] / ".ready").is_file(),
    reason="no SGLang environment for GPUs (make sglang)",
)
def test_a_server_gives_its_memory_back_and_takes_new_weights(model: Path, tmp_path: Path) -> None:
    settings = SGLangConfig(
        device="cuda", start_timeout_seconds=600, args={"mem_fraction_static": 0.5}
    )
    engine = SGLangEngine(
        giving_memory_back(settings),
        hf_path=model,
        dtype="bfloat16",
        vocab_size=SIZES["vocab_size"],
        max_positions=SIZES["max_position_embeddings"],
        run_dir=tmp_path,
    )
    sync = SyncSettings(
        source=model,
        dtype=None,
        device=torch.device("cuda"),
        update_seconds=60,
        bucket_bytes=2**28,
        verify_interval=1,
    )
    transport = IpcTransport(engine, sync)
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    tensors = {name: parameter.cuda() for name, parameter in reference.named_parameters()}
    try:
        engine.wait_until_ready()
        before = torch.cuda.mem_get_info()[0]
        engine.sleep()
        total = torch.cuda.get_device_properties(0).total_memory
        assert torch.cuda.mem_get_info()[0] - before > 0.3 * total
        engine.wake("weights")
        transport.publish(iter(tensors.items()), 1)
        engine.wake("kv_cache")
        assert transport.metrics["weight_sync/unverified_tensors"] == 0
        (answer,) = engine.generate([GenerationRequest([3, 4, 5], SamplingParams(8), seed=0)])
        assert answer.weight_version == 1
    finally:
        transport.close()
        engine.close()
