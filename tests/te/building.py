"""What ranks with Transformer Engine's layers do for test_building.py."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

from megatron_rlsd.actor import marks, model
from megatron_rlsd.actor.precision import LayerKind
from megatron_rlsd.checkpoint.sharding import model_pieces
from megatron_rlsd.config import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_rlsd.hf_bridge import export_hf_tensors, family_for, load_hf_config, load_hf_weights
from megatron_rlsd.parallel.eight_bit import check_eight_bit
from megatron_rlsd.parallel.groups import ParallelGroups, parallel_world
from tests.distributed.ranks import next_world


@dataclass(frozen=True)
class Built:
    """One model built in one layout."""

    family: str
    kind: LayerKind = "transformer_engine"
    grouped: bool = True
    fp8: str = "none"

    @property
    def name(self) -> str:
        parts = [self.family, self.kind]
        parts += ["sequential experts"] * (not self.grouped)
        return " ".join([*parts, *([self.fp8] if self.fp8 != "none" else [])])


def build_all(folder: str, out: str, cases: list[tuple[dict[str, Any], list[Built]]]) -> None:
    """On every rank, each layout after the other; rank 0 writes a line for each model."""
    lines = []
    for parallel, builds in cases:
        settings = ParallelConfig(**parallel)
        hf_config = load_hf_config(Path(folder) / "qwen3_moe")
        shape = family_for(hf_config).dims(hf_config)
        with parallel_world(settings, shape, timeout_seconds=120, seed=0) as groups:
            for build in builds:
                line = {"parallel": parallel, "name": build.name}
                lines.append(line | build_one(Path(folder) / build.family, settings, build, groups))
        next_world()
    if os.environ["RANK"] == "0":
        Path(out).write_text(json.dumps(lines))


def build_one(
    folder: Path, parallel: ParallelConfig, build: Built, groups: ParallelGroups
) -> dict[str, Any]:
    """Build, fill and export: what differs from the folder, and which marks had to be set."""
    hf_config = load_hf_config(folder)
    family = family_for(hf_config)
    precision = PrecisionConfig(layers=build.kind, fp8=build.fp8)
    check_eight_bit(family.dims(hf_config), parallel, precision)
    settings = ModelConfig(hf_path=str(folder), dtype="bfloat16", precision=precision)
    config = model.transformer_config(settings, parallel, family, hf_config, build.kind)
    if not build.grouped:
        config.moe_grouped_gemm = False
    corrected: list[marks.Corrected] = []
    original = marks.set_marks

    def recorded(*args: Any) -> list[marks.Corrected]:
        corrected.extend(original(*args))
        return corrected

    with mock.patch.object(model, "set_marks", recorded):
        chunks = model.build_model(config, family, hf_config, groups, build.kind)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(0.25)
    load_hf_weights(chunks, folder, family, hf_config, layout=groups.shard_layout)
    exported = dict(
        export_hf_tensors(
            *(chunks, family, hf_config),
            tp_group=groups.tp,
            pp_group=groups.pp,
            ep_group=groups.ep,
            etp_group=groups.expert_tp,
        )
    )
    wanted = load_file(folder / "model.safetensors")
    different = sorted(set(wanted) ^ set(exported))
    different += [n for n in wanted if n in exported and not torch.equal(wanted[n], exported[n])]
    saved = {id(piece.owner) for piece in model_pieces(chunks, groups)}
    return {
        "unsaved": [n for c in chunks for n, p in c.named_parameters() if id(p) not in saved],
        "different": different,
        "modules": sorted({type(m).__name__ for chunk in chunks for m in chunk.modules()}),
        "corrected": [asdict(each) for each in corrected],
        "marks": {
            name: asdict(marks.Marks.of(parameter))
            for chunk in chunks
            for name, parameter in chunk.named_parameters()
        },
    }
