"""The conversions and comparisons of ``rlsd convert``; its command line is in convert.py."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from megatron_rlsd.checkpoint.checksums import damages, damages_by_block
from megatron_rlsd.checkpoint.manifest import MANIFEST_NAME, Manifest, read_manifest, write_manifest
from megatron_rlsd.conversion.compare import compare, open_checkpoint
from megatron_rlsd.conversion.convert import BytesDone, Sizes, to_hf, to_megatron
from megatron_rlsd.conversion.describe import check_hashes, describe, hashes
from megatron_rlsd.conversion.megatron_weights import MegatronWeights
from megatron_rlsd.data import plain_encoder
from megatron_rlsd.data.probes import TEXTS
from megatron_rlsd.hf_bridge import Weights, load_hf_config
from megatron_rlsd.runtime.errors import UserError

TEXT = (
    "A cup of tea cools fastest at first, because the flow of heat is proportional to the "
    "difference between its temperature and the room's. After twenty minutes it has lost more "
    "than half of that difference. If 3x + 5 = 20, then 3x = 15 and x = 5. "
)


def convert(args: argparse.Namespace) -> int:
    """Do what the command line of convert.py asks for; the exit code."""
    commands = {
        "to-megatron": run_to_megatron,
        "to-hf": run_to_hf,
        "verify": run_verify,
        "inspect": run_inspect,
    }
    return commands[args.command](args)


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def run_to_megatron(args: argparse.Namespace) -> int:
    sizes = Sizes(
        args.tensor_parallel,
        args.pipeline_parallel,
        args.expert_parallel,
        args.expert_tensor_parallel or args.tensor_parallel,
    )
    layout = {
        "tensor": sizes.tensor,
        "pipeline": sizes.pipeline,
        "expert": sizes.expert,
        "expert_tensor": sizes.expert_tensor,
    }

    def finish(folder: Path) -> None:
        write_manifest(folder, Manifest(kind="weights", step=0, layout=layout))

    with _progress("to Megatron") as progress:
        kept = to_megatron(
            args.source,
            args.out,
            sizes,
            dtype=_dtype(args.dtype),
            allow_pickle=args.allow_pickle,
            overwrite=args.overwrite,
            finish=finish,
            progress=progress,
        )
    print(f"{args.out}: Megatron checkpoint for {_layout(layout)}{_beside(kept)}")
    return 0


def run_to_hf(args: argparse.Namespace) -> int:
    if (args.source / MANIFEST_NAME).is_file():
        read_manifest(args.source)
    with _progress("to Hugging Face") as progress:
        kept = to_hf(
            args.source,
            args.out,
            dtype=_dtype(args.dtype),
            max_shard_bytes=args.max_shard_size,
            overwrite=args.overwrite,
            progress=progress,
        )
    print(f"{args.out}: Hugging Face folder{_beside(kept)}")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    a, b = (open_checkpoint(path, allow_pickle=args.allow_pickle) for path in (args.a, args.b))
    identical, within, failed = 0, 0, []
    for difference in compare(a, b):
        identical += difference.identical
        if difference.within(args.tolerance):
            within += 1
            if args.verbose:
                print(f"{difference.name}: {difference.hashes[0]}, max abs {difference.max_abs}")
            continue
        failed.append(difference.name)
        what = difference.problem or f"max abs difference {difference.max_abs:.6g}"
        print(f"differs: {difference.name}: {what}")
    print(f"weights: {identical} tensors bit-identical, {within} within {args.tolerance:g}")
    if failed:
        print(f"weights: {len(failed)} tensors differ, first {failed[0]}")
        return 1
    if tokenizers_differ(_hf_files(a), _hf_files(b)):
        return 1
    if args.skip_log_probs:
        return 0
    text = args.text.read_text() if args.text else TEXT
    reference, ours = (b, a) if isinstance(a, MegatronWeights) else (a, b)
    if isinstance(reference, MegatronWeights):
        print("log-probabilities: left out, neither checkpoint can be read by transformers")
        return 0
    difference_, tokens = log_prob_difference(reference.path, ours, text, args.max_tokens)
    fits = difference_ <= args.log_prob_tolerance
    print(
        f"log-probabilities: transformers and Megatron differ by at most {difference_:.2e} "
        f"over {tokens} tokens ({'within' if fits else 'MORE THAN'} {args.log_prob_tolerance:g})"
    )
    return 0 if fits else 1


def tokenizers_differ(a: Path, b: Path) -> bool:
    """Print whether the two folders' tokenizers give the same ids of short texts."""
    encoders = []
    for folder in (a, b):
        try:
            encoders.append(plain_encoder(folder))
        except UserError:
            print(f"tokenizers: not compared, {folder} has none")
            return False
    for text in TEXTS:
        ids = [encode(text) for encode in encoders]
        if ids[0] != ids[1]:
            print(f"tokenizers: of {text!r} {a} makes {ids[0]}, {b} {ids[1]}")
            return True
    print(f"tokenizers: the same ids of {len(TEXTS)} texts")
    return False


