"""Train tiny models in any layout on the same data, and say what came out.

Shared by the layout tests and by ``benchmarks/layout_matrix.py``, which writes docs/layouts.md.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file

from megatron_rlsd.actor.actor import Actor
from megatron_rlsd.actor.balance import balanced_partition
from megatron_rlsd.actor.packing import Sequence
from megatron_rlsd.actor.update_inputs import TokenValues
from megatron_rlsd.config import Config, parse_config
from megatron_rlsd.hf_bridge.parameters import model_dims
from megatron_rlsd.ops import PolicyLossConfig
from megatron_rlsd.parallel.groups import ParallelGroups
from megatron_rlsd.parallel.memory import StateBytes, state_bytes
from megatron_rlsd.teacher import Teacher
from tests.actors import actor_of
from tests.distributed.ranks import BEFORE, next_world, run_on_ranks
from tests.models import save_random_model

VOCAB = 131
STEPS = 5
TEMPERATURE = 0.7
LOSS = PolicyLossConfig(rlsd_lambda=0.5, entropy_coef=0.01, dual_clip=3.0)
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Layout:
    """One arrangement of ``world`` processes; data parallel takes what the others leave."""

    world: int
    model: str = "dense"
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    first_stage_layers: int | None = None
    context: int = 1
    expert: int = 1
    expert_tensor: int | None = None
    sequence: bool = False
    distributed_optimizer: bool = False
    recompute: str = "none"
    sequence_ratio: bool = False
    """The importance ratio of a whole response (GSPO), which context parallelism splits."""
    layers: str = "auto"
    """As in model.precision: local ones on a CPU, unless tests/te is installed."""

    @property
    def data(self) -> int:
        return self.world // (self.tensor * self.pipeline * self.context)

    @property
    def name(self) -> str:
        sizes = {
            "TP": self.tensor,
            "PP": self.pipeline,
            "VPP": self.virtual_pipeline,
            "CP": self.context,
            "EP": self.expert,
            "DP": self.data,
        }
        parts = [f"{kind}{size}" for kind, size in sizes.items() if size > 1]
        if self.model == "experts" and self.tensor > 1:
            parts.append(f"ETP{self.expert_tensor or self.tensor}")
        parts += ["SP"] * self.sequence
        parts += ["uneven stages"] * (self.first_stage_layers is not None)
        parts += ["distributed optimizer"] * self.distributed_optimizer
        parts += [f"{self.recompute} recompute"] * (self.recompute != "none")
        parts += ["sequence ratio"] * self.sequence_ratio
        parts += [f"{self.layers} layers"] * (self.layers != "auto")
        return " ".join(parts) or "one process"

    @property
    def reference(self) -> Layout:
        """The one process that this layout must equal."""
        return Layout(1, model=self.model, sequence_ratio=self.sequence_ratio, layers=self.layers)

    @property
    def key(self) -> str:
        """A file name."""
        return f"{self.model} {self.name}".replace(" ", "_")


def save_models(folder: Path) -> dict[str, Path]:
    """A Qwen3 with tied and a Llama with untied embeddings, and a Qwen3-MoE with one layer without
    experts. Odd sizes where a layout allows them: vocabulary, head size."""
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
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    }
    made = {
        "dense": transformers.Qwen3Config(**sizes, tie_word_embeddings=True),
        "untied": transformers.LlamaConfig(**sizes, tie_word_embeddings=False),
        "experts": transformers.Qwen3MoeConfig(**sizes, **experts, tie_word_embeddings=False),
    }
    return {name: save_random_model(config, folder / name) for name, config in made.items()}


def save_latent_model(folder: Path) -> Path:
    """A DeepSeek model: latent attention, grouped routing with biases, a shared expert."""
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=56,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            q_lora_rank=14,
            kv_lora_rank=10,
            qk_nope_head_dim=6,
            qk_rope_head_dim=4,
            v_head_dim=10,
            n_routed_experts=8,
            n_shared_experts=1,
            num_experts_per_tok=4,
            n_group=4,
            topk_group=2,
            moe_intermediate_size=20,
            first_k_dense_replace=1,
            max_position_embeddings=128,
            initializer_range=0.2,
        )
    )
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    return folder


def batch() -> tuple[list[Sequence], list[Sequence], list[float]]:
    """Odd lengths: a one-token prompt, a one-token response, one longer than a micro-batch."""
    rng = random.Random(3)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(count)]

    shapes = [(1, 5), (17, 1), (40, 30), (9, 11), (3, 2), (22, 13), (5, 8)]
    sequences = [Sequence.of(tokens(p), tokens(r)) for p, r in shapes]
    hinted = [
        Sequence.of([*tokens(rng.randrange(1, 30)), *s.prompt_ids], s.response_ids)
        for s in sequences
    ]
    return sequences, hinted, [1.3, -0.7, 0.4, -1.1, 0.2, 0.9, -0.5]


@dataclass(frozen=True)
class Measured:
    """What training in one layout gave."""

    series: dict[str, list[float]]
    """loss, grad_norm, entropy and gain_abs of each step; log_probs before the first."""
    weights: dict[str, torch.Tensor]
    """HF tensors after the last step."""
    state: list[dict[str, Any]]
    """For each rank: its pipeline stage, the bytes counted, and those of the formula."""


def measure(
    layouts: list[Layout],
    models: dict[str, Path],
    out: Path,
    seconds: float = 600,
    before: list[Any] = BEFORE,
) -> dict[Layout, Measured]:
    """Train in each of the layouts, which are all of one world size, in the same processes."""
    run_on_ranks(
        _train_layouts,
        layouts[0].world,
        layouts,
        {name: str(path) for name, path in models.items()},
        str(out),
        seconds=seconds,
        worlds=len(layouts) + 1,
        before=before,
    )
    return {
        layout: Measured(
            **json.loads((out / f"{layout.key}.json").read_text()),
            weights=load_file(out / f"{layout.key}.safetensors"),
        )
        for layout in layouts
    }


def differences(measured: Measured, expected: Measured) -> dict[str, float]:
    """Largest relative difference of each series and of the weights.

    A series is held against its largest number, a weight against its tensor's norm: where a single
    gradient is rounding noise, AdamW still moves that one number by up to the learning rate.
    """
    found = {}
    for name, values in expected.series.items():
        wanted = torch.tensor(values)
        error = torch.tensor(measured.series[name]) - wanted
        found[name] = float(error.abs().max() / wanted.abs().max())
    assert measured.weights.keys() == expected.weights.keys()
    found["weights"] = max(
        float((measured.weights[name] - tensor).norm() / tensor.norm())
        for name, tensor in expected.weights.items()
    )
    return found


def check_state(layout: Layout, measured: Measured) -> None:
    """The bytes on each rank are those of the formula that plans them."""
    ranks = measured.state
    for rank in ranks:
        counted, formula = rank["counted"], rank["formula"]
        assert counted["parameters"] == formula["parameters"], (layout.key, rank)
        if not layout.distributed_optimizer:
            assert counted == formula, (layout.key, rank)
        # Megatron pads: each parameter to 64 elements, each buffer to a multiple of 128 a rank.
        assert 0 <= counted["gradients"] - formula["gradients"] < 0.1 * formula["gradients"]
        assert counted["optimizer"] == pytest.approx(formula["optimizer"], rel=0.1)
    for kind in ("parameters", "optimizer"):
        total = [sum(rank[side][kind] for rank in ranks) for side in ("counted", "formula")]
        assert total[0] == total[1], (layout.key, kind)


def _train_layouts(layouts: list[Layout], models: dict[str, str], out: str) -> None:
    """On every rank: train in each layout, one after the other."""
    for layout in layouts:
        train(layout, models[layout.model], Path(out) / layout.key)
        next_world()


def layout_config(layout: Layout, path: str) -> Config:
    return parse_config(
        {
            "run_dir": "unused",
            "model": {
                "hf_path": path,
                "dtype": "float32",
                "recompute": layout.recompute,
                "precision": {"layers": layout.layers},
            },
            "parallel": {
                "tensor": layout.tensor,
                "pipeline": layout.pipeline,
                "virtual_pipeline": layout.virtual_pipeline,
                "pipeline_first_stage_layers": layout.first_stage_layers,
                "context": layout.context,
                "expert": layout.expert,
                "expert_tensor": layout.expert_tensor,
                "sequence": layout.sequence,
            },
            "data": {"train": [{"kind": "jsonl", "path": "unused"}]},
            "reward": {"functions": [{"name": "exact_match"}]},
            "optimizer": {"lr": LEARNING_RATE, "distributed": layout.distributed_optimizer},
            "train": {"max_tokens_per_microbatch": 60},
        }
    )


def train(layout: Layout, path: str, out: Path) -> None:
    """Five updates with the RLSD loss against a frozen teacher and the first step's old policy."""
    config = layout_config(layout, path)
    with actor_of(config, STEPS, seconds=150) as actor:
        groups, shape = actor.groups, actor.family.dims(actor.hf_config)
        teacher = Teacher(config.teacher, actor.parameters())
        sequences, hinted, advantages = batch()
        parts = balanced_partition([s.num_inputs for s in sequences], groups.dp.size())
        mine = [sequences[i] for i in parts[groups.dp.rank()]]
        by_rank = [[sequences[i] for i in part] for part in parts]
        total = sum(len(s.response_ids) for s in sequences)

        # All sequences on the first data-parallel rank: the others take part with padding.
        alone = actor.token_log_probs([sequences, *([[]] * (groups.dp.size() - 1))], TEMPERATURE)
        old_log_probs = actor.token_log_probs(by_rank, TEMPERATURE)
        series: dict[str, list[float]] = {
            "log_probs": _on_all_ranks(groups, alone, total),
            **{name: [] for name in ("loss", "grad_norm", "entropy", "gain_abs")},
        }
        for _ in range(STEPS):
            with teacher.applied():
                teacher_log_probs = actor.token_log_probs(
                    [[hinted[i] for i in part] for part in parts], TEMPERATURE
                )
            updated = actor.update(
                by_rank,
                TokenValues(
                    advantages=per_token([advantages[i] for i in parts[groups.dp.rank()]], mine),
                    loss_weights=per_token([1 / total] * len(mine), mine),
                    old_log_probs=old_log_probs,
                    teacher_log_probs=teacher_log_probs,
                ),
                replace(LOSS, importance_ratio="sequence" if layout.sequence_ratio else "token"),
                TEMPERATURE,
            )
            assert updated.sums["tokens"] == total
            series["loss"].append(updated.sums["weighted_loss"])
            series["grad_norm"].append(updated.grad_norm)
            series["entropy"].append(updated.sums["entropy"])
            series["gain_abs"].append(updated.sums["gain_abs"])
        weights = {name: tensor.clone() for name, tensor in actor.hf_tensors()}
        state: list[Any] = [None] * groups.world_size
        dist.all_gather_object(state, _state(layout, config, shape, groups, actor))
        if groups.rank == 0:
            save_file(weights, out.with_suffix(".safetensors"))
            out.with_suffix(".json").write_text(json.dumps({"series": series, "state": state}))


