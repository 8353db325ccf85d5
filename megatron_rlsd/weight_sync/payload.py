"""What POST /update_weights_from_tensor takes: where a bucket is in memory, not its bytes.

SGLang reads a pickle in base64, of names on a list of its own. No way around that; but it need not
be made by SGLang's classes, which the trainer's environment lacks. This writes the one form of it
that every version of torch and SGLang on the other side reads: ``{"flattened_tensor": uint8 tensor,
"metadata": [one object with name, shape, dtype, start_idx, end_idx and numel a tensor]}``, in which
a tensor of main memory is a shared-memory file (torch's ``file_system`` strategy; the default one
passes file descriptors, which ends the server) and one of a GPU is a CUDA IPC handle with the GPU's
UUID, because the two processes may number GPUs differently. Nothing is ever unpickled here.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import io
import os
import pickle
import shutil
import subprocess
import sys
import uuid
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.lifecycle import STOP_SIGNALS, unheard_by_children
from megatron_rlsd.weight_sync.flat import FlatBucket

SHARED_MEMORY = Path("/dev/shm")
JANITOR = Path(__file__).parent / "janitor.py"
OWN_MANAGER = b""
"""torch has a small process keep the books of shared memory and remove it in the end. Readers are
to use their own: ours would live, and keep the memory, as long as any server that ever used it."""
CUDA_DEVICE = 6
"""The device's place among the arguments of torch's rebuild_cuda_tensor."""


def shared_buffer(nbytes: int) -> Tensor:
    """uint8 [nbytes] in shared memory that ``payload`` can refer to, all of it reserved at once.

    The memory is free when the tensor is gone or the trainer has ended, however it ends.

    Raises UserError where /dev/shm has no room for it.
    """
    # torch's bookkeeper starts with the first. Were it to end before us, letting go of the memory
    # would abort this process.
    with unheard_by_children(*STOP_SIGNALS):
        try:
            storage = torch.UntypedStorage._new_using_filename_cpu(nbytes)
        except RuntimeError as error:
            if os.strerror(errno.ENOSPC) not in str(error):
                raise
            free = shutil.disk_usage(SHARED_MEMORY).free
            raise UserError(
                f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB left, and weight_sync.transport=ipc "
                f"needs {nbytes / 2**20:.0f} MiB more there for a bucket of weights: free some, "
                "give the container more (--shm-size, or --ipc=host), make weight_sync.bucket_mib "
                "smaller, or use the transport disk or broadcast"
            ) from error
    # Never taken back: a reader that lets go after us must not be the last. It would remove its
    # name, which is gone already, and end on that.
    storage._shared_incref()
    buffer = torch.empty(0, dtype=torch.uint8).set_(storage)
    weakref.finalize(buffer, _file_of(storage).unlink, missing_ok=True)
    return buffer


def start_janitor() -> subprocess.Popen[bytes]:
    """A process that removes this one's names for readers once this one has ended, however."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(JANITOR), str(os.getpid()), _prefix()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # What is sent to the trainer's process group must not reach it.
        start_new_session=True,
    )


def _prefix() -> str:
    """The prefix of the names that readers are given."""
    return f"rlsd_{os.getpid()}_"


def remove_stale_names() -> None:
    """Free what janitors could not: those that were killed together with their trainers."""
    for path in SHARED_MEMORY.glob("rlsd_*_*"):
        pid = path.name.split("_")[1]
        if pid.isdigit() and not Path("/proc", pid).exists():
            path.unlink(missing_ok=True)


def _file_of(storage: torch.UntypedStorage) -> Path:
    return SHARED_MEMORY / storage._share_filename_cpu_()[1].decode().lstrip("/")


@contextlib.contextmanager
def payload(bucket: FlatBucket, *, on_gpu: bool) -> Iterator[str]:
    """For one tensor-parallel rank to read once, before the context ends.

    on_gpu: refer to ``bucket.device_flat``; else ``bucket.buffer`` must be a ``shared_buffer``.
    """
    flat = bucket.device_flat if on_gpu else bucket.flat
    assert flat is not None, "the bucket is not on the GPU"
    metadata = [
        SimpleNamespace(
            name=entry.name,
            shape=list(entry.shape),
            dtype=entry.dtype,
            start_idx=entry.start,
            end_idx=entry.start + entry.nbytes,
            numel=entry.nbytes,
        )
        for entry in bucket.entries
    ]
    with contextlib.ExitStack() as names:
        written = io.BytesIO()
        _Pickler(written, names).dump({"flattened_tensor": flat, "metadata": metadata})
        yield base64.b64encode(written.getvalue()).decode()


@dataclass(frozen=True)
class _Untyped:
    """A shared-memory file."""

    name: bytes
    nbytes: int


@dataclass(frozen=True)
class _Bytes:
    """The same, typed as uint8."""

    untyped: _Untyped


class _Pickler(pickle.Pickler):
    """Writes tensors as references, by torch's own functions that read them."""

    def __init__(self, file: io.BytesIO, names: contextlib.ExitStack) -> None:
        super().__init__(file, protocol=4)
        self._names = names

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.is_cuda:
                return _cuda_reference(value)
            return _shared_reference(value, self._names)
        if isinstance(value, _Bytes):
            return reductions.rebuild_typed_storage, (value.untyped, torch.uint8)
        if isinstance(value, _Untyped):
            where = (torch.UntypedStorage, OWN_MANAGER, value.name, value.nbytes)
            return reductions.rebuild_storage_filename, where
        return NotImplemented


def _shared_reference(tensor: Tensor, names: contextlib.ExitStack) -> tuple[Any, ...]:
    storage = tensor.untyped_storage()
    # A name of its own for this reader: its manager removes the names that it knows when it ends,
    # which must not hit the other servers.
    name = f"{_prefix()}{uuid.uuid4().hex}"
    os.link(_file_of(storage), SHARED_MEMORY / name)
    names.callback((SHARED_MEMORY / name).unlink, missing_ok=True)
    # The reader takes one back.
    storage._shared_incref()
    file = _Untyped(f"/{name}".encode(), storage.nbytes())
    view = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), False)
    return reductions.rebuild_tensor, (Tensor, _Bytes(file), view)


def _cuda_reference(tensor: Tensor) -> tuple[Any, ...]:
    rebuild, arguments = reductions.reduce_tensor(tensor)
    device = str(torch.cuda.get_device_properties(arguments[CUDA_DEVICE]).uuid)
    return rebuild, (*arguments[:CUDA_DEVICE], device, *arguments[CUDA_DEVICE + 1 :])
