"""Where problems come from, and how they become prompts."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_rlsd.config.secrets import Named
from megatron_rlsd.config.section import Section

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
    environment: str | None = None
    """Which of ``environment.others`` answers the model on this source's questions; ``none``: a
    response is one turn. Default: ``environment.name`` does."""

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
