"""Make one recorded update again, without data, rewards or rollouts, at any layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_rlsd.actor.actor import Actor
from megatron_rlsd.checkpoint.checkpointer import Checkpointer, TrainingState
from megatron_rlsd.checkpoint.manifest import read_manifest, whole_checkpoints
from megatron_rlsd.checkpoint.start import Start, checkpoints_of, read_state
from megatron_rlsd.checkpoint.verify import verify
from megatron_rlsd.config import Config, TeacherServerConfig
from megatron_rlsd.hf_bridge import family_for, load_hf_config
from megatron_rlsd.learner import Learner
from megatron_rlsd.parallel.groups import parallel_world
from megatron_rlsd.recovery.recording import BAD_STEPS, RecordedStep, read_step
from megatron_rlsd.runtime.errors import UserError


@dataclass(frozen=True)
class Replayed:
    """The same on every rank."""

    recorded: RecordedStep
    metrics: dict[str, float]
    rank: int


def replay(config: Config, step: int, checkpoint: Path | None = None) -> Replayed:
    """Run the update of ``step`` from its recording, at the layout of ``config``.

    It starts at the weights of ``checkpoint``, else of the run's best one, else of model.hf_path;
    recorded updates between them and ``step`` are made first. Nothing is written. Where the
    algorithm compares distributions the teacher reads the responses again, with the weights that it
    had: its hidden states are too many to be recorded. Where settings need the log-probabilities of
    the policy before the update and none were recorded, that policy scores the responses again.

    Raises UserError when the step, or one needed on the way, was not recorded, when such a
    teacher's weights are not known, and when settings need other scores that were not recorded.
    """
    run_dir = Path(config.run_dir)
    recorded = read_step(run_dir, step)
    folder, first = choose_base(config, step, checkpoint)
    before = [read_step(run_dir, earlier) for earlier in range(first, step)]
    distils = bool(config.algorithm.divergence_coef)
    if distils:
        _check_teacher_is_known(config, folder, first)
    else:  # recorded scores take the teacher's place
        teacher = config.teacher.model_copy(
            update={"mode": "live", "hf_path": None, "sglang": TeacherServerConfig()}
        )
        config = config.model_copy(update={"teacher": teacher})
    hf_config = load_hf_config(config.model.hf_path)
    family = family_for(hf_config)
    with parallel_world(
        config.parallel,
        family.dims(hf_config),
        timeout_seconds=config.distributed.timeout_seconds,
        seed=config.train.seed,
    ) as groups:
        actor = Actor(config, family, hf_config, groups, config.total_updates)
        learner = Learner(config, actor)
        if folder is not None:
            manifest = read_manifest(folder)
            if damage := verify(folder, manifest, groups.control):
                raise UserError(damage)
            state = TrainingState(actor, learner.snapshots() if distils else {}, dict)
            Checkpointer(config, groups).load(state, Start(str(folder), manifest.kind))
        for each in (*before, recorded):
            plan = learner.plan(each.batch, each.step, each.rlsd_lambda)
            metrics = learner.update(plan, learner.score_again(plan, each.scores))
            learner.teacher.after_step(each.step)
        return Replayed(recorded, metrics, groups.rank)


def _check_teacher_is_known(config: Config, folder: Path | None, first: int) -> None:
    """A teacher that follows the student moves in bad steps too, which a checkpoint's weights do
    not show."""
    follows = config.teacher.mode in ("periodic", "ema")
    if folder is not None and follows and read_manifest(folder).step != first:
        raise UserError(
            f"the weights of the teacher (teacher.mode={config.teacher.mode}) before step {first} "
            f"are not known: {folder} holds those after {read_manifest(folder).step} steps"
        )


def choose_base(config: Config, step: int, checkpoint: Path | None) -> tuple[Path | None, int]:
    """A checkpoint to start from (None: model.hf_path) and the first step to run from there.

    The weights after S steps, of which the last K were bad and changed nothing, are those before
    every step from S - K to S.
    """
    run_dir = Path(config.run_dir)
    given = [checkpoint] if checkpoint is not None else _checkpoints(config, run_dir)
    firsts = {folder: _first_step(folder, step) for folder in given}
    best: tuple[Path | None, int] | None = max(
        ((folder, first) for folder, first in firsts.items() if first is not None),
        key=lambda item: item[1],
        default=None,
    )
    if best is None and checkpoint is not None:
        raise UserError(
            f"{checkpoint} holds the weights after {read_manifest(checkpoint).step} steps; step "
            f"{step} needs earlier ones"
        )
    if best is None:
        if config.train.resume not in ("auto", "never"):
            raise UserError(
                f"no checkpoint in {run_dir} is from step {step} or earlier; name one with "
                "--checkpoint"
            )
        best = (None, 0)
    missing = []
    for earlier in range(best[1], step):
        try:
            read_step(run_dir, earlier)
        except UserError:
            missing.append(earlier)
    if missing:
        raise UserError(
            f"the weights before step {step} are not known: the nearest are those before step "
            f"{best[1]} ({best[0] or config.model.hf_path}), and steps {missing} were not recorded "
            "(train.record_steps=all records every step)"
        )
    return best


def _checkpoints(config: Config, run_dir: Path) -> list[Path]:
    found = [folder for folder, _ in whole_checkpoints(checkpoints_of(config))]
    stopped = run_dir / BAD_STEPS / "checkpoint"
    try:
        read_manifest(stopped)
    except UserError:
        return found
    return [*found, stopped]


def _first_step(folder: Path, wanted: int) -> int | None:
    """The first step to run from a checkpoint in order to reach ``wanted``; None: it is past it."""
    manifest = read_manifest(folder)
    done, unchanged = manifest.step, 0
    if manifest.kind == "training":
        unchanged = read_state(folder)["consecutive_bad_steps"]
    if wanted < done - unchanged:
        return None
    return min(done, wanted)
