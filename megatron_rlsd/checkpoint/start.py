"""Where a run starts: at its own last checkpoint, at one it is given, or at step 0."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch.distributed as dist

from megatron_rlsd.checkpoint.manifest import (
    Kind,
    Manifest,
    look_through,
    read_manifest,
    whole_checkpoints,
)
from megatron_rlsd.checkpoint.settings import check_model, check_settings
from megatron_rlsd.checkpoint.verify import verify
from megatron_rlsd.config import Config
from megatron_rlsd.conversion.restricted import DamagedError
from megatron_rlsd.parallel.exchange import from_rank_zero
from megatron_rlsd.runtime.durable import clean_up, hidden_as, hide
from megatron_rlsd.runtime.errors import UserError

STATE_NAME = "state.json"
DAMAGED = "damaged"
Loaded = TypeVar("Loaded")
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


class StartingPoint:
    """Where a run starts, the same on all ranks. Making one, and ``load``, are collective.

    What is chosen is compared with its checksums, the tensors as they are loaded. A checkpoint of
    the run's own that is damaged is set aside, and the one before it chosen. Raises UserError on
    all ranks where none fits.
    """

    def __init__(
        self,
        config: Config,
        hf_config: dict[str, Any],
        control: dist.ProcessGroup,
        program: Program,
    ) -> None:
        self._config, self._control = config, control
        self._settled = partial(_settled, config, hf_config, program)
        self._damaged: dict[str, str] = {}
        self.on_change: Callable[[Start], None] = lambda start: None
        """Told of another start than ``start`` was so far, before it is loaded."""
        self.start = self._chosen()

    def load(self, load: Callable[[Start], Loaded]) -> Loaded:
        """What ``load`` makes of the start, or of an earlier one where DamagedError is raised."""
        while True:
            try:
                return load(self.start)
            except DamagedError as error:
                assert self.start.folder is not None
                self._note(self.start.folder, str(error))
            self.start = self._chosen()
            self.on_change(self.start)

    def _chosen(self) -> Start:
        while True:
            choice = Choice(
                **from_rank_zero(
                    lambda: asdict(choose_folder(self._config, self._damaged)), self._control
                )
            )
            if choice.folder is None:
                return Start(notes=choice.notes)
            manifest = read_manifest(choice.folder)
            damage = verify(Path(choice.folder), manifest, self._control)
            if damage is None:
                settled = from_rank_zero(partial(self._settled, choice), self._control)
                if "folder" in settled:
                    settled["notes"].append(_checked(manifest))
                    return Start(**settled)
                damage = settled["damage"]
            self._note(choice.folder, damage)

    def _note(self, folder: str, damage: str) -> None:
        """Another run's checkpoint is not set aside: UserError."""
        if Path(folder).parent.resolve() != checkpoints_of(self._config).resolve():
            raise UserError(damage)
        self._damaged[folder] = damage


def choose_start(config: Config, hf_config: dict[str, Any], program: Program) -> Start:
    """Follow ``train.resume``; see docs/checkpoints.md. The content of files is not compared.

    Of a checkpoint that another program wrote (a supervised warm start, say) the weights are taken.
    Raises UserError as ``choose_folder`` and ``settle`` do.
    """
    choice = choose_folder(config, {})
    if choice.folder is None:
        return Start(notes=choice.notes)
    return settle(config, hf_config, program, choice)


@dataclass(frozen=True)
class Choice:
    """The checkpoint to start from, its content unread."""

    folder: str | None
    """None: step 0."""
    notes: list[str]
    is_own: bool = True
    """The run's own: it goes on there."""


