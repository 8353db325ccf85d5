"""From a conversation to imitate to what the supervised warm start trains on."""

from __future__ import annotations

from megatron_rlsd.config import Config
from megatron_rlsd.data.chat_turns import ChatTurns
from megatron_rlsd.data.tokenizers import Tokenizer
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Problem


class Conversations:
    """Makes the tokens that an episode of the same play has (``episodes.Episodes``).

    A turn of the assistant is its text and the end-of-turn token, as the model would have to
    sample it; what stands between two turns comes from the chat template. The whole conversation is
    never rendered at once: a template may strip turns or leave thoughts out, and the model would
    learn in contexts that it never meets.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        self._environment, self._tokenizer = config.environment, tokenizer
        self._max_tokens = config.rollout.max_response_tokens
        self._between: dict[str, ChatTurns] = {}

    def target(self, problem: Problem) -> tuple[list[int], list[int]]:
        """[T] ids after the prompt, and [T] 1 where the assistant wrote them, 0 elsewhere.

        Raises UserError by problem and message for what no episode could hold: more tokens than
        ``rollout.max_response_tokens``; with an environment, a message between turns that is not
        ``environment.role``'s, and turns beyond ``max_turns`` or ``max_turn_tokens``.
        UserError where the chat template does not show the messages between turns.
        """
        ids: list[int] = []
        mask: list[int] = []
        for at, message in enumerate(problem.demonstration):
            place = f"{problem.id}: message {len(problem.messages) + at + 1} ({message['role']})"
            own = message["role"] == "assistant"
            if own:
                added = [*self._tokenizer.encode(message["content"])]
                added.append(self._tokenizer.end_of_turn_id)
                self._check_turn(place, at // 2 + 1, len(added))
            else:
                added = self._turns_with(message["role"], place).between(
                    ids, message["content"], problem.chat_template_kwargs
                )
            ids += added
            mask += [int(own)] * len(added)
            if len(ids) > self._max_tokens:
                raise UserError(
                    f"{place}: the conversation has {len(ids)} tokens up to here after its prompt, "
                    f"more than rollout.max_response_tokens={self._max_tokens}"
                )
        return ids, mask

    def _check_turn(self, place: str, number: int, num_tokens: int) -> None:
        environment = self._environment
        if not environment.plays:
            return
        if number > environment.max_turns:
            raise UserError(
                f"{place}: the assistant's turn {number}, more than environment.max_turns="
                f"{environment.max_turns}"
            )
        limit = environment.max_turn_tokens
        if limit is not None and num_tokens > limit:
            raise UserError(
                f"{place}: the turn has {num_tokens} tokens with its end, more than "
                f"environment.max_turn_tokens={limit}"
            )

    def _turns_with(self, role: str, place: str) -> ChatTurns:
        environment = self._environment
        if environment.plays and role != environment.role:
            raise UserError(
                f"{place}: the environment {environment.label} speaks as environment.role="
                f"{environment.role}; the model would learn another form of its answers"
            )
        if role not in self._between:
            self._between[role] = ChatTurns(self._tokenizer, role)
        return self._between[role]
