"""The run's log, written on rank 0; on other ranks the same object does nothing."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from megatron_rlsd.config import ObservabilityConfig, flattened
from megatron_rlsd.observability.display import Display, StepLine, make_display, span
from megatron_rlsd.observability.gpu_memory import memory_metrics
from megatron_rlsd.observability.metrics_file import (
    EVALUATION_PREFIX,
    NO_METRICS,
    MetricsFile,
    finite_or_none,
    is_evaluation,
    keep_before,
    move_aside,
)
from megatron_rlsd.observability.profiler import StepProfiler
from megatron_rlsd.observability.progress import PROGRESS_NAME, Progress
from megatron_rlsd.observability.run_warnings import WARNINGS_NAME, RunWarnings
from megatron_rlsd.observability.samples import drop_samples_from, write_samples
from megatron_rlsd.observability.tables import evaluation_table, phase_lines, summary_table
from megatron_rlsd.observability.trace import Gather, PhaseTrace
from megatron_rlsd.observability.trackers import Tracker, build_trackers
from megatron_rlsd.runtime.warn import warn
from megatron_rlsd.types import Group

BETWEEN_STEPS = ("evaluation", "checkpoint")
"""Phases that no step's own time counts."""
STEPS_FOR_TIME_LEFT = 20


PHASE_TOKENS = {
    "rollout": "rollout/response_tokens",
    "score": "score/tokens",
    "update": "train/tokens",
}
"""Phase -> the metric that counts the tokens it worked on."""
EARLY_SCORE = "early_score"
"""Scoring within a rollout, while others are being sampled; its tokens are the score's."""


