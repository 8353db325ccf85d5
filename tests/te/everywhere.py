"""A plugin of pytest: the tests that are collected build Transformer Engine's layers.

``python -m pytest -p tests.te.everywhere tests/distributed/test_actor_layouts.py`` holds them to
what the local layers are held to. ``model.precision.layers=auto`` then means Transformer Engine's
in this process and in every rank that a test starts.
"""

from __future__ import annotations

from tests.distributed import ranks
from tests.te.engine import BEFORE, install
from tests.triton_interpreter import triton_interpreter

with triton_interpreter():  # as tests/conftest.py does, which comes later
    install()
ranks.BEFORE.extend(BEFORE)
