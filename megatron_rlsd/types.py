"""The data that moves through a training step: problem -> generation -> trajectory -> group.

Token ids, masks and log-probabilities that are kept are numpy arrays; tensors appear only where a
pass over the model is packed (``megatron_rlsd.actor.packing``). Log-probabilities are natural
logarithms taken at the sampling temperature, log_softmax(logits / temperature).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    IntArray = NDArray[np.int32]
    FloatArray = NDArray[np.float32]
    BoolArray = NDArray[np.bool_]

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Problem:
    """One question with what its verifier and its privileged teacher need."""

    id: str
    """Stable and unique within its source, e.g. ``gsm_symbolic/41`` or ``train.jsonl:17``."""
    messages: tuple[dict[str, str], ...]
    """Chat messages, each with ``role`` and ``content``; the last one is the user's question."""
    answer: str
    """The final answer that the verifier compares with."""
    reference_solution: str | None = None
    """A worked solution: privileged information, never part of the student's prompt."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Free JSON data of the source (a reasoning-gym scorer reads its entry from here)."""
    source: str = ""
    """Name of the source, used to group evaluation results."""
    demonstration: tuple[dict[str, str], ...] = ()
    """Messages after the question for the supervised warm start to imitate: turns of the assistant,
    and between two of them what answered the first. Empty for a problem to be solved."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """The source's variables for the chat template, over those of the configuration."""
    environment: str | None = None
    """Which of ``environment.others`` answers the model; ``none``: nothing does; None:
    ``environment.name`` does."""
    privileged: bool | None = None
    """Is it a demonstration whose author knew the hint, to be imitated under the privileged
    prompt? None: ``sft.privileged_share`` decides."""


@dataclass(frozen=True)
class SamplingParams:
    """How one response is sampled. ``temperature`` 0 is greedy."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    """Nucleus mass in (0, 1]; 1 keeps the whole vocabulary."""
    top_k: int = 0
    """Candidates kept; 0 keeps the whole vocabulary."""
    stop_token_ids: tuple[int, ...] = ()
    """Generation ends after any of these; the stop token is part of the response."""


@dataclass(frozen=True)
class GenerationRequest:
    """One response wanted for one tokenised prompt."""

    prompt_ids: list[int]
    """[P] token ids, P >= 1."""
    params: SamplingParams
    seed: int
    """Fixes the sampled tokens given the weights, whatever else is in the batch."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Generation:
    """The answer of an engine to one request."""

    token_ids: IntArray
    """[T] int32 sampled tokens, the stop token included when finish_reason is ``stop``. Of an
    episode of several turns: the turns with the environment's tokens between them."""
    log_probs: FloatArray
    """[T] float32 log_softmax(logits / temperature) of each sampled token over the *whole*
    vocabulary (top-p and top-k do not renormalise it; greedy decoding reports it at temperature
    1)."""
    finish_reason: FinishReason
    weight_version: int
    """Version of the weights that sampled the first token (0: the initial weights)."""
    token_versions: IntArray | None = None
    """[T] int32 version for each token, never falling, where weights were updated while the
    response was under way. None: ``weight_version`` for all."""
    routed_experts: Tensor | None = None
    """[P + T - 1, layers, experts per token] int16: the experts that each token took in each layer,
    prompt included, the last token not (nothing was computed from it). Anything in layers without
    experts; -1 where it is not known. None: not asked for."""
    loss_mask: BoolArray | None = None
    """[T] True: the policy sampled the token, False: an environment wrote it, and its log_prob
    means nothing. None: the policy sampled all."""

    @classmethod
    def of(
        cls,
        token_ids: Sequence[int],
        log_probs: Sequence[float],
        finish_reason: FinishReason,
        weight_version: int,
        *,
        token_versions: Sequence[int] | None = None,
        loss_mask: Sequence[int] | None = None,
        routed_experts: Tensor | None = None,
    ) -> Generation:
        """A generation from any numbers."""
        import numpy as np  # this module is also read where no array is ever made

        return cls(
            token_ids=np.asarray(token_ids, np.int32),
            log_probs=np.asarray(log_probs, np.float32),
            finish_reason=finish_reason,
            weight_version=weight_version,
            token_versions=None if token_versions is None else np.asarray(token_versions, np.int32),
            routed_experts=routed_experts,
            loss_mask=None if loss_mask is None else np.asarray(loss_mask, np.bool_),
        )

    @property
    def num_own_tokens(self) -> int:
        """Tokens that the policy sampled."""
        return len(self.token_ids) if self.loss_mask is None else int(self.loss_mask.sum())


