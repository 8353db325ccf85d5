"""Where problems come from, how they become prompts, and how answers are scored."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_rlsd.config.secrets import Named
from megatron_rlsd.config.section import OnError, Section

NAME = r"^[^\s/=]+$"
"""A source's name is part of a metric's, ``eval/NAME/greedy_pass@1``."""


class _Weighted(Section):
    """What every source has."""

    kind: str
    name: str | None = Field(None, pattern=NAME)
    """In metrics (``eval/NAME/...``) and tables; default: what tells the source from the others."""
    weight: float = Field(1.0, gt=0)
    """Share of prompts drawn from this source, relative to the others."""
    weight_schedule: list[tuple[int, Annotated[float, Field(ge=0)]]] = []
    """In place of ``weight``: [step, weight] pairs, such as ``[[0, 1.0], [200, 0.25]]``. Between
    two of them the weight goes in a straight line, after the last it stays. Steps are counted by
    the questions drawn, ``rollout.prompts_per_step`` each."""

    chat_template_kwargs: dict[str, Any] = {}
    """Variables of the chat template for this source's questions, over
    ``tokenizer.chat_template_kwargs``, such as ``enable_thinking: false``."""

    @model_validator(mode="after")
    def _check_schedule(self) -> _Weighted:
        steps = [step for step, _ in self.weight_schedule]
        if steps and (steps[0] < 0 or steps != sorted(set(steps))):
            raise ValueError(f"weight_schedule needs steps from 0 that rise, got {steps}")
        if steps and "weight" in self.model_fields_set and self.weight != 1:
            raise ValueError("weight and weight_schedule are two ways to say the same; give one")
        return self

    def weight_at(self, step: float) -> float:
        """The weight where the stream has come to ``step``."""
        points = self.weight_schedule
        if not points:
            return self.weight
        for (begin, before), (end, after) in pairwise(points):
            if begin <= step < end:
                return before + (after - before) * (step - begin) / (end - begin)
        return points[0][1] if step < points[0][0] else points[-1][1]


class ColumnsConfig(Section):
    """Which column of a file each field of a problem is read from (``extra_info.answer``: a field
    inside of one). Columns that are named here for no field are not read."""

    prompt: str | None = None
    """Text, or a list of messages."""
    messages: str | None = None
    answer: str | None = None
    reference_solution: str | None = None
    metadata: str | list[str] | None = None
    """An object, or text that is a JSON object; of several columns each is an entry by its name."""
    id: str | None = None


class _FileSource(_Weighted):
    """What every source that is read from files has."""

    path: str
    layout: Literal["auto", "own", "verl", "trl"] = "auto"
    """How the columns are called: ``own`` (docs/guide.md), ``verl`` (prompt, reward_model,
    extra_info, data_source), ``trl`` (a prompt of messages; answer, ground_truth or solution).
    ``auto`` goes by the columns' names and types."""
    columns: ColumnsConfig = ColumnsConfig()
    """For fields whose column has another name than the layout says."""
    on_malformed: Literal["stop", "skip"] = "stop"
    """A malformed row stops the run, or is counted and skipped."""
    shuffle: bool = True


class JsonlSource(_FileSource):
    kind: Literal["jsonl"]


class ParquetSource(_FileSource):
    """A file, or all ``*.parquet`` of a folder in the order of their names."""

    kind: Literal["parquet"]


class HfSource(_FileSource):
    """A folder that ``save_to_disk`` of the datasets library wrote."""

    kind: Literal["hf"]
    split: str | None = None
    """Which one, where the folder holds several."""


FileSource = JsonlSource | ParquetSource | HfSource


class ReasoningGymSource(_Weighted):
    kind: Literal["reasoning_gym"]
    task: str
    params: Named = {}
    """Difficulty settings of the task, passed to reasoning_gym.create_dataset."""
    size: int = Field(100_000, ge=1)
    """Number of distinct problems."""
    seed: int = 0
    """Seed of the generated problems; give training and evaluation different ones."""


class GuessingGameSource(_Weighted):
    """Problems of the environment of that name: a secret whole number from low to high."""

    kind: Literal["guessing_game"]
    low: int = 1
    high: int = 100
    size: int = Field(100_000, ge=1)
    """Number of problems; the same secret may come several times."""
    seed: int = 0
    """Seed of the secrets; give training and evaluation different ones."""

    @model_validator(mode="after")
    def _check_range(self) -> GuessingGameSource:
        if self.low >= self.high:
            raise ValueError(
                f"guessing_game needs low < high, got low={self.low} and high={self.high}"
            )
        return self


