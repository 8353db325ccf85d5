"""From a problem to the student's prompt, the teacher's privileged prompt and a supervised target.

The two prompts differ by the hint alone:

    student   [earlier messages]  question                                   format_instruction
    teacher   [earlier messages]  question  introduction  hint  hint_request  format_instruction
"""

from __future__ import annotations

import string

from megatron_rlsd.config import PromptConfig, TeacherConfig
from megatron_rlsd.data.tokenizers import Tokenizer
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Problem

SFT_FIELDS = {"reference_solution", "answer"}


class PromptTooLong(UserError):
    """A student prompt exceeds ``prompts.max_prompt_tokens``."""

    def __init__(self, problem_id: str, num_tokens: int, max_tokens: int) -> None:
        super().__init__(
            f"the prompt of problem {problem_id} has {num_tokens} tokens, more than "
            f"prompts.max_prompt_tokens={max_tokens}"
        )
        self.problem_id, self.num_tokens, self.max_tokens = problem_id, num_tokens, max_tokens


class PromptBuilder:
    """Builds token ids, generation prompt included, over the tokenizer's chat template.

    Raises UserError if ``prompts.sft_response`` uses fields that do not exist.
    """

    def __init__(self, prompts: PromptConfig, teacher: TeacherConfig, tokenizer: Tokenizer) -> None:
        self._prompts, self._teacher, self._tokenizer = prompts, teacher, tokenizer
        self._sft_fields = _sft_fields(prompts.sft_response)

    def student(self, problem: Problem) -> list[int]:
        """[P] ids of the question; PromptTooLong beyond ``prompts.max_prompt_tokens``."""
        return self._checked_student(problem)

    def teacher(self, problem: Problem, hint: str | None = None) -> list[int]:
        """[P'] ids of the question and the hint; the student's prompt where there is no hint.

        ``hint`` None: the problem's own, as ``hint`` finds it; a text is cut to
        ``max_hint_tokens``. PromptTooLong if the student's prompt is.
        """
        student = self._checked_student(problem)
        hint = self.hint(problem) if hint is None else self._cut(hint.strip())
        if not hint:
            return student
        return self._ids(
            problem, [self._prompts.hint_introduction, hint, self._prompts.hint_request]
        )

    def hint(self, problem: Problem) -> str:
        """The privileged information as ``teacher.hint`` asks for it, cut to ``max_hint_tokens``.

        Empty with ``teacher.hint`` none, and for a problem that has nothing to tell. Hints that
        come with a group of responses (``teacher.hints``) are no problem's own: its reference
        solution stands in for them, for the supervised warm start.
        """
        if self._teacher.hint == "none":
            return ""
        wants_solution = self._teacher.hint != "answer"
        solution = problem.reference_solution if wants_solution else None
        return self._cut((solution or problem.answer).strip())

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

    def _checked_student(self, problem: Problem) -> list[int]:
        ids = self._ids(problem, [])
        if len(ids) > self._prompts.max_prompt_tokens:
            raise PromptTooLong(problem.id, len(ids), self._prompts.max_prompt_tokens)
        return ids

    def _ids(self, problem: Problem, after_question: list[str]) -> list[int]:
        """Ids of the problem's messages with more paragraphs after the question."""
        *earlier, question = problem.messages
        if self._prompts.system is not None and not any(m["role"] == "system" for m in earlier):
            earlier.insert(0, {"role": "system", "content": self._prompts.system})
        paragraphs = [question["content"], *after_question, self._prompts.format_instruction]
        content = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
        return self._tokenizer.apply_chat_template(
            [*earlier, {"role": "user", "content": content}], add_generation_prompt=True
        )

    def _cut(self, text: str) -> str:
        """The longest beginning of the text found to have at most ``max_hint_tokens`` tokens.

        Found by bisection over characters: decoding a cut list of ids could end inside a
        character, or differ from the text.
        """
        limit = self._prompts.max_hint_tokens
        if len(self._tokenizer.encode(text)) <= limit:
            return text
        fits, too_long = 0, len(text)
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if len(self._tokenizer.encode(text[:middle])) <= limit:
                fits = middle
            else:
                too_long = middle
        return text[:fits]


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
