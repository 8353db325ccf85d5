"""Every layout computes what one process computes, and one process what transformers computes."""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers

from megatron_rlsd.actor.actor import Actor, TokenValues
from megatron_rlsd.actor.model import model_shape
from megatron_rlsd.actor.packing import Sequence, balanced_partition
from megatron_rlsd.config import parse_config
from megatron_rlsd.hf_bridge import family_for, load_hf_config
from megatron_rlsd.ops import PolicyLossConfig
from megatron_rlsd.parallel.groups import parallel_world
from megatron_rlsd.teacher import Teacher
from tests.distributed.ranks import next_world, run_on_ranks

VOCAB = 131
STEPS = 4


@dataclass(frozen=True)
class Layout:
    """One arrangement; data parallel takes the processes that are left."""

    world: int
    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False
    distributed_optimizer: bool = False
    recompute: str = "none"

    @property
    def name(self) -> str:
        dp = self.world // self.tensor // self.pipeline
        parts = [f"tp{self.tensor}", f"pp{self.pipeline}", f"dp{dp}"]
        parts += ["sp"] * self.sequence + ["zero"] * self.distributed_optimizer
        return "_".join(parts + [f"recompute-{self.recompute}"] * (self.recompute != "none"))


ONE = [Layout(1), Layout(1, recompute="full"), Layout(1, recompute="selective")]
TWO = [
    Layout(2, tensor=2),
    Layout(2, tensor=2, sequence=True),
    Layout(2, pipeline=2),
    Layout(2),
    Layout(2, distributed_optimizer=True),
    Layout(2, tensor=2, sequence=True, recompute="full"),
]
FOUR = [
    Layout(4, tensor=2, pipeline=2),
    Layout(4, tensor=2, pipeline=2, sequence=True),
    Layout(4, tensor=2, sequence=True, distributed_optimizer=True),
    Layout(4, pipeline=2, distributed_optimizer=True),
    Layout(4, pipeline=4),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Qwen3 with tied and a Llama with untied embeddings; the vocabulary is odd."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "pad_token_id": None,
    }
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tied = transformers.Qwen3Config(**sizes, tie_word_embeddings=True)
    untied = transformers.LlamaConfig(**sizes, tie_word_embeddings=False)
    transformers.Qwen3ForCausalLM(tied).save_pretrained(folder / "qwen3")
    transformers.LlamaForCausalLM(untied).save_pretrained(folder / "llama")
    return {name: folder / name for name in ("qwen3", "llama")}


@pytest.fixture(scope="module")
def one_process(models, tmp_path_factory):
    return measure(ONE[:1], models, tmp_path_factory.mktemp("one"))


