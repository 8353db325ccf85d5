"""What ``pip install`` takes from this repository runs outside of it: rlsd demo and rlsd report."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

BUILT_FROM = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
SHORT = ["sft.steps=2", "train.steps=1", "rollout.prompts_per_step=2", "eval.num_problems=2"]
"""The demo's three parts with few steps."""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel puts into an environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "megatron_rlsd",
        source / "megatron_rlsd",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir"]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(folder), str(source)]
    subprocess.run(command, check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def test_the_wheel_has_every_file_of_the_package(installed: Path) -> None:
    def files(root: Path) -> set[str]:
        package = root / "megatron_rlsd"
        found = {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()}
        return {name for name in found if "__pycache__" not in name}

    assert files(installed) == files(ROOT)


def test_the_demo_and_its_report_run_outside_the_repository(
    installed: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> str:
        command = [sys.executable, *words]
        ended = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
        return ended.stdout

    found = run("-c", "import megatron_rlsd; print(megatron_rlsd.__file__)")
    assert Path(found.strip()).is_relative_to(installed)
    shown = run("-m", "megatron_rlsd", "demo", "--nproc", "1", "--tensor-parallel", "1", *SHORT)
    assert all(f"== {part}/3 " in shown for part in (1, 2, 3))
    assert "rlsd report runs/demo/rlsd writes one HTML file" in shown
    run("-m", "megatron_rlsd", "report", "runs/demo/rlsd")
    assert "chain_sum" in (tmp_path / "runs/demo/rlsd/report.html").read_text()
