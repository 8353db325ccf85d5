"""What a checkpoint folder holds, and whether it is whole; for ``inspect``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from megatron_rlsd.conversion.compare import open_checkpoint, tensor_hash
from megatron_rlsd.conversion.megatron_weights import MegatronWeights
from megatron_rlsd.conversion.tokenizer_fit import check_token_ids
from megatron_rlsd.hf_bridge.families import family_for
from megatron_rlsd.hf_bridge.load import check_tensors
from megatron_rlsd.hf_bridge.reader import Weights, load_hf_config
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.json_text import read_json_object


@dataclass(frozen=True)
class Description:
    """Facts by name in the order to show them, and what is wrong."""

    facts: dict[str, str]
    problems: list[str]


def describe(path: str | Path, *, allow_pickle: bool = False) -> tuple[Description, Weights]:
    """Family, sizes, dtypes, bytes and layout of a checkpoint, from headers and metadata alone.

    Raises UserError where not even the headers can be read.
    """
    weights = open_checkpoint(path, allow_pickle=allow_pickle)
    megatron = isinstance(weights, MegatronWeights)
    hf_files = weights.hf_files if isinstance(weights, MegatronWeights) else weights.path
    hf_config = load_hf_config(hf_files)
    infos = weights.tensors.values()
    dtypes = Counter(info.dtype for info in infos)
    facts = {
        "format": "Megatron torch_dist checkpoint" if megatron else "Hugging Face folder",
        "tensors": f"{len(infos):,}",
        "parameters": f"{sum(prod(info.shape) for info in infos):,}",
        "bytes": f"{sum(info.nbytes for info in infos):,}",
        "dtypes": ", ".join(f"{dtype} x {count}" for dtype, count in dtypes.most_common()),
        "largest tensor": f"{max((info.nbytes for info in infos), default=0):,} bytes",
        "files": str(len({info.file for info in infos})) if not megatron else "",
    }
    problems: list[str] = []
    _try(problems, lambda: _check_model(weights, hf_config, facts))
    _try(problems, lambda: check_token_ids(hf_files, int(hf_config.get("vocab_size") or 0)))
    return Description({name: fact for name, fact in facts.items() if fact}, problems), weights


def hashes(weights: Weights) -> dict[str, str]:
    """Tensor name -> content hash. Reads everything; a Megatron checkpoint's checksums, too."""
    return {name: tensor_hash(weights.slice(name)) for name in weights.tensors}


def check_hashes(found: dict[str, str], file: Path) -> list[str]:
    """What differs from the hashes in ``file``, as ``hashes`` gave them; raises if it is none."""
    wanted = read_json_object(file)
    return [
        f"{name} differs from its hash in {file}"
        if name in found and name in wanted
        else f"{name} is only in {file if name in wanted else 'the checkpoint'}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]


def _check_model(weights: Weights, hf_config: dict[str, Any], facts: dict[str, str]) -> None:
    family = family_for(hf_config)
    facts["family"] = family.name
    dims = family.dims(hf_config)
    facts["layers"] = str(dims.num_layers)
    facts["hidden size"] = str(dims.hidden_size)
    facts["heads"] = f"{dims.num_attention_heads}, {dims.num_query_groups} for keys and values"
    facts["vocabulary"] = f"{dims.vocab_size}{', tied' if dims.tied_embeddings else ''}"
    if dims.moe_layers:
        facts["experts"] = f"{dims.num_experts} in each of {len(dims.moe_layers)} layers"
    check_tensors(weights, family, dims, family.entries(dims))


def _try(problems: list[str], check: Callable[[], None]) -> None:
    try:
        check()
    except UserError as error:
        problems.append(str(error))
