"""The settings as they stand in the models: for help texts, messages and editors."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_rlsd.config.root import Config
from megatron_rlsd.config.section import Section

ONE_OF_A_LIST = "0"
"""Stands in a key for the number of a list's entry."""
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


@dataclass(frozen=True)
class Setting:
    """One key of the configuration."""

    key: str
    """Dotted, as on the command line; entries of lists are shown as number 0."""
    kind: str
    """What a value may be, for example ``float, > 0`` or ``adam | sgd``."""
    default: str
    """As YAML would read it; ``required`` where there is none."""
    text: str
    """What it means; empty where the name says it."""


def settings(section: type[Section] = Config, prefix: str = "") -> Iterator[Setting]:
    """Every key, in the order of the models."""
    for name, field in section.model_fields.items():
        key, parts = f"{prefix}{name}", list(_sections(field.annotation))
        if not parts:
            yield Setting(key, _kind(field), _default(field), field.description or "")
            continue
        inner = f"{key}." if _is_section(field.annotation) else f"{key}.{ONE_OF_A_LIST}."
        seen: set[str] = set()
        for part in parts:
            # The kinds of a data source share keys.
            for each in settings(part, inner):
                if each.key not in seen or each.key.endswith(".kind"):
                    seen.add(each.key)
                    yield each


def sections(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The key of every section, and what stands above its keys."""
    for name, field in section.model_fields.items():
        for part in _sections(field.annotation):
            text = field.description or inspect.cleandoc(part.__dict__.get("__doc__") or "")
            yield f"{prefix}{name}", text
            if _is_section(field.annotation):
                yield from sections(part, f"{prefix}{name}.")
            break


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a configuration file."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Config.model_json_schema(),
        "title": "megatron_rlsd configuration",
    }


def _is_section(annotation: Any) -> bool:
    return inspect.isclass(annotation) and issubclass(annotation, Section)


def _sections(annotation: Any) -> Iterator[type[Section]]:
    """The sections that a field holds: itself, or what a list has entries of."""
    if _is_section(annotation):
        yield annotation
    elif get_origin(annotation) in (list, types.UnionType, Union):
        for each in get_args(annotation):
            yield from _sections(each)
    elif hasattr(annotation, "__metadata__"):
        yield from _sections(annotation.__origin__)


def _kind(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(rule, name):g}"
        for rule in field.metadata
        for name, sign in BOUNDS.items()
        if getattr(rule, name, None) is not None
    ]
    return ", ".join([_type(field.annotation), *bounds])


def _type(annotation: Any) -> str:
    if hasattr(annotation, "__metadata__"):
        return _type(annotation.__origin__)
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (types.UnionType, Union):
        return " | ".join("null" if each is types.NoneType else _type(each) for each in inner)
    if origin is not None:
        return f"{origin.__name__} of {_type(inner[-1])}"
    if annotation is SecretStr:
        return "str, shown as a mask"
    return "any" if annotation is Any else annotation.__name__


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined and field.default_factory is None:
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value!r}" if value == "" else f"{value}"


def overview(width: int = 100) -> str:
    """One line for each key: its default and what else it may be."""
    listed = list(settings())
    lines = [f"{each.key}={_short(each.default)}" for each in listed]
    column = min(max(map(len, lines)), width // 2)
    return "\n".join(
        f"  {line:<{column}}  {each.kind}" for line, each in zip(lines, listed, strict=True)
    )


def _short(default: str) -> str:
    return default if len(default) <= 24 else f"{default[:21]}..."
