"""What a judge is asked, as Jinja templates over a response and its problem."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import StrictUndefined, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_rlsd.runtime.small_files import read_text
from megatron_rlsd.types import RewardInput

MAX_TEMPLATE_BYTES = 1 << 20

Values = Mapping[str, Any]
Render = Callable[[Values], Any]
"""Makes of variables what a request says."""


def variables(sample: RewardInput) -> dict[str, Any]:
    """What templates know of a response."""
    problem = sample.problem
    messages = [dict(message) for message in problem.messages]
    answered = [dict(message) for message in sample.transcript]
    return {
        "question": messages[-1]["content"] if messages else "",
        "messages": messages,
        "answer": problem.answer,
        "reference_solution": problem.reference_solution,
        "metadata": problem.metadata,
        "id": problem.id,
        "source": problem.source,
        "response": sample.response,
        "turn": sample.turn or sample.response,
        "transcript": answered,
        "conversation": messages
        + (answered or [{"role": "assistant", "content": sample.response}]),
        "finish_reason": sample.finish_reason,
        "num_tokens": sample.num_tokens,
        "max_tokens": sample.max_tokens,
        "environment_reward": sample.environment_reward,
    }


def wire(sample: RewardInput) -> dict[str, Any]:
    """A response as ``rlsd reward-server`` reads it."""
    return asdict(sample)


def encoded(request: Any) -> bytes:
    """A rendered request as JSON; raises what is wrong with a template's value."""
    return json.dumps(request, allow_nan=False, default=_no_json).encode()


def text_template(source: str) -> Render:
    """Renders a text; ValueError where ``source`` is not a template."""
    try:
        template = _environment().from_string(source)
    except TemplateError as error:
        raise ValueError(f"{source!r:.80} is not a Jinja template: {error}") from None
    return template.render


def template_of(data: Any) -> Render:
    """Renders JSON data whose texts are templates.

    A text that is one ``{{ expression }}`` gives the value of the expression, any other a text.
    ValueError where one is not a template.
    """
    if isinstance(data, Mapping):
        members = {str(key): template_of(value) for key, value in data.items()}
        return lambda values: {key: render(values) for key, render in members.items()}
    if isinstance(data, list):
        entries = [template_of(value) for value in data]
        return lambda values: [render(values) for render in entries]
    if not isinstance(data, str):
        return lambda values: data
    text = data.strip()
    inner = text[2:-2]
    if text.startswith("{{") and text.endswith("}}") and "{{" not in inner and "}}" not in inner:
        try:
            expression = _environment().compile_expression(inner, undefined_to_none=False)
        except TemplateError as error:
            raise ValueError(f"{data!r:.80} is not a Jinja expression: {error}") from None
        return lambda values: _defined(expression(**values))
    return text_template(data)


def chat_template(folder: Path) -> Render:
    """Renders ``conversation`` as the model of this folder has it.

    Raises ValueError where the folder has no chat template, OSError where it cannot be read.
    """
    settings: dict[str, Any] = {}
    described = folder / "tokenizer_config.json"
    if described.is_file():
        settings = json.loads(read_text(described, MAX_TEMPLATE_BYTES))
    source = settings.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        source = read_text(folder / "chat_template.jinja", MAX_TEMPLATE_BYTES)
    if not isinstance(source, str):
        raise ValueError(f"{folder} has neither chat_template.jinja nor one in {described.name}")
    tokens = {
        name: value["content"] if isinstance(value, dict) else value
        for name, value in settings.items()
        if name.endswith("_token") and isinstance(value, dict | str)
    }
    environment = _environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.undefined = environment.undefined.__mro__[1]  # templates ask what is defined
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    try:
        template = environment.from_string(source)
    except TemplateError as error:
        raise ValueError(f"the chat template of {folder} is not valid Jinja: {error}") from None
    return lambda values: template.render(
        **tokens, messages=values["conversation"], add_generation_prompt=False
    )


def _environment(**settings: Any) -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, **settings)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _defined(value: Any) -> Any:
    if isinstance(value, StrictUndefined):
        str(value)  # raises, naming the variable
    return value


def _no_json(value: Any) -> NoReturn:
    _defined(value)
    raise TypeError(f"a template gives a {type(value).__name__}, which is not JSON")
