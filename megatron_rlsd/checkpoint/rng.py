"""The random-number generators of a rank: Python's, numpy's, torch's, and Megatron's tracker."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_rlsd.parallel.exchange import pack_message, unpack_message


def pack_rng_state() -> bytes:
    """The state of every generator of this process, as one message."""
    version, words, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=True)
    kind, keys, *position = legacy
    tensors = {"python": torch.tensor(words), "numpy": torch.from_numpy(keys.astype(np.int64))}
    tensors["torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    for name, state in get_cuda_rng_tracker().get_states().items():
        tensors[f"tracker.{name}"] = state
    header = {"python": [version, gauss], "numpy": [kind, *position]}
    # The tracker hands out its own tensors, and equal ones may share memory.
    return pack_message(header, {name: tensor.clone() for name, tensor in tensors.items()})


def unpack_rng_state(payload: bytes) -> None:
    """Set every generator of this process; ``payload`` comes from a rank in the same place."""
    header, tensors = unpack_message(payload)
    version, gauss = header["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    kind, *position = header["numpy"]
    state: Any = (kind, tensors["numpy"].numpy().astype(np.uint32), *position)
    np.random.set_state(state)
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_available() and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"])
    tracked = {
        name.removeprefix("tracker."): tensor
        for name, tensor in tensors.items()
        if name.startswith("tracker.")
    }
    get_cuda_rng_tracker().set_states(tracked)
