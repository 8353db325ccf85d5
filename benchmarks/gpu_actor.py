"""Stages of gpu_day: an RLSD step of the actor on a few layers of an 8B model's widths.

    python benchmarks/gpu_actor.py --out OUT/actor.json [--layers-of transformer_engine] [--toy]

A step is a scoring pass (the teacher's) and an update over the same sequences. Figures: tokens a
second, share of the card's peak, device time in the head, the optimizer and attention, time in
which nothing ran, memory beside the planner's, and bfloat16's noise: the difference between two
passes that pack the same sequences differently. One sequence is compared with transformers first.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from device_profile import kernels
from results_file import ResultsFile, machine

from megatron_rlsd.actor import actor as actor_module
from megatron_rlsd.actor.actor import Actor
from megatron_rlsd.actor.packing import Sequence
from megatron_rlsd.actor.update_inputs import TokenValues
from megatron_rlsd.config import parse_config
from megatron_rlsd.hf_bridge import family_for, load_hf_config, save_hf_folder
from megatron_rlsd.ops import PolicyLossConfig
from megatron_rlsd.parallel.groups import parallel_world
from megatron_rlsd.planning.activations import Pack
from megatron_rlsd.planning.memory import Workload, rank_memory

PEAK_TFLOPS = 989.0
"""Dense bfloat16 of an H100 SXM and an H200, by the vendor's datasheet."""
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "initializer_range": 0.02,
}
TOY = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--layers-of", choices=["local", "transformer_engine"], default="local")
    parser.add_argument("--fp8", default="none", help="model.precision.fp8")
    parser.add_argument("--recompute", default="none", choices=["none", "selective", "full"])
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--response", type=int, default=1536, help="tokens")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--pack", type=int, default=16384, help="tokens of a micro-batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-reference", action="store_true", help="not beside transformers")
    parser.add_argument("--profile", type=Path, help="write the kernels of one step there")
    parser.add_argument("--toy", action="store_true", help="CPU, toy sizes")
    args = parser.parse_args()
    device = torch.device("cpu" if args.toy else "cuda")
    sizes = QWEN3_8B | {"num_hidden_layers": args.layers, "torch_dtype": "bfloat16"}
    if args.toy:
        sizes |= TOY | {"num_hidden_layers": 2}
        args.prompt, args.response, args.sequences, args.pack = 6, 10, 4, 32
    facts = {"machine": machine(device), "arguments": arguments(args)}
    results = ResultsFile(args.out, facts)
    with tempfile.TemporaryDirectory(prefix="gpu_actor_") as folder:
        model = Path(folder, "model")
        started = time.perf_counter()
        save_random_folder(sizes, model, device)
        results.add("model_seconds", round(time.perf_counter() - started, 1))
        measure(args, model, results)


def arguments(args: argparse.Namespace) -> dict[str, str]:
    """What was asked for, without where it is written."""
    return {k: str(v) for k, v in vars(args).items() if k not in ("out", "profile")}


def save_random_folder(hf_config: dict[str, Any], folder: Path, device: torch.device) -> None:
    """Every tensor from a normal distribution of a trained model's size, made on the device."""
    family = family_for(hf_config)
    generator = torch.Generator(device).manual_seed(0)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in family.hf_shapes(family.dims(hf_config)).items():
            if len(shape) == 1:
                yield name, torch.ones(shape, dtype=torch.bfloat16)
            else:
                values = torch.randn(shape, generator=generator, device=device)
                yield name, (0.02 * values).bfloat16().cpu()

    save_hf_folder(tensors(), folder, hf_config)


