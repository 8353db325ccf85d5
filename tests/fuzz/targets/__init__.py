"""The fuzz targets by name."""

from __future__ import annotations

from tests.fuzz.driver import Target
from tests.fuzz.targets import checkpoint_bytes, config_files, jsonl_lines

TARGETS: dict[str, Target] = {
    "checkpoint_bytes": checkpoint_bytes,
    "config_files": config_files,
    "jsonl_lines": jsonl_lines,
}
