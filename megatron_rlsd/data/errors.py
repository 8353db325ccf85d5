"""What can be wrong with a user's data or tokenizer."""

from __future__ import annotations


class DataError(ValueError):
    """A problem source cannot serve; the message names the file, line, task or key."""


class PromptTooLong(DataError):
    """A student prompt exceeds ``prompts.max_prompt_tokens``."""

    def __init__(self, problem_id: str, num_tokens: int, max_tokens: int) -> None:
        super().__init__(
            f"the prompt of problem {problem_id} has {num_tokens} tokens, more than "
            f"prompts.max_prompt_tokens={max_tokens}"
        )
        self.problem_id, self.num_tokens, self.max_tokens = problem_id, num_tokens, max_tokens


class TokenizerError(ValueError):
    """A tokenizer cannot be loaded or used; the message names the path or the config key."""
