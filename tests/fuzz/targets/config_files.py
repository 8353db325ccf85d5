"""Configuration files and overrides: a Config that says what they say, or one named error."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

from megatron_rlsd.config import Config, dump_config, load_config
from megatron_rlsd.runtime.errors import UserError
from tests.fuzz.text import mutated, text

SHIPPED = [
    path
    for path in sorted((Path(__file__).parents[3] / "examples").rglob("*.yaml"))
    if "\nplugins:" not in path.read_text()
]
"""Without those that name plug-ins: to read such a file is to run them, for the whole process."""
TEXT_KEYS = ("run_dir", "prompts.system", "prompts.format_instruction", "data.train.0.path")
"""Keys that take any text: what is typed must arrive."""
KEYS = (
    *("train.steps", "optimizer.lr", "model", "teacher.mode", "data.train", "eval.pass_at_k"),
    *("reward.functions.0.name", "rollout.sglang.urls", "algorithm.dual_clip", "parallel.tensor"),
)
BASE = """run_dir: runs/x
model: {hf_path: models/x}
data:
  train:
  - {kind: jsonl, path: train.jsonl}
reward:
  functions:
  - name: exact_match
prompts: {}
"""


def make(rng: random.Random) -> tuple[str, list[str], bool]:
    """The text of a file, overrides, and whether to write the whole config out (it takes long)."""
    whole = BASE if rng.random() < 0.95 else rng.choice(SHIPPED).read_text()
    if rng.random() < 0.5:
        whole = _changed(rng, whole)
    overrides = [f"{rng.choice(TEXT_KEYS)}={text(rng, ['a', 'b c', '/'])}"]
    while rng.random() < 0.5:
        key = rng.choice([*KEYS, text(rng, KEYS, 2)])
        overrides.append(f"{key}={text(rng, ['1', 'a', '.'])}")
    return whole, overrides, rng.random() < 0.05


def _changed(rng: random.Random, whole: str) -> str:
    lines = whole.splitlines(keepends=True)
    if rng.random() < 0.4:
        # A line that stands twice.
        line = rng.choice(lines)
        lines.insert(rng.randint(0, len(lines)), line)
        return "".join(lines)
    at = rng.randrange(len(lines))
    lines[at] = mutated(rng, lines[at])
    return "".join(lines)


def check(value: tuple[str, list[str], bool], folder: Path) -> None:
    content, overrides, dumped = value
    path = folder / "config.yaml"
    path.write_text(content, encoding="utf-8")
    config = _loaded(path, [])
    if config is not None:
        _check_no_key_twice(yaml.compose(content))
    if config is not None and dumped:
        dump_config(config, folder / "dump.yaml")
        assert load_config(folder / "dump.yaml") == config
    changed = _loaded(path, overrides)
    last = {key: typed for key, _, typed in (override.partition("=") for override in overrides)}
    key = overrides[0].partition("=")[0]
    if changed is not None and not any(k != key and k.startswith(key[:4]) for k in last):
        _check_text(_at(changed, key), last[key])


def _loaded(path: Path, overrides: list[str]) -> Config | None:
    try:
        return load_config(path, overrides)
    except UserError:
        return None


def _at(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[int(part)] if part.isdecimal() else getattr(value, part)
    return value


def _check_text(found: Any, typed: str) -> None:
    """Typed text arrives, but for what is quoted or no text: then it is what YAML makes of it."""
    if found == typed:
        return
    assert typed.strip()[:1] in ('"', "'") or found is None, (found, typed)
    assert found == yaml.safe_load(typed), (found, typed)


def _check_no_key_twice(node: yaml.Node | None, seen: tuple[int, ...] = ()) -> None:
    if node is None or id(node) in seen:
        return
    seen = (*seen, id(node))
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        keys = [key for key in keys if key != "<<"]
        assert len(set(keys)) == len(keys), "a key stands twice"
        for _, inner in node.value:
            _check_no_key_twice(inner, seen)
    elif isinstance(node, yaml.SequenceNode):
        for inner in node.value:
            _check_no_key_twice(inner, seen)
