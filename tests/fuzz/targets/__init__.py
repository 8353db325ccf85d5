"""The fuzz targets by name."""

from __future__ import annotations

from tests.fuzz.driver import Target
from tests.fuzz.targets import config_files, jsonl_lines

TARGETS: dict[str, Target] = {
    "config_files": config_files,
    "jsonl_lines": jsonl_lines,
}
