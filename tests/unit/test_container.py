"""What can be said of the container without building it: its pins agree with the rest."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
FROM_THE_IMAGE = {"torch", "numpy", "triton", "transformer-engine"}


def pins(name: str) -> dict[str, str]:
    text = (ROOT / "requirements" / name).read_text()
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", text, re.MULTILINE)
    return {canonicalize_name(package): version for package, version in found}


def requirements() -> list[Requirement]:
    """What pyproject.toml asks for on the container's Python."""
    return [Requirement(line) for line in PROJECT["dependencies"] + EXTRAS["cpu"]]


def test_the_environments_without_a_container_meet_in_torch_and_nccl() -> None:
    ours, theirs = pins("gpu.txt"), pins("container-sglang.txt")
    # Two releases of NCCL cannot be connected; torch asks for exactly one.
    for name in ("torch", "nvidia-nccl-cu13"):
        assert ours[name] == theirs[name], name
    text = (ROOT / "requirements/sglang-gpu.txt").read_text()
    assert [line for line in text.splitlines() if not line.startswith("#")] == [
        "-r container-sglang.txt"
    ]
    # Its torch part is compiled against that torch, so it is not among the wheels.
    assert ours["transformer-engine"] == ours["transformer-engine-cu13"]
    assert "transformer-engine-torch" not in ours
    for each in requirements():
        if each.marker is None or each.marker.evaluate({"python_version": "3.12"}):
            assert each.specifier.contains(ours[canonicalize_name(each.name)]), each
    tested = pins("cpu.txt")
    differ = {n for n in tested.keys() & ours.keys() if tested[n] != ours[n]}
    assert differ <= {"megatron-core", "torch", "triton"}


def test_the_gpu_extra_asks_for_the_engines_library_and_its_torch_part() -> None:
    asked = {r.name: r for r in map(Requirement, EXTRAS["gpu"])}
    assert asked.pop("megatron_rlsd").extras == {"cpu"}
    assert asked["transformer-engine"].extras == {"core_cu13", "pytorch"}
    ours = pins("gpu.txt")
    for name, each in asked.items():
        assert each.specifier.contains(ours[name]), name


def test_the_base_image_is_the_one_whose_versions_are_written_down() -> None:
    (tag,) = re.findall(r"^ARG BASE_IMAGE=(\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert f"`{tag}`" in (ROOT / "docs/container.md").read_text()


def test_every_requirement_is_pinned_or_the_images_own() -> None:
    pinned = pins("container.txt")
    asked = [
        each
        for each in requirements()
        if each.marker is None or each.marker.evaluate({"python_version": "3.12"})
    ]
    assert len(asked) > 12
    for each in asked:
        name = canonicalize_name(each.name)
        if name in FROM_THE_IMAGE:
            assert name not in pinned, f"{name} would hide the image's"
        else:
            assert each.specifier.contains(pinned[name]), name


def test_versions_are_those_that_the_tests_run_with() -> None:
    tested, pinned = pins("cpu.txt"), pins("container.txt")
    differ = {n for n in tested.keys() & pinned.keys() if tested[n] != pinned[n]}
    assert differ <= {"megatron-core"}
    assert pinned["megatron-core"] == pins("megatron-latest.txt")["megatron-core"]
    assert pins("container-sglang.txt")["sglang"] == pins("sglang-cpu.txt")["sglang"]


def test_every_pin_has_a_hash() -> None:
    for name in ("container.txt", "container-sglang.txt"):
        text = (ROOT / "requirements" / name).read_text()
        blocks = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)[1:]
        assert len(blocks) == len(pins(name))
        assert all("--hash=sha256:" in block for block in blocks)


@pytest.mark.process
def test_the_dockerfile_copies_what_is_there_and_starts_what_can_run() -> None:
    text = (ROOT / "Dockerfile").read_text()
    for source in re.findall(r"^COPY (?:--\S+ )?(\S+) ", text, re.MULTILINE):
        assert (ROOT / source).exists(), source
    (entrypoint,) = re.findall(r'^ENTRYPOINT \["/opt/megatron_rlsd/(.*)"\]', text, re.MULTILINE)
    script = ROOT / entrypoint
    assert os.access(script, os.X_OK)
    shown = subprocess.run([script, "help"], check=True, capture_output=True, text=True).stdout
    for word in ("train", "serve", "convert", "test"):
        assert f"{word} " in shown
    for path in re.findall(r"python (tools/\S+)", script.read_text()):
        assert (ROOT / path).is_file(), path
    answer = subprocess.run([script, "echo", "two words"], check=True, capture_output=True)
    assert answer.stdout == b"two words\n"