@dataclass(frozen=True)
class RewardInput:
    """The part of one response that a reward function sees."""

    problem: Problem
    response: str
    """The decoded response, special tokens left out; of several turns the last one."""
    num_tokens: int
    """The tokens of the whole trajectory after the prompt, an environment's included."""
    max_tokens: int
    finish_reason: FinishReason
    transcript: tuple[dict[str, str], ...] = ()
    """With an environment: the messages after the prompt in order, each with ``role`` (assistant:
    the model) and ``content``."""
    environment_reward: float | None = None
    """The sum of the environment's own rewards; None without an environment."""
    turn: str | None = None
    """The assistant's turn as the model had it, where ``response`` is only a part of that: what the
    chat template wrote at its beginning (such as ``<think>``), then the response with its special
    tokens, but for the stop token. None: the same as ``response``."""

    @property
    def texts(self) -> tuple[str, ...]:
        """The response; and the whole turn, where that is another text."""
        return (self.response,) if self.turn is None else (self.response, self.turn)


@dataclass(frozen=True)
class RewardResult:
    """The verdict on one response: the weighted sum of the reward functions."""

    value: float | None
    """None: there is no verdict, because a function whose weight is not 0 gave no value."""
    parts: dict[str, float | None]
    """Each function's own value before its weight; None: it gave none."""
    errors: dict[str, str] = field(default_factory=dict)
    """Function name -> why it gave no value: an exception, a time-out, no finite number."""
    timed_out: tuple[str, ...] = ()
    """Those among ``errors`` that a time limit brought."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenCredit:
    """Values that the update made of each response token, kept for the sample dump.

    All [T] float32; NaN where the update did not score the token (a trajectory without advantage,
    an environment's token) or, for the teacher's two, where the teacher did not.
    """

    log_probs: FloatArray
    """The policy's log-probability at the first update that used the token."""
    teacher_log_probs: FloatArray
    gain: FloatArray
    """Privileged information gain: teacher_log_probs - log_probs."""
    evidence_weight: FloatArray
    """exp(sign(A) gain) before its clip; 1 where the teacher did not score the token."""
    advantages: FloatArray
    """A^, the advantage that the loss gave the token."""
    entropy: FloatArray
    """The policy's entropy at the token, in nats."""


@dataclass(kw_only=True, eq=False)
class Trajectory:
    """One sampled response on its way through reward, advantage and update."""

    problem: Problem
    prompt_ids: IntArray
    """[P] int32, the student's prompt."""
    generation: Generation
    """The response and the engine's log-probabilities."""
    teacher_prompt_ids: IntArray | None = None
    """[P'] int32, the privileged prompt; P' differs from P. None: there is no hint for this
    response."""
    response_text: str = ""
    """All response tokens decoded."""
    turn: str | None = None
    """As in RewardInput: of several turns the last one."""
    reward: RewardResult | None = None
    solved: bool | None = None
    """Is the response right, as ``reward.correctness`` says? None: not known."""
    advantage: float = 0.0
    token_advantages: FloatArray | None = None
    """[T] float32, the advantages of single tokens. None: ``advantage`` is every token's, as in the
    later rows of an episode."""
    contrast_prompts: tuple[IntArray, ...] = ()
    """[P''] int32 each: the prompts with wrong hints. Empty: there is none, or none is asked
    for."""
    hint_cut: bool = False
    """The teacher's prompt, or one with a wrong hint, holds only the beginning of the hint."""
    evidence_span: tuple[int, int] | None = None
    """Tokens [start, stop) that the evidence weight may touch; None: all."""
    credit: TokenCredit | None = None
    """Set on rank 0, after the update, for the trajectories that are dumped."""
    transcript: tuple[dict[str, str], ...] = ()
    """As in RewardInput."""
    environment_reward: float | None = None
    environment_error: str = ""
    """Why the environment ended the episode, if it failed; there is no verdict then."""
    further: tuple[Trajectory, ...] = ()
    """Where an agent changed its history: the episode's other training rows. Each has the tokens
    and prompts of its own part, and nothing else of the episode: its reward, its advantage and what
    is known of it stand here. ``prompt_ids``, ``generation``, ``teacher_prompt_ids``,
    ``contrast_prompts``, ``evidence_span`` and ``credit`` here are the first row's."""

    @property
    def rows(self) -> tuple[Trajectory, ...]:
        """The parts that are training rows, in the order in which they began."""
        return (self, *self.further)

    @property
    def num_own_tokens(self) -> int:
        """Tokens that the policy sampled, in all rows."""
        return sum(row.generation.num_own_tokens for row in self.rows)

    @property
    def has_verdict(self) -> bool:
        """Was the response judged?"""
        return self.reward is not None and self.reward.value is not None

    @property
    def own_text(self) -> str:
        """What the policy wrote, without an environment's answers."""
        if not self.transcript:
            return self.response_text
        return "\n".join(m["content"] for m in self.transcript if m["role"] == "assistant")

    @property
    def texts(self) -> tuple[str, ...]:
        """``own_text``; and the last turn as a whole, where that is another text."""
        return (self.own_text,) if self.turn is None else (self.own_text, self.turn)

    @property
    def told(self) -> str:
        """The response as one text for a reader; of several turns, who said what."""
        if not self.transcript:
            return self.response_text
        return "\n".join(f"{m['role']}: {m['content']}" for m in self.transcript)


@dataclass
class Group:
    """All responses to one question: the unit over which advantages are formed."""

    problem: Problem
    trajectories: list[Trajectory]

    @property
    def judged(self) -> Group:
        """The responses that have a verdict, whose rewards can be compared."""
        return Group(self.problem, [t for t in self.trajectories if t.has_verdict])

    @property
    def rewards(self) -> list[float]:
        """The rewards of the responses that have a verdict, in their order."""
        results = [t.reward for t in self.trajectories]
        return [r.value for r in results if r is not None and r.value is not None]


@dataclass(frozen=True, kw_only=True)
class RowOutline:
    """What every rank knows of a training row, whichever ranks hold its tokens."""

    prompt_tokens: int
    response_tokens: int
    trained_tokens: int
    """The sum of the row's loss mask."""
    advantage: float
    solved: bool | None
    teacher_prompt_tokens: int | None
    """None: there is no hint for this response."""
    contrast_prompt_tokens: tuple[int, ...]
    """The tokens of each prompt with a wrong hint."""
    has_evidence_span: bool
    episode: int | None = None
    """As in TrainRow."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainRow:
    """A trajectory as the update needs it, or a part of one. P prompt tokens, T response tokens,
    T >= 1."""

    prompt_ids: IntArray
    """[P] int32, P >= 1: the student's prompt."""
    response_ids: IntArray
    """[T] int32."""
    loss_mask: BoolArray
    """[T] True: the update and its means are over this token. False: it is context alone, because
    an environment wrote it, or because its response is left out (algorithm.mask_truncated)."""
    rollout_log_probs: FloatArray
    """[T] float32, the engine's. Means nothing where loss_mask is False."""
    advantage: float
    token_advantages: FloatArray | None = None
    solved: bool | None = None
    """Both as in Trajectory."""
    group_solved_share: float | None = None
    """Share of right responses among those of its group of which that is known; None: of none."""
    teacher_prompt_ids: IntArray | None = None
    """[P'] int32, the privileged prompt. None: there is no hint for this response."""
    contrast_prompts: tuple[IntArray, ...] = ()
    """[P''] int32 each: the prompts with wrong hints. Empty: there is none, or none is asked
    for."""
    evidence_span: tuple[int, int] | None = None
    """Tokens [start, stop) that the evidence weight may touch. None: all."""
    weight_versions: IntArray | None = None
    """[T] int32, of the weights that sampled each token. None: not known."""
    routed_experts: Tensor | None = None
    """As in Generation. None: the update routes by itself."""
    episode: int | None = None
    """Rows with the same number are parts of one trajectory, and weighed as one. None: the row is a
    whole trajectory."""

    @property
    def outline(self) -> RowOutline:
        """The row without its tokens."""
        teacher = self.teacher_prompt_ids
        return RowOutline(
            prompt_tokens=len(self.prompt_ids),
            response_tokens=len(self.response_ids),
            trained_tokens=int(self.loss_mask.sum()),
            advantage=self.advantage,
            solved=self.solved,
            teacher_prompt_tokens=None if teacher is None else len(teacher),
            contrast_prompt_tokens=tuple(map(len, self.contrast_prompts)),
            has_evidence_span=self.evidence_span is not None,
            episode=self.episode,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainBatch:
    """The rows of a training step, or of one group of it, each with a response token."""

    outlines: list[RowOutline]
    """[B] every row, on every rank."""
    rows: dict[int, TrainRow]
    """Row number -> the row, for the rows whose tokens this rank holds."""

    @classmethod
    def of(cls, rows: Sequence[TrainRow]) -> TrainBatch:
        """A batch that holds all of its rows here."""
        return cls(outlines=[row.outline for row in rows], rows=dict(enumerate(rows)))

    def __len__(self) -> int:
        return len(self.outlines)
