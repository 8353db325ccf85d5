"""How answers are scored."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePath
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, urlsplit

from pydantic import Discriminator, Field, PlainSerializer, Tag, model_validator

from megatron_rlsd.config.secrets import Named, Secret, is_secret, masked, without_login
from megatron_rlsd.config.section import OnError, Section


class RewardFunctionConfig(Section):
    name: str
    """A registered reward (exact_match, choice, math_verify, code_tests, reasoning_gym, format,
    length, environment), ``path/to/file.py:function``, or ``http``: a judge, see ``url``."""
    weight: float = 1.0
    params: Named = {}
    deterministic: bool = False
    """It says the same of the same response every time. Where all functions do, a response to a
    question that was scored before is not scored again: for judges whose calls are dear."""


class HttpRewardConfig(RewardFunctionConfig):
    """A judge, a reward model or ``rlsd reward-server`` behind an address."""

    name: Literal["http"]
    url: str | Annotated[list[str], Field(min_length=1)]
    """Where a function ``http`` is asked; several addresses take turns, and a request that one
    does not answer goes to another. With ``form`` the address to which the form adds its path, such
    as ``http://judge:30000/v1`` for chat."""
    form: Literal["own", "chat", "sglang_reward_model", "reward_server"] = "own"
    """What is asked: ``own``: what ``request`` says; ``chat``: URL/chat/completions as OpenAI has
    it; ``sglang_reward_model``: URL/classify of SGLang; ``reward_server``: ``rlsd reward-server``.
    """
    api_key: Secret | None = None
    """Sent as a bearer token; ``env:NAME`` reads it from that variable. Shown as rollout.sglang's.
    """
    model: str | None = None
    """The model's name in requests of chat and sglang_reward_model; chat needs it."""
    prompt: str | None = None
    """Jinja template of the judge's question (chat) or of a reward model's text. Variables:
    question, messages, answer, reference_solution, metadata, id, source, response, turn,
    transcript, conversation (the messages with the response), finish_reason, num_tokens,
    max_tokens, environment_reward."""
    system: str | None = None
    """Jinja template of chat's system message."""
    chat_template: str | None = None
    """In place of ``prompt`` for sglang_reward_model: the folder of the reward model's tokenizer,
    whose chat template shows ``conversation``."""
    request: Annotated[Any, PlainSerializer(masked, when_used="json")] = None
    """The request's JSON with form=own, in which every text is a Jinja template. A text that is one
    ``{{ expression }}`` stands for its value, whatever type that has."""
    body: Named = {}
    """Further fields of the request of chat and sglang_reward_model, such as ``temperature``."""
    score: str | None = None
    """Where the score is in the reply, such as ``result.scores.0``; with ``*`` for all entries of a
    list there is one score for each response of the request. reward_server: ``value`` of the
    result, or ``parts.NAME``; the other forms know it themselves."""
    score_pattern: str | None = None
    """Regular expression whose first group is the score, in the text at ``score``; the last place
    that it matches counts. chat: ``Score: NUMBER`` unless this says otherwise."""
    verdicts: dict[str, float] = {}
    """What the matched text means, where it is not a number: ``{A: 1, B: 0}``. Upper and lower case
    are the same; any other text gives no verdict."""
    score_range: tuple[float, float] | None = None
    """A score outside of them gives no verdict."""
    batch_size: int | None = Field(None, ge=1)
    """Responses of one request, which then fail together; with form=own the templates see them as
    ``samples``. Default: 1, of sglang_reward_model 16, of reward_server 4."""
    max_in_flight: int = Field(64, ge=1)
    """Requests that are under way at once, over all addresses."""
    timeout_seconds: float = Field(60.0, gt=0)
    """Limit of one try."""
    max_retries: int = Field(3, ge=0)
    """Further tries where a server is not reached, breaks off, or answers 408, 425, 429 or 5xx;
    after 0.5 s, 1 s, 2 s ..., at most 30 s. A try whose answer says Retry-After is not counted."""
    deadline_seconds: float = Field(600.0, gt=0)
    """Limit of a verdict, from the time when a batch is scored: waiting for its turn and all tries.
    Below distributed.timeout_seconds, after which the other ranks give up."""
    trust_env: bool = False
    """Go through the proxies that HTTP_PROXY, HTTPS_PROXY and NO_PROXY name?"""

    @property
    def urls(self) -> list[str]:
        return [self.url] if isinstance(self.url, str) else self.url

    @model_validator(mode="after")
    def _check_form(self) -> HttpRewardConfig:
        if self.params:
            raise ValueError("http takes its settings beside its name, not under params")
        for url in self.urls:
            _check_address(url)
        used = FORM_KEYS[self.form]
        unused = sorted(
            key
            for key in set().union(*FORM_KEYS.values()) - used
            if getattr(self, key) != type(self).model_fields[key].default
        )
        if unused:
            raise ValueError(f"form={self.form} has no use for {', '.join(unused)}")
        lacking = [key for key in FORM_NEEDS.get(self.form, ()) if getattr(self, key) is None]
        if lacking:
            raise ValueError(f"form={self.form} needs {' and '.join(lacking)}")
        if self.form == "sglang_reward_model" and (self.prompt is None) == (
            self.chat_template is None
        ):
            raise ValueError("form=sglang_reward_model needs either prompt or chat_template")
        if self.verdicts and self.score_pattern is None:
            raise ValueError("verdicts needs score_pattern, which finds the text that they explain")
        if self.score_range is not None and not self.score_range[0] < self.score_range[1]:
            raise ValueError(f"score_range must rise, got {list(self.score_range)}")
        if self.form == "chat" and self.batch_size not in (None, 1):
            raise ValueError("form=chat asks for one response at a time: batch_size=1")
        return self