Source = Annotated[
    FileSource | ReasoningGymSource | GuessingGameSource, Field(discriminator="kind")
]


class CurriculumConfig(Section):
    """Questions that have become easy are asked less."""

    easy_threshold: float | None = Field(None, gt=0, le=1)
    """A question of whose samples at least this share was solved when it was last asked is easy;
    null: no question is."""
    easy_fraction: float = Field(0.1, ge=0, le=1)
    """Share of its turns at which an easy question is asked again. One whose samples are no longer
    solved then is not easy any more."""


class DataConfig(Section):
    train: list[Source] = Field(min_length=1)
    eval: list[Source] = []
    curriculum: CurriculumConfig = CurriculumConfig()

    @model_validator(mode="after")
    def _some_source_has_weight(self) -> DataConfig:
        steps = {0, *(step for each in self.train for step, _ in each.weight_schedule)}
        for step in sorted(steps):
            if not any(each.weight_at(step) for each in self.train):
                raise ValueError(f"no source of data.train has a weight at step {step}")
        return self


class PromptConfig(Section):
    """How a problem becomes the student's and the teacher's prompt (over the chat template)."""

    system: str | None = None
    format_instruction: str = ""
    """Appended to the question on its own line; kept word for word in the teacher's prompt."""
    hint_introduction: str = "Here is a reference solution to this problem:"
    hint_request: str = "Now solve the problem in your own way."
    sft_response: str = "{reference_solution}"
    """Supervised target; may use {reference_solution} and {answer}. The stop token is appended."""
    max_prompt_tokens: int = Field(2048, ge=1)
    """Longer student prompts are left out and counted."""
    max_hint_tokens: int = Field(2048, ge=1)
    """The hint is cut to its first so many tokens."""


class RewardFunctionConfig(Section):
    name: str
    """A registered reward (exact_match, choice, math_verify, reasoning_gym, format, length,
    environment) or ``path/to/file.py:function``."""
    weight: float = 1.0
    params: Named = {}
    deterministic: bool = False
    """It says the same of the same response every time. Where all functions do, a response to a
    question that was scored before is not scored again: for judges whose calls are dear."""


class RewardConfig(Section):
    functions: list[RewardFunctionConfig] = Field(min_length=1)
    timeout_seconds: float = Field(10.0, gt=0)
    """Limit of one call; a call that passes it gives no value and its worker is replaced."""
    workers: int = Field(2, ge=1)
    on_error: OnError = "leave_out"
    """What an exception or a value that is not a finite number does: the response has no verdict
    and is left out of its group's comparison, or the run stops."""
    max_error_share: float = Field(0.5, ge=0, le=1)
    """With on_error=leave_out the run still stops when more than this share of a step's calls
    fail."""
    min_verdict_share: float = Field(0.5, ge=0, le=1)
    """A group of which a smaller share has a verdict, or one response alone, is left out, and
    another question asked in its place at most ``algorithm.max_refills`` times."""
    correctness: str | None = None
    """The function that says whether a response is right: it decides what counts as solved, which
    groups the group filter leaves out, and which responses may be hints. A name among
    ``functions``, or its name in metrics (``function`` of ``path/to/file.py:function``, ``#2`` on
    from the second use); None: the first."""
    solved_threshold: float = 0.999
    """A response counts as solved if that function returns at least this."""

    @property
    def labels(self) -> list[str]:
        """What metrics call each function: of ``path/to/file.py:function`` its ``function``.

        Of files with functions of one name ``file.function``; ``#2`` on from a label's second use.
        """
        names = [function.name for function in self.functions]
        own = {name: name.rpartition(":")[2] for name in names}
        shared = Counter(own.values())
        uses: Counter[str] = Counter()
        labels = []
        for name in names:
            label = own[name]
            if shared[label] > 1 and label != name:
                label = f"{PurePath(name.rpartition(':')[0]).stem}.{label}"
            uses[label] += 1
            labels.append(label if uses[label] == 1 else f"{label}#{uses[label]}")
        return labels

    @property
    def correctness_label(self) -> str:
        if self.correctness is None:
            return self.labels[0]
        # As it is configured, or as metrics call it.
        names = [function.name for function in self.functions]
        configured = self.correctness in names and self.correctness not in self.labels
        return self.labels[names.index(self.correctness)] if configured else self.correctness

    @model_validator(mode="after")
    def _correctness_is_a_function(self) -> RewardConfig:
        if self.correctness_label not in self.labels:
            raise ValueError(
                f"correctness={self.correctness!r} is none of the functions: "
                f"{', '.join(self.labels)}"
            )
        return self
