"""From a problem to the student's prompt, the teacher's privileged prompt and a supervised target.

The two prompts differ by the hint alone:

    student   [earlier messages]  question                                   format_instruction
    teacher   [earlier messages]  question  introduction  hint  hint_request  format_instruction
    hint alone  [system message]            introduction  hint  hint_request  format_instruction
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_rlsd.config import PromptConfig, TeacherConfig
from megatron_rlsd.data.probes import check_system
from megatron_rlsd.data.tokenizers import Tokenizer
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Problem

SFT_FIELDS = {"reference_solution", "answer"}


class PromptTooLong(UserError):
    """A student prompt is longer than ``prompts.max_prompt_tokens``, or than the model's positions
    with what follows it."""

    def __init__(self, problem_id: str, num_tokens: int, limit: Limit) -> None:
        super().__init__(
            f"the prompt of problem {problem_id} has {num_tokens} tokens, more than {limit.why}"
        )
        self.problem_id, self.num_tokens, self.max_tokens = problem_id, num_tokens, limit.tokens


@dataclass(frozen=True)
class Limit:
    """A limit on the tokens in a prompt."""

    tokens: int
    why: str
    """The setting, or the room, that it comes from, with its number."""


@dataclass(frozen=True)
class Privileged:
    """A teacher's prompt."""

    ids: list[int]
    """[P']; it is empty where not one word of the hint fits, or the user has said nothing."""
    hint_cut: bool
    """Does it hold only the beginning of the hint?"""