FORM_KEYS: dict[str, set[str]] = {
    "own": {"request", "score", "score_pattern", "verdicts"},
    "chat": {"model", "prompt", "system", "body", "score_pattern", "verdicts"},
    "sglang_reward_model": {"model", "prompt", "chat_template", "body"},
    "reward_server": {"score"},
}
"""The keys that only some forms have a use for."""
FORM_NEEDS = {"own": ("request", "score"), "chat": ("model",)}


def _check_address(url: str) -> None:
    without_login(url)
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"url={url!r} must begin with http:// or https:// and name a host")
    if any(is_secret(name) for name, _ in parse_qsl(parts.query, keep_blank_values=True)):
        raise ValueError("an address holds no key, because it is shown often; give api_key")


class RewardServerConfig(Section):
    """How ``rlsd reward-server`` is reached; it scores with ``reward.functions``."""

    host: str = "127.0.0.1"
    """Address that it binds; 0.0.0.0 for all of the machine's. Whoever reaches it can have
    responses scored, see api_key."""
    port: int = Field(8650, ge=0, le=65535)
    """0: a free one, which it prints."""
    api_key: Secret | None = None
    """Asked of whoever wants something scored; ``env:NAME`` reads it from that variable."""
    max_queued: int = Field(8192, ge=1)
    """Responses that wait for a worker; more are refused with HTTP 503, and asked again later."""


def _kind_of_function(value: Any) -> str:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return " " if name == "http" else ""


Function = Annotated[
    Annotated[RewardFunctionConfig, Tag("")] | Annotated[HttpRewardConfig, Tag(" ")],
    Discriminator(_kind_of_function),
]
"""Blank tags, which no message shows: a key is ``reward.functions.0.url``."""


class RewardConfig(Section):
    functions: list[Function] = Field(min_length=1)
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

    server: RewardServerConfig = RewardServerConfig()

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

    @model_validator(mode="after")
    def _programs_end_before_their_call(self) -> RewardConfig:
        for function in self.functions:
            limit = function.params.get("total_time_limit_seconds", 8.0)
            if function.name != "code_tests" or not isinstance(limit, int | float):
                continue
            if limit + 1 > self.timeout_seconds:
                raise ValueError(
                    f"timeout_seconds={self.timeout_seconds:g} must be 1 s above code_tests' "
                    f"total_time_limit_seconds={limit:g}: a program that is too slow is wrong, and "
                    "a call that is too slow gives no verdict"
                )
        return self
