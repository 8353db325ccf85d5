"""Runs inside an SGLang server: seconds of the model's own ``load_weights``, and of nothing else.

SGLang calls ``timed`` for POST /update_weights_from_tensor with load_format
``timed_loader.timed`` (``--custom-weight-loader``). The tensors come from the file that
``TIMED_TENSORS`` names, are read into this process's own memory once, and are loaded from there.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

_tensors: dict[str, Any] = {}


def timed(model: Any, _: Any) -> None:
    """Append the seconds of one call to the file that ``TIMED_SECONDS`` names."""
    if not _tensors:
        # Copies: a file's own pages are read when they are first touched.
        _tensors.update({n: t.clone() for n, t in load_file(os.environ["TIMED_TENSORS"]).items()})
    started = time.perf_counter()
    model.load_weights(list(_tensors.items()))
    seconds = time.perf_counter() - started
    with Path(os.environ["TIMED_SECONDS"]).open("a") as file:
        print(seconds, file=file)