class MetricsLogger:
    """Metrics, samples and progress of one run, in ``run_dir``; a context manager.

    ``step`` numbers count from 0, as the training loop does; an evaluation's step is the number of
    steps done before it. With ``resume_step`` (the first step to be run) the lines of earlier steps
    are kept and later ones dropped; without it, what an earlier run left in ``run_dir`` is moved
    aside to metrics.jsonl.1, samples.1, tensorboard.1, trace.1 and warnings.jsonl.1.
    ``enabled=False`` (every rank but 0) writes and shows nothing; only a trace and a profile are
    made on other ranks too.

    ``gather`` brings every rank's bytes to rank 0, for a trace and the GPUs' memory (None: there is
    one rank only); ``step`` and ``summary`` are then collective. ``settings`` is the configuration,
    shown by trackers. ``derive`` makes further metrics of a step's.

    progress.json says meanwhile what the run does (``Progress``).
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: ObservabilityConfig,
        total_steps: int,
        resume_step: int | None = None,
        enabled: bool = True,
        *,
        rank: int = 0,
        gather: Gather | None = None,
        settings: dict[str, Any] | None = None,
        derive: Callable[[Mapping[str, float]], Mapping[str, float]] = lambda _: {},
    ) -> None:
        run_dir = Path(run_dir)
        self.metrics_path = run_dir / "metrics.jsonl"
        self.samples_dir = run_dir / "samples"
        self.tensorboard_dir = run_dir / "tensorboard"
        self._run_dir = run_dir
        self._config = config
        self._settings = settings or {}
        self._gather: Gather = gather or (lambda payload: [payload])
        self._derive = derive
        self._trace: PhaseTrace | None = None
        if config.trace:
            self._trace = PhaseTrace(run_dir / "trace" / "trace.json", self._gather)
        profiled = config.profile_steps if rank in config.profile_ranks else ()
        self._profiler = StepProfiler(run_dir / "profile", profiled, rank)
        self._next_step = resume_step or 0
        self._in_step = False
        self._total_steps = total_steps
        self._resume_step = resume_step
        self._enabled = enabled
        self._display: Display = Display()
        self._line = StepLine(total_steps)
        self._progress: Progress | None = None
        self._start_part: tuple[str, float] | None = None
        self._file: MetricsFile | None = None
        self._trackers: list[Tracker] = []
        self._warnings = RunWarnings(
            run_dir / WARNINGS_NAME, lambda line: self._display.warn(line), lambda: self._next_step
        )
        self._steps: list[dict[str, float | None]] = []
        self._evaluations: list[dict[str, float]] = []
        self._phases: list[str] = []
        self._step_phases: defaultdict[str, float] = defaultdict(float)
        self._run_phases: defaultdict[str, float] = defaultdict(float)
        self._run_start = time.monotonic()
        self._step_start: float | None = None
        self._step_ends: list[float] = []

    def __enter__(self) -> MetricsLogger:
        if not self._enabled:
            return self
        self._run_dir.mkdir(parents=True, exist_ok=True)
        moved: list[Path] = []
        if self._resume_step is None:
            moved = self._move_earlier_run_aside()
        else:
            self._take_up_earlier_run(self._resume_step)
        self._file = MetricsFile(self.metrics_path)
        self._run_start = time.monotonic()
        self._display = make_display(
            self._config.progress, self._total_steps, done=self._resume_step or 0
        )
        self._progress = Progress(
            self._run_dir / PROGRESS_NAME, self._total_steps, self._resume_step or 0
        )
        self._warnings.__enter__()
        try:
            self._trackers = build_trackers(
                self._config, self._run_dir, self._settings, self._resume_step
            )
        except BaseException:
            self._progress.close()
            self._warnings.__exit__()
            raise
        if moved:
            names = ", ".join(path.name for path in moved)
            self._display.show(f"{self._run_dir} holds an earlier run, now moved to {names}")
        return self

    def __exit__(self, _: object, error: BaseException | None, *trace: object) -> None:
        if self._enabled:
            self._warnings.__exit__()
        if self._progress is not None:
            self._progress.close()
        self._display.close()
        self._profiler.end()
        for tracker in self._trackers:
            tracker.close(failed=error is not None)
        if self._file is not None:
            self._file.close()

    def rewind(self, resume_step: int) -> None:
        """The run resumes at an earlier step than was said: what was written from there is dropped,
        as when the logger is entered."""
        if self._enabled:
            self.__exit__(None, None)
            self._steps, self._evaluations = [], []
            self._resume_step = self._next_step = resume_step
            self.__enter__()

    def starting(self, part: str) -> None:
        """The start-up has come to ``part``, which lasts until the next one or the first phase."""
        if self._enabled:
            self._end_start()
            self._start_part = (f"start: {part}", time.monotonic())
            self._display.starting(part)
            if self._progress is not None:
                self._progress.phase(f"start: {part}")

    def _end_start(self) -> None:
        if self._start_part is not None:
            name, since = self._start_part
            self._run_phases[name] += time.monotonic() - since
            self._start_part = None

    def count(self, done: int, total: int, unit: str) -> None:
        """The phase under way has come to ``done`` of ``total`` ``unit``s; in any thread."""
        if self._progress is not None:
            self._display.phase(self._progress.count(done, total, unit))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of a step as ``time/<name>_s``, summed over its occurrences in that step.

        A step's own time starts with its first phase that is not one of BETWEEN_STEPS.
        """
        if not self._in_step and name not in BETWEEN_STEPS:
            self._in_step = True
            self._profiler.begin(self._next_step)
        traced = self._trace.phase(name, self._next_step) if self._trace else nullcontext()
        with traced, self._timed(name) if self._enabled else nullcontext():
            yield

    def span(self, name: str, step: int, started: int, duration: int, lane: int) -> None:
        """Something beside the phases, for the trace alone; see PhaseTrace.span."""
        if self._trace is not None:
            self._trace.span(name, step, started, duration, lane)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        self._end_start()
        start = time.monotonic()
        if self._step_start is None and name not in BETWEEN_STEPS:
            self._step_start = start  # nor does the start-up belong to the step
        inner = bool(self._phases)
        self._phases.append(name)
        self._show_phase()
        try:
            yield
        finally:
            seconds = time.monotonic() - start
            self._step_phases[name] += seconds
            if not inner:  # a phase within another is part of the outer one's share
                self._run_phases[name] += seconds
            self._phases.pop()
            self._show_phase()

    def _show_phase(self) -> None:
        name = self._phases[-1] if self._phases else None
        self._display.phase(name)
        if self._progress is not None:
            self._progress.phase(name)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log step number ``step`` (from 0); adds the times since the step before.

        Adds ``time/step_s``, ``time/<phase>_s`` (that of an evaluation or a checkpoint before the
        step too) and, unless given, ``perf/tokens_per_second``: the step's sampled tokens
        (``rollout/response_tokens``), or else trained ones (``train/tokens``), over its time; and
        ``perf/<phase>_tokens_per_second`` for the phases of PHASE_TOKENS; ``memory/...`` where
        there are GPUs; and what ``derive`` makes of all that.
        Raises TypeError for a metric that is not a number.
        """
        self._profiler.end()
        self._in_step, self._next_step = False, step + 1
        if self._trace is not None:
            self._trace.flush()
        memory = memory_metrics(self._gather)
        if not self._enabled:
            return
        now = time.monotonic()
        last_end = self._step_ends[-1] if self._step_ends else self._run_start
        seconds = now - (last_end if self._step_start is None else self._step_start)
        self._step_ends.append(now)
        timed = {"time/step_s": seconds}
        timed |= {f"time/{name}_s": spent for name, spent in self._step_phases.items()}
        values = memory | timed | _as_numbers(metrics)
        tokens = values.get("rollout/response_tokens", values.get("train/tokens"))
        if tokens is not None and seconds > 0:
            values.setdefault("perf/tokens_per_second", tokens / seconds)
        for name, counted in PHASE_TOKENS.items():
            phases = (name, EARLY_SCORE) if name == "score" else (name,)
            # A phase that did not run took no time.
            spent = sum(values[key] for p in phases if (key := f"time/{p}_s") in values)
            if counted in values and spent > 0:
                values[f"perf/{name}_tokens_per_second"] = values[counted] / spent
        values |= self._derive(values)
        self._write(step, values)
        self._steps.append({name: finite_or_none(value) for name, value in values.items()})
        pace = self._recent_seconds_per_step(seconds)
        left = max(0, self._total_steps - step - 1) * pace
        self._display.step(step + 1, self._line(step + 1, values, seconds, left), span(left))
        if self._progress is not None:
            self._progress.step(step + 1, pace, left)
        self._step_phases.clear()
        self._step_start = None

    def evaluation(self, step: int, results: Mapping[str, Any]) -> None:
        """Log an evaluation made after ``step`` steps as ``eval/<name>``, and show it.

        ``results``: numbers by name, or by source and name (nested mappings).
        """
        if not self._enabled:
            return
        values = _as_numbers(flattened(results, "/"))
        self._write(step, {f"{EVALUATION_PREFIX}{name}": value for name, value in values.items()})
        self._evaluations.append(values)
        self._display.show(evaluation_table(step, values, self._evaluations[0]))

    def samples(
        self, step: int, groups: list[Group], decode: Callable[[list[int]], str] | None = None
    ) -> None:
        """Write the step's first ``samples_per_step`` groups to samples/step_<step>.jsonl.

        With ``decode`` (token ids to text) token by token too.
        """
        count = self._config.samples_per_step
        if self._enabled and count and groups:
            write_samples(self.samples_dir, step, groups[:count], decode)

    def summary(self) -> None:
        """Show how the run went and where its files are."""
        if self._trace is not None:
            self._trace.flush()  # an evaluation after the last step
        if not self._enabled:
            return
        first, last = (self._evaluations[i] if self._evaluations else {} for i in (0, -1))
        self._display.show(summary_table(self._steps, first, last))
        lines = phase_lines(time.monotonic() - self._run_start, self._run_phases)
        for name in ("rollout/response_tokens", "train/tokens"):
            if total := sum(step.get(name) or 0 for step in self._steps):
                lines.append(f"{name} in all: {total:,.0f}")
        if self._warnings.count:
            lines.append(f"warnings     {self._warnings.count}, see {self._warnings.path}")
            lines += [f"  {text}" for text in self._warnings.latest]
        lines.append(f"metrics      {self.metrics_path}")
        for name in ("samples", "tensorboard", "wandb", "mlflow", "trace", "profile"):
            if (self._run_dir / name).exists():
                lines.append(f"{name:<12} {self._run_dir / name}")
        self._display.show("\n".join(lines))

    def _recent_seconds_per_step(self, last_step_seconds: float) -> float:
        """From end to end, so that evaluations in between are part of the time left."""
        ends = self._step_ends[-STEPS_FOR_TIME_LEFT - 1 :]
        return (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else last_step_seconds

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self._file is None:
            raise RuntimeError("MetricsLogger is used outside its `with` block")
        self._file.append(step, values)
        finite = {name: v for name, v in values.items() if finite_or_none(v) is not None}
        for tracker in list(self._trackers):
            try:
                tracker.write(step, finite)
            except Exception as error:  # metrics.jsonl has it all: no reason to stop the run
                self._trackers.remove(tracker)
                warn(f"{type(tracker).__name__} is given up at step {step}: {error}")

    def _move_earlier_run_aside(self) -> list[Path]:
        if not self.metrics_path.exists() or not self.metrics_path.stat().st_size:
            return []
        others = [self._run_dir / "trace", self._warnings.path]
        return move_aside([self.metrics_path, self.samples_dir, self.tensorboard_dir, *others])

    def _take_up_earlier_run(self, resume_step: int) -> None:
        for record in keep_before(self.metrics_path, resume_step):
            values = {k: v for k, v in record.items() if k not in NO_METRICS}
            if is_evaluation(values):
                named = {k.removeprefix(EVALUATION_PREFIX): v for k, v in values.items()}
                self._evaluations.append({k: v for k, v in named.items() if v is not None})
            else:
                self._steps.append(values)
        drop_samples_from(self.samples_dir, resume_step)


def _as_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
            raise TypeError(f"metric {name!r} must be a number, got {value!r:.80}")
        numbers[name] = value if type(value) is int else float(value)
    return numbers
