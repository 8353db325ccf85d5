"""A Jinja chat template: what it says for given messages, within bounds of time and size.

Templates come with a model's folder, so they are strangers' programs. They run in Jinja's sandbox,
see nothing but their variables, and what they mean is what they mean in transformers.
"""

from __future__ import annotations

import datetime
import json
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, NoReturn

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.small_files import read_text

MAX_TEMPLATE_BYTES = 2**20
"""The longest templates in use have some 30 kB."""
MAX_RENDERED_CHARACTERS = 2**26
MAX_SECONDS = 10.0
"""The limit for one rendering."""
GIVEN = frozenset({"messages", "add_generation_prompt", "raise_exception", "strftime_now"})
"""Variables that are not the user's to set."""
UNUSED = ("tools", "documents")
"""Variables that other callers of a template give, and that are None here."""

Messages = list[dict[str, str]]
NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


class ChatTemplate:
    """A compiled template with the variables that every rendering gets."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        options: Mapping[str, Any],
        date: datetime.date,
    ) -> None:
        """Raises UserError if it is not a template, or reads none of ``options`` by a given name.

        special_tokens: name (``bos_token``) -> text; options: ``tokenizer.chat_template_kwargs``;
        date: what ``strftime_now`` formats.
        """
        self.source = source
        self._date, self._options = date, dict(options)
        self._special_tokens = dict(special_tokens)
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_template_error
        environment.globals["strftime_now"] = self._strftime
        try:
            parsed = environment.parse(source)
            self._template = environment.from_string(source)
            self.reads = frozenset(meta.find_undeclared_variables(parsed))
            names = {node.name for node in parsed.find_all(nodes.Name)}
            literals = [node.data for node in parsed.find_all(nodes.TemplateData)]
            constants = [node.value for node in parsed.find_all(nodes.Const)]
        except (TemplateError, RecursionError, SyntaxError, MemoryError) as error:
            raise UserError(f"the chat template is not valid Jinja: {error}") from error
        self.text = "\0".join([*literals, *(c for c in constants if isinstance(c, str))])
        """The strings that the template itself writes or compares with, NUL between them."""
        self.writes_the_date = "strftime_now" in names
        self._check_options(self._options, "tokenizer.chat_template_kwargs")

    def render(
        self,
        messages: Messages,
        add_generation_prompt: bool,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> str:
        """The conversation as text; ``options`` over those of all renderings.

        Raises UserError if the template refuses the messages, or does not read an option.
        """
        if options:
            self._check_options(options, "chat_template_kwargs of a data source")
        variables = {
            **dict.fromkeys(UNUSED),
            **self._special_tokens,
            **self._options,
            **options,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            with _time_limit(MAX_SECONDS):
                text = self._template.render(variables)
        except UserError:
            raise
        except Exception as error:  # whatever a stranger's program may raise
            roles = [message["role"] for message in messages]
            what = str(error) if isinstance(error, TemplateError | TypeError) else repr(error)
            raise UserError(f"the chat template refuses messages of roles {roles}: {what}") from (
                error
            )
        if len(text) > MAX_RENDERED_CHARACTERS:
            raise UserError(
                f"the chat template makes {len(text):,} characters of {len(messages)} messages, "
                f"more than the {MAX_RENDERED_CHARACTERS:,} allowed"
            )
        return text

    def prefill(self, options: Mapping[str, Any] = NO_OPTIONS) -> str:
        """What the template writes at the beginning of a turn that the model is to finish.

        Some begin it with ``<think>``. Found by comparison with a past turn's beginning; empty for
        a template that shows past turns in another form, or none.
        """
        content = "\ue000content\ue000"
        question = {"role": "user", "content": "."}
        past = [question, {"role": "assistant", "content": content}, question]
        try:
            before, found, _ = self.render(past, False, options).partition(content)
            begun = self.render([question], True, options)
        except UserError:  # of roles: such a template has no past turns
            return ""
        return begun.removeprefix(before) if found and begun.startswith(before) else ""

    def exported(self) -> str:
        """The template with this run's options as defaults, for programs that give it none."""
        if not self._options:
            return self.source
        defaults = "".join(
            f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"
            for name, value in sorted(self._options.items())
        )
        # A newline behind a block would be dropped, and here it is the template's own.
        between = "{{ '' }}" if self.source.startswith("\n") else ""
        return defaults + between + self.source

    def _check_options(self, options: Mapping[str, Any], key: str) -> None:
        taken = sorted(options.keys() & GIVEN)
        if taken:
            raise UserError(f"{key} cannot set {', '.join(taken)}")
        unread = sorted(options.keys() - self.reads)
        if unread:
            known = sorted(self.reads - GIVEN - self._special_tokens.keys() - set(UNUSED))
            raise UserError(
                f"{key} sets {', '.join(unread)}, which the chat template "
                f"does not read; it reads {', '.join(known) or 'no such variable'}"
            )

    def _strftime(self, form: str) -> str:
        return datetime.datetime.combine(self._date, datetime.time()).strftime(form)


def template_from(given: str, named: Mapping[str, str], whose: str) -> str:
    """The template that ``tokenizer.chat_template`` means: a file, one of the folder's, or itself.

    named: the templates of ``whose`` by name. Raises UserError for what is none of the three.
    """
    if given in named:
        return named[given]
    if "{{" in given or "{%" in given:
        return given
    path = Path(given)
    if "\n" not in given and (path.suffix in (".jinja", ".jinja2", ".j2") or path.is_file()):
        return read_text(path, MAX_TEMPLATE_BYTES)
    names = f"; {whose} has the templates {', '.join(sorted(named))}" if named else ""
    raise UserError(
        f"tokenizer.chat_template={given!r} is not a Jinja template (it has neither {{{{ }}}} nor "
        f"{{% %}}) and no file{names}"
    )


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise UserError if the block takes longer. In the main thread only: elsewhere no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise _Overtime

    previous = signal.signal(signal.SIGALRM, stop)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _Overtime:
        raise UserError(f"the chat template takes more than {seconds:g} seconds") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, previous)


class _Overtime(BaseException):
    """Past everything that a template or this module catches."""


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which products are bounded as well as ranges are."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        lengths = [len(x) for x in (left, right) if isinstance(x, str | list | tuple)]
        counts = [x for x in (left, right) if isinstance(x, int)]
        if operator == "**" and any(abs(x) > 1024 for x in counts):
            raise TemplateError("a power of numbers above 1024")
        if lengths and counts and lengths[0] * counts[0] > MAX_RENDERED_CHARACTERS:
            raise TemplateError(f"a product of {lengths[0]} x {counts[0]} elements")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """``{% generation %}``, by which templates mark the assistant's words: means nothing here."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes for HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_template_error(message: str) -> NoReturn:
    raise TemplateError(message)


def _literal(value: Any) -> str:
    """A JSON value as Jinja spells it."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return repr(value)