def per_token(values: list[float], sequences: list[Sequence]) -> torch.Tensor:
    """One value per sequence -> one per response token, [R]."""
    rows = [torch.full((len(s.response_ids),), v) for v, s in zip(values, sequences, strict=True)]
    return torch.cat(rows) if rows else torch.zeros(0)


def _on_all_ranks(groups: ParallelGroups, values: torch.Tensor | None, total: int) -> list[float]:
    """The first data-parallel rank's values; they must be the same on all ranks that have them."""
    has_them = values is not None and groups.dp.rank() == 0
    highest = values.clone() if has_them and values is not None else torch.full((total,), -1e30)
    lowest = values.clone() if has_them and values is not None else torch.full((total,), 1e30)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=groups.control)
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=groups.control)
    assert torch.equal(highest, lowest), "ranks disagree on the log-probabilities"
    return highest.tolist()


def _state(
    layout: Layout, config: Config, shape: Any, groups: ParallelGroups, actor: Actor
) -> dict[str, Any]:
    formula = state_bytes(
        shape,
        config.parallel,
        world_size=groups.world_size,
        stage=groups.pp.rank(),
        dtype=config.model.dtype,
        distributed_optimizer=layout.distributed_optimizer,
        duplicated_latents=model_dims(
            actor.chunks, actor.family, actor.hf_config
        ).duplicated_latents,
    )
    return {
        "stage": groups.pp.rank(),
        "counted": asdict(counted_bytes(actor)),
        "formula": asdict(formula),
    }


def counted_bytes(actor: Actor) -> StateBytes:
    """Bytes of this rank's parameters, of Megatron's gradient buffers and of optimizer state."""
    buffers = [b for m in actor._model for b in (*m.buffers, *m.expert_parallel_buffers)]
    parts = getattr(actor._optimizer, "chained_optimizers", [actor._optimizer])
    states = [
        tensor
        for part in parts
        for state in part.optimizer.state.values()
        for name, tensor in state.items()
        if name != "step"
    ]
    masters = [
        master
        for part in parts
        for group in part.optimizer.param_groups
        for master in group["params"]
        if actor._config.bf16
    ]
    return StateBytes(
        parameters=sum(_bytes(p) for p in actor.parameters().values()),
        gradients=sum(_bytes(b.grad_data) for b in buffers),
        optimizer=sum(map(_bytes, [*states, *masters])),
    )


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
