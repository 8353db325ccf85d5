"""The doctor expects the versions that pyproject.toml asks for; packaging reads them alike."""

from __future__ import annotations

import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from megatron_rlsd.diagnosis.versions import MATRIX
from megatron_rlsd.runtime.releases import release
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
ASKED = [
    Requirement(line)
    for lines in (PROJECT["dependencies"], EXTRAS["cpu"], EXTRAS["gpu"])
    for line in lines
]
PROBES = [
    f"{major}.{minor}.{micro}" for major in range(6) for minor in range(60) for micro in (0, 1)
]


def asked(name: str) -> SpecifierSet:
    """The widest range that is stated for a package: an extra may ask for more."""
    lowest = [next(iter(each.specifier)).version for each in ASKED if each.name == name]
    return SpecifierSet(f">={min(lowest, key=Version)}")


@pytest.mark.parametrize("name", ["torch", "transformers", "transformer-engine"])
def test_the_doctor_expects_what_is_asked_for(name: str) -> None:
    for version in PROBES:
        assert (release(version) in MATRIX[name]) == asked(name).contains(version), version


def test_the_doctor_expects_the_pythons_of_the_package() -> None:
    stated = PROJECT["requires-python"]
    for version in PROBES:
        assert (release(version) in MATRIX["python"]) == SpecifierSet(stated).contains(version)


def test_only_supported_megatron_is_asked_for() -> None:
    stated = [each.specifier for each in ASKED if each.name == "megatron-core"]
    assert len(stated) == 2
    for version in PROBES:
        if any(each.contains(version) for each in stated):
            assert release(version) in MATRIX["megatron-core"], version


@pytest.mark.parametrize(
    ("version", "numbers"),
    [
        ("2.13.0+cpu", (2, 13, 0)),
        ("2.6.0a0+ecf3bae40a.nv25.1", (2, 6, 0)),
        ("0.5.10.post1", (0, 5, 10)),
        ("535.104.05", (535, 104, 5)),
        ("12.9", (12, 9, 0)),
        ("0.19.0rc3", (0, 19, 0)),
        ("0.20", (0, 20, 0)),
    ],
)
def test_releases(version: str, numbers: tuple[int, ...]) -> None:
    assert release(version) == numbers
    assert Version(version).release[:2] == numbers[:2]


def test_what_is_no_version() -> None:
    with pytest.raises(ValueError, match="git"):
        release("git-main")