def _hf_files(weights: Weights) -> Path:
    return weights.hf_files if isinstance(weights, MegatronWeights) else weights.path


def run_inspect(args: argparse.Namespace) -> int:
    problems, checked = [], ["headers"]
    if (args.path / MANIFEST_NAME).is_file():
        manifest = read_manifest(args.path)
        print(f"checkpoint: {manifest.kind}, step {manifest.step}, {_layout(manifest.layout)}")
        found = damages(args.path, manifest.checksums)
        found |= damages_by_block(args.path, manifest.by_block)
        problems += [f"{name} {damage}" for name, damage in sorted(found.items())]
        checked.append("checksums" if manifest.checksums else "sizes (it has no checksums)")
    description, weights = describe(args.path, allow_pickle=args.allow_pickle)
    for name, fact in description.facts.items():
        print(f"{name}: {fact}")
    problems += description.problems
    if args.tensors:
        for name, info in weights.tensors.items():
            print(f"{name}  {info.dtype} {tuple(info.shape)}")
    if args.hashes or args.write_hashes:
        found = hashes(weights)
        if args.hashes:
            problems += check_hashes(found, args.hashes)
        if args.write_hashes:
            args.write_hashes.write_text(json.dumps(found, indent=1) + "\n")
    for problem in problems:
        print(f"problem: {problem}")
    checked += ["hashes"] if args.hashes else []
    whole = f"{', '.join(checked)} are whole"
    print(f"integrity: {f'{len(problems)} problems' if problems else whole}")
    return 1 if problems else 0


def log_prob_difference(
    hf_folder: Path, weights: Weights, text: str, max_tokens: int
) -> tuple[float, int]:
    """Largest difference of any log-probability over the vocabulary, and the number of tokens.

    transformers runs the model in ``hf_folder``; Megatron, in one process, runs ``weights``; both
    in float32 over the first ``max_tokens`` tokens of ``text``.
    """
    # Slow to import, and only this needs them.
    from transformers import AutoModelForCausalLM

    from megatron_rlsd.actor.model import build_model, transformer_config
    from megatron_rlsd.config import ModelConfig, ParallelConfig
    from megatron_rlsd.hf_bridge import family_for, load_hf_weights
    from megatron_rlsd.parallel.groups import parallel_world

    try:
        encode = plain_encoder(hf_folder)
    except UserError as error:
        raise UserError(
            f"{hf_folder} has no tokenizer to read text with: {error}; give --skip-log-probs"
        ) from error
    ids = torch.tensor([encode(text)[:max_tokens]])
    hf_config = load_hf_config(hf_folder)
    family = family_for(hf_config)
    parallel = ParallelConfig()
    config = transformer_config(
        ModelConfig(hf_path=str(hf_folder), dtype="float32"), parallel, family, hf_config
    )
    shape = family.dims(hf_config)
    with (
        torch.no_grad(),
        parallel_world(parallel, shape, timeout_seconds=600, seed=0) as groups,
    ):
        chunks = build_model(config, family, hf_config, groups)
        load_hf_weights(chunks, weights, family, hf_config)
        chunks[0].eval()
        ids = ids.to(groups.device)
        positions = torch.arange(ids.shape[1], device=groups.device)[None]
        ours = chunks[0](ids, positions).float().log_softmax(-1).cpu()
    reference = AutoModelForCausalLM.from_pretrained(
        hf_folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()
    with torch.no_grad():
        theirs = reference(ids.cpu()).logits.log_softmax(-1)
    return (ours - theirs).abs().max().item(), ids.shape[1]


@contextmanager
def _progress(label: str) -> Iterator[BytesDone]:
    columns = (
        "{task.description}",
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bars:
        task = bars.add_task(label, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _beside(kept: list[str]) -> str:
    return f"; other files stay: {', '.join(kept)}" if kept else ""


def _layout(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())