def choose_folder(config: Config, damaged: Mapping[str, str]) -> Choice:
    """Where ``train.resume`` leads; the folders in ``damaged`` (with why) are set aside.

    Raises UserError for a folder that is not a whole checkpoint, and where the run has checkpoints
    of which none is whole.
    """
    own = checkpoints_of(config)
    clean_up(own)
    if config.train.resume == "never":
        return Choice(None, _set_aside(own))
    for folder in map(Path, damaged):
        if folder.exists():
            hide(folder, DAMAGED)
    whole, passed_over = look_through(own)
    reasons = [*passed_over.values(), *damaged.values()]
    if not whole:  # a run does not begin anew over what an earlier start has set aside, either
        known = {hidden_as(Path(folder), DAMAGED) for folder in damaged}
        earlier = sorted(set(own.glob(f".step_*.{DAMAGED}")) - known)
        reasons += [f"{folder} is damaged: an earlier start set it aside" for folder in earlier]
    notes = [f"passed over: {reason}" for reason in reasons]
    if config.train.resume != "auto":
        given = Path(config.train.resume)
        if str(given) not in damaged:
            read_manifest(given)
            if given.resolve().parent == own.resolve():
                return Choice(str(given), _drop_after(own, given))
            if not whole and not reasons:
                return Choice(str(given), [], is_own=False)
    if whole:
        return Choice(str(whole[-1][0]), notes)
    if reasons:
        lines = "\n  ".join(reasons)
        raise UserError(
            f"{own} holds checkpoints of which none is whole, and a run does not begin anew over "
            f"them:\n  {lines}\n"
            "Put a whole one back; or give train.resume=FOLDER a checkpoint from elsewhere, in a "
            "run_dir of its own; or train.resume=never, which moves these aside and begins at step "
            "0."
        )
    return Choice(None, [])


def settle(config: Config, hf_config: dict[str, Any], program: Program, choice: Choice) -> Start:
    """What is taken of the chosen checkpoint.

    Raises UserError when it holds another model or belongs to a run with settings that cannot
    change, DamagedError when that cannot be read.
    """
    assert choice.folder is not None
    folder, notes = Path(choice.folder), list(choice.notes)
    manifest = read_manifest(folder)
    hf = folder / "hf" / "config.json"
    if hf.is_file():
        check_model(read_json(hf), hf_config, folder)
    saved = {} if manifest.kind == "weights" else read_state(folder)
    if saved.get("program") != program:
        if saved and choice.is_own and program != "rollout_only":
            raise UserError(
                f"{checkpoints_of(config)} holds checkpoints of {saved['program']}, not of "
                f"{program}; choose another run_dir, and that checkpoint as train.resume to start "
                "from its weights"
            )
        return Start(str(folder), "weights", notes=[*notes, f"starting from the weights {folder}"])
    changed = check_settings(saved["config"], config.model_dump(mode="json"), folder)
    notes.append(f"resuming at step {manifest.step} from {folder}")
    notes += [f"  changed since: {line}" for line in changed]
    return Start(str(folder), "training", manifest.step, choice.is_own, notes)


def _settled(
    config: Config, hf_config: dict[str, Any], program: Program, choice: Choice
) -> dict[str, Any]:
    """The fields of ``settle``'s Start; or, alone, its ``damage``."""
    try:
        return asdict(settle(config, hf_config, program, choice))
    except DamagedError as error:
        return {"damage": str(error)}


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a training checkpoint. Raises DamagedError where it is none."""
    state = read_json(folder / STATE_NAME)
    lacking = {"program", "config"} - state.keys()
    if lacking:
        raise DamagedError(f"{folder / STATE_NAME} is damaged: it lacks {sorted(lacking)}")
    return state


def read_json(path: Path) -> dict[str, Any]:
    """A checkpoint's JSON object. Raises DamagedError where it is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged: {error!s:.200}") from None
    if not isinstance(content, dict):
        raise DamagedError(f"{path} is damaged: it holds no object")
    return content


def _checked(manifest: Manifest) -> str:
    if not manifest.checksums:
        return (
            "it was written by release 0.1, without checksums: its content is taken as it is; the "
            "next checkpoint has them"
        )
    gigabytes = sum(manifest.files.values()) / 1e9
    return f"  {len(manifest.files)} files, {gigabytes:.3g} GB, compared with their checksums"


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
            hidden = hide(folder, "superseded")
            notes.append(f"{folder.name} lies after the chosen checkpoint; now {hidden.name}")
    return notes