def measure(args: argparse.Namespace, model: Path, out: ResultsFile) -> None:
    config = parse_config(
        {
            "run_dir": "unused",
            "model": {
                "hf_path": str(model),
                "dtype": "bfloat16",
                "recompute": args.recompute,
                "precision": {"layers": args.layers_of, "fp8": args.fp8},
            },
            "data": {"train": [{"kind": "jsonl", "path": "unused"}]},
            "reward": {"functions": [{"name": "exact_match"}]},
            "train": {"max_tokens_per_microbatch": args.pack},
            "optimizer": {"lr": 1e-6, "distributed": True},
            "rollout": {"engine": "sglang"},
        }
    )
    hf_config = load_hf_config(model)
    family = family_for(hf_config)
    shape = family.dims(hf_config)
    length = args.prompt + args.response - 1
    sequences = random_sequences(args, hf_config["vocab_size"])
    tokens = args.sequences * args.response
    with parallel_world(config.parallel, shape, timeout_seconds=120, seed=0) as groups:
        started = time.perf_counter()
        actor = Actor(config, family, hf_config, groups, 100)
        out.add("actor_seconds", round(time.perf_counter() - started, 1))
        device = groups.device
        if not args.no_reference:
            out.add("beside_transformers", beside_transformers(actor, model, sequences[0]))
        plan, _ = actor._micro_batches([sequences])
        work = flops(hf_config, args.sequences, length, tokens)
        values = TokenValues(
            advantages=torch.linspace(-1, 1, tokens, device=device),
            loss_weights=torch.full((tokens,), 1 / tokens, device=device),
        )
        old = actor.token_log_probs([sequences], 1.0)
        alone = [actor.token_log_probs([[each]], 1.0) for each in sequences[:3]]
        noise = (torch.cat(alone) - old[: 3 * args.response]).abs()
        out.add("noise_of_packing", {"mean": float(noise.mean()), "max": float(noise.max())})

        def score() -> None:
            actor.token_log_probs([sequences], 1.0)

        def update() -> None:
            # The teacher's log-probabilities would come from ``score``, under other prompts.
            config = PolicyLossConfig()
            actor.update(
                [sequences], TokenValues(**vars(values) | {"teacher_log_probs": old}), config, 1.0
            )

        with watched(actor) as spans:
            for name, step in (("score", score), ("update", update)):
                started = time.perf_counter()
                step()
                synchronize(device)
                first = time.perf_counter() - started
                reset_peak(device)
                times = []
                for _ in range(args.rounds):
                    spans.clear()
                    started = time.perf_counter()
                    step()
                    synchronize(device)
                    times.append(time.perf_counter() - started)
                seconds = statistics.median(times)
                out.add(
                    name,
                    {
                        "first_seconds": round(first, 2),
                        "milliseconds": [round(1e3 * t, 1) for t in times],
                        "micro_batches": len(plan.members[0]),
                        "tokens_per_second": round(args.sequences * length / seconds),
                        "tflops": round(work[name] / seconds / 1e12, 1),
                        "share_of_peak": round(work[name] / seconds / 1e12 / PEAK_TFLOPS, 4),
                        "spans_ms": {
                            n: round(sum(s.ms() for s in each), 2) for n, each in spans.items()
                        },
                        "peak_gib": peak_gib(device),
                    },
                )
        out.add("planned_gib", planned(config, shape, plan, length, args.layers_of, device))
        if device.type == "cuda":
            out.add("kernels", kernels(update, args.profile))


def random_sequences(args: argparse.Namespace, vocab_size: int) -> list[Sequence]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(
        vocab_size, (args.sequences, args.prompt + args.response), generator=generator
    )
    return [Sequence.of(row[: args.prompt].tolist(), row[args.prompt :].tolist()) for row in ids]


