"""YAML plus ``key=value`` to a checked Config, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_rlsd.config.root import Config
from megatron_rlsd.config.secrets import MASK, is_secret, masked, masked_text, masks_in
from megatron_rlsd.config.unused import drop_unused, ignored
from megatron_rlsd.config.yaml_text import override_value, parse_yaml
from megatron_rlsd.plugins import load_plugins
from megatron_rlsd.runtime.durable import write_whole
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.one_voice import notice

NO_RUN = {
    "run_dir": "none",
    "model": {"hf_path": "none"},
    "data": {"train": [{"kind": "jsonl", "path": "none"}]},
}
"""Stands for the required sections of a configuration from which nothing is run."""


def load_config(
    path: str | Path,
    overrides: list[str] | None = None,
    *,
    needs_secrets: bool = True,
    rewards_only: bool = False,
) -> Config:
    """Read a YAML file, apply ``a.b=value`` overrides (``override_value``) and validate.

    needs_secrets: refuse masks, which ``dump_config`` writes in place of secrets. rewards_only: the
    file may lack what the other sections require, which then means nothing.

    Raises UserError that names each unknown or repeated key, bad value or missing section.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"config file {path} does not exist")
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError) as error:
        raise UserError(f"config file {path} cannot be read: {error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold a mapping of config sections, got {type(raw).__name__}")
    algorithm = raw.get("algorithm")
    files_name = algorithm.get("name") if isinstance(algorithm, dict) else None
    with_overrides(raw, overrides or [])
    if rewards_only:
        raw = {**NO_RUN, **raw}
    _load_plugins(raw, str(path))
    typed = {override.partition("=")[0] for override in overrides or []}
    if dropped := drop_unused(raw, typed, files_name):
        notice(
            f"{path} is for algorithm.name={files_name or 'rlsd'}; for {raw['algorithm']['name']}, "
            f"chosen on the command line, these of its keys are left out: {', '.join(dropped)}"
        )
    if idle := ignored(raw):
        notice(f"algorithm.name=grpo has no use for {idle}: it is RLSD at lambda 0")
    config = parse_config(raw, origin=str(path))
    if needs_secrets:
        refuse_masks(config, str(path))
    return config


def refuse_masks(config: Config, origin: str) -> None:
    """UserError that names every secret of which ``origin`` has only the mask, if it is used."""
    lacking = [
        key
        for key in masks_in(config.model_dump())
        if config.rollout.engine == "sglang" or not key.startswith("rollout.sglang.")
    ]
    if lacking:
        raise UserError(
            f"{origin} holds only masks in place of secrets: {', '.join(lacking)}; give them "
            f"again, for example {lacking[0]}=..."
        )


def with_overrides(raw: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """``raw`` itself, changed by ``a.b=value`` texts; UserError for one that is none."""
    for override in overrides:
        _apply_override(raw, override)
    return raw


def parse_config(raw: dict[str, Any], origin: str = "config") -> Config:
    """Import ``plugins``, then validate; errors name the dotted key and what was expected."""
    _load_plugins(raw, origin)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            parts = [str(part) for part in item["loc"]]
            # Blank: the kind of a reward function.
            key = ".".join(part for part in parts if part.strip()) or "(whole config)"
            if item["type"] == "extra_forbidden":
                lines.append(f"  {key}: unknown key{_known_keys(item['loc'])}")
            else:
                name = next((part for part in item["loc"][::-1] if isinstance(part, str)), "")
                got = MASK if is_secret(name) else repr(masked(item["input"]))
                lines.append(f"  {key}: {item['msg']} (got {got:.200})")
        raise UserError(f"{origin} is not a valid configuration:\n" + "\n".join(lines)) from None


def dump_config(config: Config, path: Path) -> None:
    """Write every setting, defaults included, as YAML that load_config reads back.

    Masks stand for secrets, which have to be given again.
    """
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    write_whole(path, text)


def flattened(settings: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """Nested mappings as one, their keys joined; a mapping without keys leaves nothing."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            inner = flattened(value, separator)
            flat |= {f"{key}{separator}{name}": each for name, each in inner.items()}
        else:
            flat[key] = value
    return flat


def _load_plugins(raw: dict[str, Any], origin: str) -> None:
    plugins = raw.get("plugins")
    if isinstance(plugins, list) and all(isinstance(name, str) for name in plugins):
        try:
            load_plugins(plugins)
        except UserError as error:
            raise UserError(f"{origin}: {error}") from error


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    shown = masked_text(override)
    if not separator or not key:
        raise UserError(f"override {shown!r} must look like section.key=value")
    *parents, last = key.split(".")
    node: Any = raw
    for part in parents:
        if isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            node = node[_list_index(node, part, shown)]
        if not isinstance(node, dict | list):
            raise UserError(f"override {shown!r}: {part} is a value, not a section")
    try:
        value = override_value(text)
    except ValueError as error:
        # What is wrong may repeat the value.
        reason = "" if shown != override else f": {error}"
        raise UserError(f"override {shown!r}: the value is not valid YAML{reason}") from None
    node[last if isinstance(node, dict) else _list_index(node, last, shown)] = value


def _list_index(node: list[Any], part: str, shown: str) -> int:
    if not part.isdecimal() or int(part) >= len(node):
        raise UserError(
            f"override {shown!r}: {part!r} must be an index below {len(node)}, the list's length"
        )
    return int(part)


def _known_keys(location: tuple[Any, ...]) -> str:
    section: Any = Config
    for part in location[:-1]:
        field = getattr(section, "model_fields", {}).get(part)
        section = getattr(field, "annotation", None)
    names = getattr(section, "model_fields", None)
    return f"; known keys: {', '.join(names)}" if names else ""
