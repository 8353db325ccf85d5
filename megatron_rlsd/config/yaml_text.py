"""YAML as it is meant: no key twice, and on the command line no comments and no blocks."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

_SCALARS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float")}
_OPENING = tuple("[{\"'")


class _Loader(yaml.SafeLoader):
    """As SafeLoader, but a second use of a key is an error; PyYAML keeps the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        used = set()
        for key_node, _ in node.value:
            # What is merged in (<<) may be overridden; an unhashable key is an error of its own.
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                key = self.construct_object(key_node)
                if key in used:
                    raise yaml.constructor.ConstructorError(
                        problem=f"key {key!r} stands twice in one section",
                        problem_mark=key_node.start_mark,
                    )
                used.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """One document; ValueError that says what is wrong and in which line."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(_told(error)) from error
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except (ValueError, OverflowError) as error:  # a date such as 2026-13-01
        raise ValueError(f"a value cannot be read: {error}") from error


def override_value(text: str) -> Any:
    """The value of ``key=value`` on the command line.

    A list, a mapping or a quoted text is YAML and must be whole, ValueError otherwise. So are null,
    true, false and numbers. Anything else is text as it stands: ``@x``, ``/a #2`` and ``a: b`` too,
    which YAML would refuse, cut at its comment, or take for a mapping.
    """
    if text.strip().startswith(_OPENING):
        return _whole(text)
    loader: Any = yaml.SafeLoader("")
    tag = loader.resolve(yaml.ScalarNode, text.strip(), (True, False))
    # 12:30 is a number to YAML 1.1, in base 60.
    return parse_yaml(text) if tag in _SCALARS and ":" not in text else text


def _whole(text: str) -> Any:
    try:
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(_told(error)) from error
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    assert node is not None  # it begins with a mark
    rest = text[node.end_mark.index :].strip()
    if rest:
        raise ValueError(f"unexpected {rest!r} after its end; quote the whole of it")
    return parse_yaml(text)


def _told(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return str(error)
    mark = error.problem_mark or error.context_mark
    place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return f"{error.problem or error.context}{place}"
