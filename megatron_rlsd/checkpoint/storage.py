"""Writing and reading Megatron's distributed checkpoint format (torch_dist), without processes.

Megatron plans a save and leaves the writing to forked processes, with an interpreter spawned per
rank for their answers. Here one thread of the rank writes the same files: nothing is forked beside
CUDA or gloo threads, and nothing can outlive the trainer.
"""

from __future__ import annotations

import inspect
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.msc_utils import MultiStorageClientFeature
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem

from megatron_rlsd.checkpoint.checksums import BLOCKS_SUFFIX, CheckedFile, write_block_checksums
from megatron_rlsd.conversion.restricted import DamagedError, check_are_tensors
from megatron_rlsd.parallel.exchange import agree
from megatron_rlsd.runtime.errors import UserError, mendable

# Where its package is installed Megatron would read files past what compares their checksums.
MultiStorageClientFeature.disable()

FILE_BYTES = 1 << 30
"""A rank's tensors go to files of about this size; staged one by one beside a GPU."""


class PendingSave:
    """A save that has been planned on all ranks and is being written by this one."""

    def __init__(
        self, request: Any, tensors: Sequence[ShardedTensor], folder: Path, background: bool
    ) -> None:
        self._folder = folder
        self._error: Exception | None = None
        self._finalize = list(request.finalize_fns)
        # A rank without anything to write gets no function and no arguments.
        buckets: list[Any] = []
        transforms: list[Any] = []
        self._results: Any = None
        if request.async_fn is not None:
            _, buckets, self._results = request.async_fn_args
            transforms = request.async_fn.args[0]
        work = (transforms, buckets, background)
        self._thread: threading.Thread | None = None
        if background:
            # Training changes its tensors while the thread writes, so it gets copies.
            buckets[:] = _copied(buckets, {_memory(t.data) for t in tensors})
            self._thread = threading.Thread(
                target=self._write, args=work, name="checkpoint-writer", daemon=True
            )
            self._thread.start()
        else:
            self._write(*work)

    @property
    def written(self) -> bool:
        """Has this rank written its files?"""
        return self._thread is None or not self._thread.is_alive()

    def fail(self, error: Exception) -> None:
        """What this rank wrote beside its tensors could not be written."""
        self._error = self._error or error

    def finish(self, control: dist.ProcessGroup) -> None:
        """On all ranks, once all have ``written``: rank 0 writes the metadata over all files.

        Raises UserError on all ranks where any could not write.
        """
        if self._thread is not None:
            self._thread.join()
        reason = None
        if self._error is not None:
            reason = self._could_not(self._error)
        agree(reason, control)
        try:
            for function in self._finalize:
                function()
        except (CheckpointException, OSError, RuntimeError) as error:
            raise UserError(self._could_not(error)) from error

    def _could_not(self, error: BaseException) -> str:
        return f"the checkpoint {self._folder} could not be written: {mendable(error) or error}"

    def _write(self, transforms: Any, buckets: list[Any], staged: bool) -> None:
        outcome: dict[int, Any] = {}
        try:
            for number in range(len(buckets)):
                bucket = buckets[number] if staged else _on_cpu(buckets[number])
                answers: queue.Queue[Any] = queue.Queue()
                counter: queue.Queue[Any] = queue.Queue()
                counter.put(number)
                filesystem_async.FileSystemWriterAsync.write_preloaded_data(
                    transforms, number, bucket, answers, counter, use_fsync=True
                )
                _, answer = answers.get()
                if isinstance(answer, Exception):
                    raise answer
                outcome[number] = answer
                file = Path(bucket[0])
                buckets[number] = bucket = None  # its copy is not needed any more
                # While the system still has what was written in memory.
                write_block_checksums(file)
        except Exception as error:
            self._error = error
        if self._results is not None:
            self._results.put(outcome)


def start_save(tensors: Sequence[ShardedTensor], folder: Path, *, background: bool) -> PendingSave:
    """Plan a save over all ranks into an existing folder, and write (or begin to write) it."""
    local_bytes = sum(t.data.nbytes for t in tensors)
    # Megatron would start a manager process for this queue.
    filesystem_async._results_queue = queue.Queue()
    options: dict[str, Any] = {}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        options["async_strategy"] = "mcore"  # from 0.17 on; its default needs another package
    request = dist_checkpointing.save(
        _by_number(tensors),
        str(folder),
        TorchDistSaveShardedStrategy(
            "torch_dist", 1, thread_count=max(1, -(-local_bytes // FILE_BYTES))
        ),
        async_sharded_save=True,
        **options,
    )
    return PendingSave(request, tensors, folder, background)


def load_into(tensors: Sequence[ShardedTensor], folder: Path) -> None:
    """Fill the tensors in place from a checkpoint written at any layout; collective.

    What is read of a file whose blocks have checksums is compared with them. Raises UserError that
    names a tensor which is missing, has another shape, or is none there; and, on all ranks,
    DamagedError that names a file which is not what was written, some tensors then being filled.
    """
    check_are_tensors(folder, {tensor.key for tensor in tensors})
    try:
        with _checked_reads():
            dist_checkpointing.load(
                _by_number(tensors), str(folder), validate_access_integrity=False
            )
    except (CheckpointingException, CheckpointException, KeyError, ValueError) as error:
        if isinstance(error, CheckpointException):
            for failure, _ in error.failures.values():
                if isinstance(failure, DamagedError):
                    told = str(failure).removeprefix(f"{folder}/")
                    raise DamagedError(f"{folder} is damaged: {told}") from error
        reason = str(error).strip("'\"")
        raise UserError(f"{folder} does not fit this model: {reason:.2000}") from error
    except RuntimeError as error:
        if "PytorchStreamReader" not in str(error):
            raise  # a collective's, say: another rank is gone
        raise DamagedError(f"{folder} is damaged: {error!s:.200}") from error


@contextmanager
def _checked_reads() -> Iterator[None]:
    """Meanwhile torch's readers open files that have checksums of their blocks as CheckedFile."""
    original = FileSystem.create_stream

    @contextmanager
    def create_stream(system: FileSystem, path: Any, mode: str) -> Iterator[Any]:
        checked = mode == "rb" and Path(f"{path}{BLOCKS_SUFFIX}").exists()
        with CheckedFile(Path(path)) if checked else original(system, path, mode) as stream:
            yield stream

    FileSystem.create_stream = create_stream  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        FileSystem.create_stream = original  # type: ignore[method-assign]


def _by_number(tensors: Sequence[ShardedTensor]) -> dict[str, ShardedTensor]:
    return {str(number): tensor for number, tensor in enumerate(tensors)}


def _memory(tensor: Any) -> int:
    return tensor.untyped_storage().data_ptr()


def _copied(buckets: list[Any], live: set[int]) -> list[Any]:
    """The buckets with every tensor that shares memory with the trainer's copied to the host."""

    def copy(tensor: Any) -> Any:
        if not tensor.is_cpu:
            return tensor.to("cpu")
        return tensor.clone() if _memory(tensor) in live else tensor

    return [
        (file, key, (data, [(item, copy(tensor)) for item, tensor in tensors]))
        for file, key, (data, tensors) in buckets
    ]


def _on_cpu(bucket: Any) -> Any:
    file, key, (data, tensors) = bucket
    return file, key, (data, [(item, tensor.to("cpu")) for item, tensor in tensors])