class PromptBuilder:
    """Builds token ids, generation prompt included, over the tokenizer's chat template.

    No prompt passes the model's ``positions`` (None: not known) with the tokens that follow it: by
    default ``max_response_tokens``.

    Raises UserError if ``prompts.sft_response`` uses fields that do not exist, and if the chat
    template hides ``prompts.system``.
    """

    def __init__(
        self,
        prompts: PromptConfig,
        teacher: TeacherConfig,
        tokenizer: Tokenizer,
        *,
        positions: int | None = None,
        max_response_tokens: int = 0,
    ) -> None:
        self._prompts, self._teacher, self._tokenizer = prompts, teacher, tokenizer
        self._positions, self._max_response_tokens = positions, max_response_tokens
        self._served: int | None = None
        self._sft_fields = _sft_fields(prompts.sft_response)
        if prompts.system is not None:
            check_system(tokenizer, prompts.system)

    @property
    def served(self) -> int | None:
        """Tokens of the longest student prompt that the engine answers; None: not known, or as many
        as the model has positions."""
        return self._served

    def serve_at_most(self, tokens: int) -> None:
        """What the engine says once it is there."""
        self._served = tokens

    def limit(self, following: int | None = None) -> Limit:
        """The limit on a student's prompt before ``following`` tokens (None: a whole response).

        Raises UserError if a whole response leaves no room for any.
        """
        most = self._prompts.max_prompt_tokens
        room = self._room(following)
        if following is None and room is not None and room < 1:
            raise UserError(
                f"rollout.max_response_tokens={self._max_response_tokens} leaves no room for a "
                f"prompt in the model's {self._positions} positions (max_position_embeddings)"
            )
        limits = [Limit(most, f"prompts.max_prompt_tokens={most}")]
        if room is not None:
            count = self._max_response_tokens if following is None else following
            leaves = f"the {room} that {count} tokens after it leave of the model's"
            why = f"{leaves} {self._positions} positions (max_position_embeddings)"
            limits.append(Limit(room, why))
        if (served := self._served) is not None:
            why = f"the {served} that a rollout server takes: its context, or what its cache holds"
            limits.append(Limit(served, why))
        return min(limits, key=lambda limit: limit.tokens)

    def student(self, problem: Problem, following: int | None = None) -> list[int]:
        """[P] ids of the question; PromptTooLong beyond ``limit(following)``."""
        return self._checked_student(problem, following)

    def teacher(self, problem: Problem, hint: str | None = None) -> list[int]:
        """[P'] the ids that ``privileged`` gives."""
        return self.privileged(problem, hint).ids

    def privileged(
        self, problem: Problem, hint: str | None = None, following: int | None = None
    ) -> Privileged:
        """The question and the hint; the student's prompt where there is no hint.

        ``hint`` None: the problem's own. It is cut to ``max_hint_tokens``, and to what the model's
        positions leave it beside ``following`` tokens. PromptTooLong if the student's prompt is.
        """
        student = self._checked_student(problem, following)
        whole = self._own_hint(problem) if hint is None else hint.strip()
        if not whole:
            return Privileged(student, hint_cut=False)
        if _question(problem) is None:  # of an agent's: nothing to put it behind
            return Privileged([], hint_cut=False)
        text = self._fitting(problem, whole, following)
        ids = self._hinted(problem, text) if text else []
        return Privileged(ids, hint_cut=text != whole)

    def hint_alone(self, problem: Problem, hint: str | None = None) -> list[int]:
        """The hint as ``privileged`` shows it, without the question; empty where it shows none.

        The system messages stay. ``hint``: as there.
        """
        whole = self._own_hint(problem) if hint is None else hint.strip()
        text = self._fitting(problem, whole, None) if whole else ""
        if not text:
            return []
        system = [message for message in problem.messages[:-1] if message["role"] == "system"]
        nothing = {"role": "user", "content": ""}
        return self._hinted(replace(problem, messages=(*system, nothing)), text)

    def hint(self, problem: Problem) -> str:
        """The problem's own privileged information, cut to ``max_hint_tokens``."""
        return self._cut(self._own_hint(problem))

    def _own_hint(self, problem: Problem) -> str:
        """The whole privileged information as ``teacher.hint`` asks for it.

        Empty with ``teacher.hint`` none, and for a problem that has nothing to tell. Hints that
        come with a group of responses (``teacher.hints``) are not a problem's own: its reference
        solution stands in for them, for the supervised warm start.
        """
        if self._teacher.hint == "none":
            return ""
        wants_solution = self._teacher.hint != "answer"
        solution = problem.reference_solution if wants_solution else None
        return (solution or problem.answer).strip()

    def sft_target(self, problem: Problem) -> list[int]:
        """[T] ids of the response to imitate, with the end-of-turn token.

        Raises UserError if ``prompts.sft_response`` uses a reference solution and there is none.
        """
        if "reference_solution" in self._sft_fields and problem.reference_solution is None:
            raise UserError(
                f"problem {problem.id} has no reference_solution, which prompts.sft_response uses"
            )
        text = self._prompts.sft_response.format(
            reference_solution=problem.reference_solution, answer=problem.answer
        )
        return [*self._tokenizer.encode(text), self._tokenizer.end_of_turn_id]

    def _room(self, following: int | None) -> int | None:
        """Tokens of a prompt that ``following`` tokens leave of the model's positions."""
        if self._positions is None:
            return None
        return self._positions - (self._max_response_tokens if following is None else following)

    def _checked_student(self, problem: Problem, following: int | None) -> list[int]:
        ids, limit = self._ids(problem, []), self.limit(following)
        if len(ids) > limit.tokens:
            raise PromptTooLong(problem.id, len(ids), limit)
        return ids

    def _fitting(self, problem: Problem, hint: str, following: int | None) -> str:
        """As much of the hint as fits beside the question and ``following`` tokens."""
        text, room = self._cut(hint), self._room(following)
        if room is None:
            return text
        return self._beginning(text, lambda part: len(self._hinted(problem, part)) <= room)

    def _hinted(self, problem: Problem, hint: str) -> list[int]:
        return self._ids(
            problem, [self._prompts.hint_introduction, hint, self._prompts.hint_request]
        )

    def _ids(self, problem: Problem, after_question: list[str]) -> list[int]:
        """Ids of the problem's messages with more paragraphs after the question."""
        at = _question(problem)
        if at is None:
            assert not after_question
            return self._render(problem, list(problem.messages))
        earlier, later = list(problem.messages[:at]), problem.messages[at + 1 :]
        if self._prompts.system is not None and not any(m["role"] == "system" for m in earlier):
            earlier.insert(0, {"role": "system", "content": self._prompts.system})
        said = problem.messages[at]["content"]
        paragraphs = [said, *after_question, self._prompts.format_instruction]
        content = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
        return self._render(problem, [*earlier, {"role": "user", "content": content}, *later])

    def _render(self, problem: Problem, messages: list[dict[str, str]]) -> list[int]:
        options = problem.chat_template_kwargs
        return self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, options=options
        )

    def _cut(self, hint: str) -> str:
        most = self._prompts.max_hint_tokens
        return self._beginning(hint, lambda part: len(self._tokenizer.encode(part)) <= most)

    def _beginning(self, text: str, fits: Callable[[str], bool]) -> str:
        """The longest beginning of the text found to fit; empty if none does.

        Found by bisection over characters: decoding a cut list of ids could end inside a
        character, or differ from the text.
        """
        if fits(text):
            return text
        fitting, too_long = 0, len(text)
        while too_long - fitting > 1:
            middle = (fitting + too_long) // 2
            if fits(text[:middle]):
                fitting = middle
            else:
                too_long = middle
        return text[:fitting]


def _question(problem: Problem) -> int | None:
    """The index of the user's last message, None without one; others may follow it in an agent's
    conversation."""
    asked = (number for number, each in enumerate(problem.messages) if each["role"] == "user")
    return max(asked, default=None)


def _sft_fields(sft_response: str) -> set[str]:
    try:
        fields = {
            name for _, name, _, _ in string.Formatter().parse(sft_response) if name is not None
        }
    except ValueError as error:
        raise UserError(
            f"prompts.sft_response is not a format string ({error}); double literal braces"
        ) from error
    unknown = sorted(fields - SFT_FIELDS)
    if unknown:
        raise UserError(
            f"prompts.sft_response uses {{{unknown[0]}}}; it may use {{reference_solution}} and "
            "{answer}, and literal braces must be doubled"
        )
    return fields
