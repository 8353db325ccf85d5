"""Where a run starts: at its own last checkpoint, at one it is given, or at step 0."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from megatron_rlsd.checkpoint.manifest import Kind, last_whole, read_manifest, whole_checkpoints
from megatron_rlsd.checkpoint.settings import check_model, check_settings
from megatron_rlsd.config import Config
from megatron_rlsd.parallel.exchange import broadcast_bytes
from megatron_rlsd.runtime.durable import clean_up
from megatron_rlsd.runtime.errors import UserError

STATE_NAME = "state.json"
Program = Literal["train", "sft", "rollout_only"]


@dataclass(frozen=True)
class Start:
    """The same on every rank."""

    folder: str | None = None
    """The checkpoint to load; None: the weights of model.hf_path."""
    kind: Kind = "training"
    step: int = 0
    """The first step to run."""
    continues: bool = False
    """The run goes on in its own folder: its logs are continued, not moved aside."""
    notes: list[str] = field(default_factory=list)


def agree_on_start(
    config: Config, hf_config: dict[str, Any], control: dist.ProcessGroup, program: Program
) -> Start:
    """Rank 0 looks and all ranks follow; UserError on all of them where it finds none fit."""
    payload = None
    if dist.get_rank() == 0:
        try:
            payload = json.dumps(asdict(choose_start(config, hf_config, program))).encode()
        except UserError as error:
            payload = json.dumps({"error": str(error)}).encode()
    answer = json.loads(broadcast_bytes(payload, control))
    if "error" in answer:
        raise UserError(answer["error"])
    return Start(**answer)


def choose_start(config: Config, hf_config: dict[str, Any], program: Program) -> Start:
    """Follow ``train.resume``; see docs/checkpoints.md.

    Of a checkpoint that another program wrote (a supervised warm start, say) the weights are taken.

    Raises UserError when the checkpoint is damaged, holds another model or belongs to a run
    with settings that cannot change.
    """
    own = checkpoints_of(config)
    clean_up(own)
    if config.train.resume == "never":
        notes = _set_aside(own)
        return Start(notes=notes)
    folder, continues, notes = last_whole(own), True, []
    if config.train.resume != "auto":
        given = Path(config.train.resume)
        read_manifest(given)
        if given.resolve().parent == own.resolve():
            folder, notes = given, _drop_after(own, given)
        elif folder is None:
            folder, continues = given, False
    if folder is None:
        return Start()
    manifest = read_manifest(folder)
    hf = folder / "hf" / "config.json"
    if hf.is_file():
        check_model(json.loads(hf.read_text()), hf_config, folder)
    saved = {} if manifest.kind == "weights" else json.loads((folder / STATE_NAME).read_text())
    if saved.get("program") != program:
        if saved and continues and program != "rollout_only":
            raise UserError(
                f"{own} holds checkpoints of {saved['program']}, not of {program}; choose another "
                "run_dir, and that checkpoint as train.resume to start from its weights"
            )
        return Start(str(folder), "weights", notes=[*notes, f"starting from the weights {folder}"])
    changed = check_settings(saved["config"], config.model_dump(mode="json"), folder)
    notes.append(f"resuming at step {manifest.step} from {folder}")
    notes += [f"  changed since: {line}" for line in changed]
    return Start(str(folder), "training", manifest.step, continues, notes)


def checkpoints_of(config: Config) -> Path:
    return Path(config.run_dir) / "checkpoints"


def _set_aside(own: Path) -> list[str]:
    """With resume=never an earlier run's checkpoints must not be taken for this run's."""
    if not own.is_dir() or not any(own.iterdir()):
        return []
    number = 1
    while (target := own.with_name(f"{own.name}.{number}")).exists():
        number += 1
    own.rename(target)
    return [f"train.resume=never: the checkpoints of an earlier run are now in {target}"]


def _drop_after(own: Path, chosen: Path) -> list[str]:
    """Hide the checkpoints of steps that will be run again; ``auto`` would choose them."""
    step = read_manifest(chosen).step
    notes = []
    for folder, manifest in whole_checkpoints(own):
        if manifest.step > step:
            hidden = folder.with_name(f".{folder.name}.superseded")
            folder.rename(hidden)
            notes.append(f"{folder.name} lies after the chosen checkpoint; now {hidden.name}")
    return notes
