"""Dependencies point one way; this reads every import statement of the package."""

from __future__ import annotations

import ast
from pathlib import Path

import megatron_rlsd

PACKAGE = Path(megatron_rlsd.__file__).parent


def imports_of(part: str) -> set[str]:
    """Every module name imported anywhere in a module or subpackage of ours."""
    path = PACKAGE / part
    files = path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    names: set[str] = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: imports are absolute"
                names.add(node.module or "")
    return names


def parts() -> list[str]:
    found = [p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()]
    return sorted(name for name in found if name != "__init__")


def ours(part: str) -> set[str]:
    """Subpackages of ours that a part imports, itself left out."""
    names = (n.split(".") for n in imports_of(part))
    return {n[1] for n in names if n[0] == "megatron_rlsd" and len(n) > 1} - {part}


def external(part: str) -> set[str]:
    return {name.split(".")[0] for name in imports_of(part)}


def test_types_and_config_import_nothing_of_ours():
    assert ours("types") == ours("plugins") == set()
    # Names in a configuration may be of its plug-ins.
    assert ours("config") == {"plugins"}


def test_ops_knows_tensors_only():
    assert ours("ops") == set()


def test_algorithms_and_rewards_know_neither_megatron_nor_engines():
    for part in ("algorithms", "rewards"):
        assert not external(part) & {"megatron", "sglang", "transformers"}
    assert ours("algorithms") <= {"types", "config"}
    assert ours("rewards") <= {"types", "config", "registry", "workers"}


def test_environments_know_rewards_and_no_more():
    assert not external("environments") & {"megatron", "sglang", "transformers", "torch"}
    assert ours("environments") <= {"types", "config", "registry", "workers", "rewards"}


def test_look_up_and_workers_do_not_know_what_they_serve():
    assert ours("registry") == {"plugins"}
    assert ours("workers") == {"types"}


def test_megatron_and_sglang_are_imported_where_they_belong():
    users = {part for part in parts() if "megatron" in external(part)}
    assert {"actor", "parallel"} <= users <= {"actor", "parallel", "checkpoint", "hf_bridge"}
    for library in ("sglang", "httpx2"):
        assert {part for part in parts() if library in external(part)} <= {"rollout"}


def test_every_package_that_imports_megatron_prepares_the_platform_first():
    for part in parts():
        if "megatron" in external(part):
            assert "enable_megatron()" in (PACKAGE / part / "__init__.py").read_text(), part


def test_the_package_does_not_import_its_tools():
    for part in parts():
        assert not external(part) & {"tools", "examples", "tests", "benchmarks"}