def flops(hf_config: dict[str, Any], count: int, length: int, scored: int) -> dict[str, float]:
    """Multiplications and additions that the passes must do: products of weights, of attention
    under the causal mask, and of the head at the scored tokens."""
    D, F, layers = (hf_config[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    heads, kv, size = (
        hf_config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    layer = D * size * (2 * heads + 2 * kv) + 3 * D * F
    pairs = count * length * (length + 1) / 2
    forward = layers * (2 * layer * count * length + 4 * heads * size * pairs)
    head = 2 * D * hf_config["vocab_size"] * scored
    return {"score": forward + head, "update": 3 * (forward + head)}


def beside_transformers(actor: Actor, model: Path, sequence: Sequence) -> dict[str, Any]:
    """Log-probabilities of the last tokens against transformers' in float32, same weights; and how
    far transformers' own in bfloat16 lie from those."""
    ours = actor.token_log_probs([[sequence]], 1.0)
    assert ours is not None
    last = min(128, len(sequence.response_ids))
    exact = transformers_log_probs(model, sequence, last, torch.float32, ours.device)
    theirs = transformers_log_probs(model, sequence, last, torch.bfloat16, ours.device)
    errors = {"ours": ours[-last:] - exact, "transformers_in_bfloat16": theirs - exact}
    return {
        name: {"mean": float(each.abs().mean()), "max": float(each.abs().max())}
        for name, each in errors.items()
    }


def transformers_log_probs(
    path: Path, sequence: Sequence, last: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Log-probabilities of the last tokens, [last] float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
    ids = torch.tensor([sequence.token_ids.tolist()], device=device)
    with torch.no_grad():
        logits = model.to(device)(ids[:, :-1], logits_to_keep=last).logits[0]
    rows = logits.float().log_softmax(-1)
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows.gather(1, ids[0, -last:, None])[:, 0]


class Span:
    """Device time between two points of the current stream; on a CPU the wall time."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._points: list[Any] = []
        self.mark()

    def mark(self) -> None:
        if self._cuda:
            point = torch.cuda.Event(enable_timing=True)
            point.record()
            self._points.append(point)
        else:
            self._points.append(time.perf_counter())

    def ms(self) -> float:
        begin, end = self._points
        return float(begin.elapsed_time(end)) if self._cuda else 1e3 * (end - begin)


@contextmanager
def watched(actor: Actor) -> Iterator[dict[str, list[Span]]]:
    """Spans of the head's calls and of the optimizer's step, by name."""
    spans: dict[str, list[Span]] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            span = Span(actor.groups.device)
            result = function(*args, **kwargs)
            span.mark()
            spans.setdefault(name, []).append(span)
            return result

        return call

    replaced = [
        (actor_module, "policy_loss", "head"),
        (actor_module, "token_log_probs", "head"),
        (actor.optimizer, "step", "optimizer"),
    ]
    originals = [getattr(owner, attribute) for owner, attribute, _ in replaced]
    for (owner, attribute, name), original in zip(replaced, originals, strict=True):
        setattr(owner, attribute, timed(name, original))
    try:
        yield spans
    finally:
        for (owner, attribute, _), original in zip(replaced, originals, strict=True):
            setattr(owner, attribute, original)


def planned(
    config: Any, shape: Any, plan: Any, length: int, layers_of: str, device: torch.device
) -> dict[str, Any]:
    """The planner's peak for the longest pack."""
    padded = max(plan.pack_lengths[0])
    pack = Pack.of(padded, config.pack_multiple * -(-length // config.pack_multiple))
    kernels: Any = "cpu" if device.type == "cpu" else "cuda"
    if layers_of == "transformer_engine":
        kernels = layers_of
    memory = rank_memory(
        config,
        shape,
        world_size=1,
        stage=0,
        work=Workload(update=pack, score=pack, micro_batches=len(plan.members[0])),
        kernels=kernels,
    )
    gib = 2**30
    parts = {"held": memory.held, **memory.moments}
    return {
        "update": round(max(memory.at("loss"), memory.at("backward")) / gib, 2),
        "optimizer step": round(memory.at("optimizer step") / gib, 2),
        **{n: {k: round(v / gib, 2) for k, v in each.items()} for n, each in parts.items()},
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    return round(torch.cuda.max_memory_allocated() / 2**30, 2)


if __name__ == "__main__":
    main()
