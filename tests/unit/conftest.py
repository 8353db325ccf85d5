from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit import tiny_hf


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name of a tiny model -> its folder, as transformers saved it. Read only."""
    folders = {}
    for name in tiny_hf.MODELS:
        folders[name] = tmp_path_factory.mktemp(name)
        tiny_hf.save_tiny(name, folders[name])
    return folders