def test_one_process_equals_transformers(models, one_process):
    for name, path in models.items():
        expected = transformers_run(path)
        measured = one_process[name, ONE[0].name]
        assert measured["log_probs"] == pytest.approx(expected["log_probs"], abs=1e-4)
        assert measured["loss"] == pytest.approx(expected["loss"], rel=1e-4, abs=1e-6)
        assert measured["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("layouts", [ONE[1:], TWO, FOUR], ids=["recompute", "two", "four"])
def test_layouts_equal_one_process(layouts, models, one_process, tmp_path):
    for (model, layout), measured in measure(layouts, models, tmp_path).items():
        expected = one_process[model, ONE[0].name]
        context = f"{model} {layout}"
        assert measured["log_probs"] == pytest.approx(expected["log_probs"], abs=1e-5), context
        for key in ("loss", "grad_norm", "entropy", "gain_abs"):
            assert measured[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-6), (
                f"{context}: {key}"
            )
        assert measured["weights"] == pytest.approx(expected["weights"], rel=1e-6), context


def measure(layouts, models, out):
    run_on_ranks(
        train_layouts,
        layouts[0].world,
        layouts,
        {name: str(path) for name, path in models.items()},
        str(out),
        seconds=600,
        worlds=len(layouts) * len(models) + 1,
    )
    return {
        (model, layout.name): json.loads((out / f"{model}.{layout.name}.json").read_text())
        for layout in layouts
        for model in models
    }


def train_layouts(layouts: list[Layout], models: dict[str, str], out: str) -> None:
    """On every rank: train each model in each layout, one after the other."""
    for layout in layouts:
        for model, path in models.items():
            result = train_one(layout, path)
            next_world()
            if os.environ["RANK"] == "0":
                Path(out, f"{model}.{layout.name}.json").write_text(json.dumps(result))


def train_one(layout: Layout, path: str) -> dict[str, list[float]]:
    config = parse_config(
        {
            "run_dir": "unused",
            "model": {"hf_path": path, "dtype": "float32", "recompute": layout.recompute},
            "parallel": {
                "tensor": layout.tensor,
                "pipeline": layout.pipeline,
                "sequence": layout.sequence,
            },
            "data": {"train": [{"kind": "jsonl", "path": "unused"}]},
            "reward": {"functions": [{"name": "exact_match"}]},
            "optimizer": {"lr": 1e-3, "distributed": layout.distributed_optimizer},
            "train": {"max_tokens_per_microbatch": 60},
        }
    )
    hf_config = load_hf_config(Path(path))
    family = family_for(hf_config)
    shape = model_shape(family, hf_config)
    with parallel_world(config.parallel, shape, timeout_seconds=60, seed=0) as groups:
        actor = Actor(config, family, hf_config, groups, STEPS)
        teacher = Teacher(config.teacher, actor.parameters())
        sequences, teacher_sequences, advantages = batch()
        parts = balanced_partition([s.num_inputs for s in sequences], groups.dp.size())
        mine = parts[groups.dp.rank()]
        total = sum(len(s.response_ids) for s in sequences)
        result: dict[str, list[float]] = {
            "loss": [],
            "grad_norm": [],
            "entropy": [],
            "gain_abs": [],
        }
        whole = [[*sequences], *([] for _ in range(groups.dp.size() - 1))]
        first = actor.token_log_probs(whole, temperature=0.7)
        for _ in range(STEPS):
            with teacher.applied():
                teacher_log_probs = actor.token_log_probs(
                    [[teacher_sequences[i] for i in part] for part in parts], temperature=0.7
                )
            updated = actor.update(
                [[sequences[i] for i in part] for part in parts],
                TokenValues(
                    advantages=per_token(advantages, sequences, mine),
                    loss_weights=torch.full(
                        (sum(len(sequences[i].response_ids) for i in mine),), 1 / total
                    ),
                    teacher_log_probs=teacher_log_probs,
                ),
                PolicyLossConfig(rlsd_lambda=0.5, entropy_coef=0.01),
                temperature=0.7,
            )
            result["loss"].append(updated.sums["weighted_loss"])
            result["grad_norm"].append(updated.grad_norm)
            result["entropy"].append(updated.sums["entropy"])
            result["gain_abs"].append(updated.sums["gain_abs"])
        result["weights"] = [float(tensor.double().abs().sum()) for _, tensor in actor.hf_tensors()]
        log_probs = torch.zeros(total)
        if groups.reports_stats and groups.dp.rank() == 0:
            log_probs.copy_(first)
        torch.distributed.all_reduce(log_probs, group=groups.control)
        result["log_probs"] = log_probs.tolist()
        return result


def batch() -> tuple[list[Sequence], list[Sequence], list[float]]:
    """Odd lengths: a one-token prompt, a one-token response, one longer than a micro-batch."""
    rng = random.Random(3)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(count)]

    shapes = [(1, 5), (17, 1), (40, 30), (9, 11), (3, 2), (22, 13), (5, 8)]
    sequences = [Sequence(tokens(p), tokens(r)) for p, r in shapes]
    hinted = [
        Sequence(tokens(rng.randrange(1, 30)) + s.prompt_ids, s.response_ids) for s in sequences
    ]
    return sequences, hinted, [1.3, -0.7, 0.4, -1.1, 0.2, 0.9, -0.5]


def per_token(values: list[float], sequences: list[Sequence], members: list[int]) -> torch.Tensor:
    rows = [torch.full((len(sequences[i].response_ids),), values[i]) for i in members]
    return torch.cat(rows) if rows else torch.zeros(0)


def transformers_run(path: Path) -> dict[str, list[float]]:
    """The same steps by plain torch: full logits, autograd, torch's AdamW and clipping."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    teacher = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
        lr=1e-3,
    )

    def log_softmax(of: torch.nn.Module, sequence: Sequence) -> torch.Tensor:
        ids = torch.tensor([sequence.prompt_ids + sequence.response_ids])
        logits = of(ids).logits[0, len(sequence.prompt_ids) - 1 : -1]
        return (logits / 0.7).log_softmax(-1)

    def pick(log_probs: torch.Tensor, sequence: Sequence) -> torch.Tensor:
        return log_probs.gather(-1, torch.tensor(sequence.response_ids)[:, None])[:, 0]

    sequences, hinted, advantages = batch()
    total = sum(len(s.response_ids) for s in sequences)
    result: dict[str, list[float]] = {"loss": [], "grad_norm": [], "log_probs": []}
    with torch.no_grad():
        for sequence in sequences:
            result["log_probs"] += pick(log_softmax(model, sequence), sequence).tolist()
    for _ in range(STEPS):
        loss = torch.zeros(())
        for sequence, with_hint, advantage in zip(sequences, hinted, advantages, strict=True):
            log_probs = log_softmax(model, sequence)
            student = pick(log_probs, sequence)
            with torch.no_grad():
                gain = pick(log_softmax(teacher, with_hint), sequence) - student
                weight = torch.exp(gain if advantage > 0 else -gain).clamp(0.8, 1.2)
            credit = advantage * (0.5 + 0.5 * weight)
            entropy = -(log_probs.exp() * log_probs).sum(-1)
            ratio = (student - student.detach()).exp()
            loss = loss - (credit * ratio + 0.01 * entropy).sum() / total
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        result["loss"].append(loss.item())
        result["grad_norm"].append(float(norm))
    return result
