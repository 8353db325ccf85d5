"""Whole checkpoints from Hugging Face to Megatron and back, a piece at a time, in one process.

Neither a model nor a process group is built. To Megatron, memory holds one piece of one parameter
and ``BUCKET_BYTES``; to Hugging Face, one tensor and the pieces it comes from. That is at most
twice the largest tensor, fused ones counted whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megatron_rlsd
from megatron_rlsd.conversion.checkpoint_keys import (
    CheckpointTensor,
    checkpoint_tensors,
    layers_are_alike,
)
from megatron_rlsd.conversion.megatron_weights import HF_FILES, MegatronWeights
from megatron_rlsd.conversion.pickled import open_weights
from megatron_rlsd.conversion.restricted import METADATA_NAME
from megatron_rlsd.conversion.row_runs import Box, boxes, row_runs
from megatron_rlsd.conversion.tokenizer_fit import check_token_ids
from megatron_rlsd.conversion.torch_dist import Item, ItemFile, write_metadata
from megatron_rlsd.hf_bridge.companions import companion_files, copy_companions
from megatron_rlsd.hf_bridge.dims import ModelDims, ShardLayout
from megatron_rlsd.hf_bridge.families import family_for
from megatron_rlsd.hf_bridge.finite import finite_slice
from megatron_rlsd.hf_bridge.load import check_tensors, check_tied_aliases
from megatron_rlsd.hf_bridge.partial import PartialFolder, check_free_space
from megatron_rlsd.hf_bridge.reader import SINGLE_NAME, Weights, load_hf_config
from megatron_rlsd.hf_bridge.replaced import check_replaceable
from megatron_rlsd.hf_bridge.safetensors_file import TORCH_DTYPES
from megatron_rlsd.hf_bridge.safetensors_writer import Described, shard_files, write_safetensors
from megatron_rlsd.hf_bridge.writer import write_config, write_index
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.rounding import round_up

BUCKET_BYTES = 32 * 2**20
"""How much is read at once of what is cast before it is put in place."""
FILE_BYTES = 2 * 2**30
"""Size at which a rank's next file of a Megatron checkpoint begins: what an interruption costs."""
BytesDone = Callable[[int, int], None]
"""(bytes done, bytes in all)."""


@dataclass(frozen=True)
class Sizes:
    """Parallel sizes a Megatron checkpoint is cut for; it can be loaded at any others, too."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1

    def stage(self, layer: int, num_layers: int) -> int:
        """The pipeline stage of a layer: stages as even as can be, the first ones larger."""
        small, larger = divmod(num_layers, self.pipeline)
        boundary = larger * (small + 1)
        if layer < boundary:
            return layer // (small + 1)
        return larger + (layer - boundary) // small


@dataclass(frozen=True)
class _Piece:
    """One box of one parameter, and the rank whose file it goes to."""

    tensor: CheckpointTensor
    box: Box
    dtype: torch.dtype
    rank: int

    @property
    def nbytes(self) -> int:
        return torch.Size(self.box.sizes).numel() * self.dtype.itemsize


def to_megatron(
    hf_path: str | Path,
    out: str | Path,
    sizes: Sizes,
    *,
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
    finish: Callable[[Path], None] = lambda folder: None,
    overwrite: bool = False,
    progress: BytesDone = lambda done, total: None,
    file_bytes: int = FILE_BYTES,
) -> list[str]:
    """Write a Hugging Face folder's weights as a Megatron checkpoint in torch_dist format.

    Keys, shapes and pieces are those that a model of these parallel sizes saves. ``dtype`` casts
    all but the parameters in full precision; None keeps the stored dtype, the widest where the
    layers of one parameter differ. ``finish`` is called with the complete folder before it gets its
    name: the place to add a manifest.

    Everything that the headers show is checked before the first byte is written. An interrupted
    conversion goes on where it stopped if it is run again with the same source and settings.
    With ``overwrite`` a checkpoint in ``out`` is replaced; returns the names of other files there,
    which stay. Raises UserError (see ``load_hf_weights``, ``PartialFolder``), also for too little
    disk, and for an ``out`` that exists.
    """
    out = Path(out)
    hf_config = load_hf_config(hf_path)
    family = family_for(hf_config)
    vocab_size = family.dims(hf_config).vocab_size
    dims = family.dims(hf_config, round_up(vocab_size, sizes.tensor))
    _check_sizes(dims, sizes)
    weights = open_weights(hf_path, allow_pickle=allow_pickle)
    check_tensors(weights, family, dims, family.entries(dims))
    check_tied_aliases(weights, dims, family.entries(dims), ShardLayout())
    check_token_ids(hf_path, vocab_size)
    companion_files(Path(hf_path))  # what cannot go along is said before the work
    check_replaceable(out, Path(hf_path), METADATA_NAME, overwrite=overwrite)

    tensors = checkpoint_tensors(family, dims, layer_axis=layers_are_alike(family, hf_config))
    files = _plan_files(tensors, weights, dims, sizes, dtype, file_bytes)
    total = sum(piece.nbytes for pieces in files.values() for piece in pieces)
    check_free_space(out, total + total // 100)
    settings = {"sizes": asdict(sizes), "dtype": str(dtype), "file_bytes": file_bytes}
    items: list[Item] = []
    done = 0
    # One for all pieces: fresh memory for each costs more than copying it.
    scratch = bytearray(max(p.nbytes for pieces in files.values() for p in pieces))
    with PartialFolder(out, _fingerprint("to-megatron", weights, settings)) as folder:
        for name, pieces in files.items():
            if name not in folder.finished:
                with ItemFile(folder.path / name) as file:
                    for piece in pieces:
                        memory = memoryview(scratch)[: piece.nbytes]
                        value = torch.frombuffer(memory, dtype=piece.dtype)
                        value = value.view(piece.box.sizes)
                        _fill(value, piece, weights, dims)
                        _append(file, piece, value)
                        progress(done := done + piece.nbytes, total)
                folder.finish(name, [item.to_json() for item in file.items])
            else:
                progress(done := done + sum(piece.nbytes for piece in pieces), total)
            items += [Item.from_json(item) for item in folder.finished[name]]
        write_metadata(folder.path, items)
        hf_files = folder.path / HF_FILES
        hf_files.mkdir(exist_ok=True)
        dtypes = [piece.dtype for pieces in files.values() for piece in pieces]
        write_config(hf_files, hf_config, max(set(dtypes), key=dtypes.count))
        copy_companions(Path(hf_path), hf_files)
        finish(folder.path)
    return folder.kept


def to_hf(
    checkpoint: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    progress: BytesDone = lambda done, total: None,
) -> list[str]:
    """Write the weights of a Megatron checkpoint, of any layout, as a Hugging Face folder.

    ``dtype`` casts all but the parameters in full precision. Interruption, ``overwrite``, checks
    and errors as in ``to_megatron``; besides, the checksum of every piece that is read is verified.
    """
    out = Path(out)
    weights = MegatronWeights(checkpoint)
    check_token_ids(weights.hf_files, weights.dims.vocab_size)
    companion_files(weights.hf_files)
    check_replaceable(out, Path(checkpoint), "config.json", overwrite=overwrite)
    kept = {
        name
        for entry in weights.family.entries(weights.dims)
        if entry.full_precision
        for name in entry.hf_names
    }
    described = {
        name: Described(
            info.shape, TORCH_DTYPES[info.dtype] if dtype is None or name in kept else dtype
        )
        for name, info in weights.tensors.items()
    }
    total = sum(about.nbytes for about in described.values())
    check_free_space(out, total + total // 100)
    files = shard_files(described, max_shard_bytes, SINGLE_NAME)
    settings = {"dtype": str(dtype), "max_shard_bytes": max_shard_bytes}
    done = 0
    with PartialFolder(out, _fingerprint("to-hf", weights, settings)) as folder:
        for file, names in files.items():
            if file in folder.finished:
                progress(done := done + sum(described[n].nbytes for n in names), total)
                continue

            def tensors(names: list[str] = names) -> Iterator[tuple[str, Tensor]]:
                nonlocal done
                for name in names:
                    yield name, _cast(finite_slice(weights, name), described[name].dtype, name)
                    progress(done := done + described[name].nbytes, total)

            write_safetensors(folder.path / file, {n: described[n] for n in names}, tensors())
            folder.finish(file)
        if len(files) > 1:
            weight_map = {name: file for file, names in files.items() for name in names}
            write_index(folder.path, weight_map, total)
        dtypes = [about.dtype for about in described.values()]
        write_config(folder.path, weights.hf_config, max(set(dtypes), key=dtypes.count))
        copy_companions(weights.hf_files, folder.path)
    return folder.kept


def _check_sizes(dims: ModelDims, sizes: Sizes) -> None:
    dims.check(
        ShardLayout(tp_size=sizes.tensor, ep_size=sizes.expert, etp_size=sizes.expert_tensor)
    )
    if not 1 <= sizes.pipeline <= dims.num_layers:
        raise UserError(
            f"pipeline parallel size {sizes.pipeline} must be from 1 to "
            f"num_layers={dims.num_layers}"
        )


def _plan_files(
    tensors: list[CheckpointTensor],
    weights: Weights,
    dims: ModelDims,
    sizes: Sizes,
    dtype: torch.dtype | None,
    file_bytes: int,
) -> dict[str, list[_Piece]]:
    """File name -> its pieces. Ranks' files hold what those ranks of the layout would save."""
    dtypes = _dtypes(tensors, weights, dtype)
    by_rank: dict[int, list[_Piece]] = {}
    width = max(sizes.tensor, sizes.expert_tensor)
    for tensor in tensors:
        entry = tensor.entry
        stage = {"first": 0, "last": sizes.pipeline - 1}.get(entry.part)
        if stage is None:
            stage = sizes.stage(entry.layer or 0, dims.num_layers)
        ep_rank = 0 if entry.expert is None else entry.expert // (dims.num_experts // sizes.expert)
        ranks = sizes.tensor if entry.expert is None else sizes.expert_tensor
        for box in boxes(entry.mapping, dims, ranks):
            rank = (stage * sizes.expert + ep_rank) * width + box.rank
            piece = _Piece(tensor, box, dtypes[tensor.key], rank)
            by_rank.setdefault(rank, []).append(piece)
    files: dict[str, list[_Piece]] = {}
    for rank, pieces in sorted(by_rank.items()):
        size, number = 0, 0
        for piece in pieces:
            if size and size + piece.nbytes > file_bytes:
                size, number = 0, number + 1
            files.setdefault(f"__{rank}_{number}.distcp", []).append(piece)
            size += piece.nbytes
    return files


def _dtypes(
    tensors: list[CheckpointTensor], weights: Weights, dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Key -> dtype of its global tensor, which the layers on a prepended axis share."""
    found: dict[str, torch.dtype] = {}
    for tensor in tensors:
        for name in tensor.entry.hf_names:
            stored = TORCH_DTYPES[weights.tensors[name].dtype]
            if tensor.entry.full_precision:
                stored = torch.float32
            elif dtype is not None:
                stored = dtype
            found[tensor.key] = torch.promote_types(stored, found.get(tensor.key, stored))
    return found


def _fill(out: Tensor, piece: _Piece, weights: Weights, dims: ModelDims) -> None:
    """Set ``out`` to the piece's values; rows of padding are zero.

    A cast takes ``BUCKET_BYTES`` at a time.
    """
    mapping, names = piece.tensor.entry.mapping, piece.tensor.entry.hf_names
    (top, *other), (rows, *widths) = piece.box.offsets, piece.box.sizes
    columns = tuple((o, o + w) for o, w in zip(other, widths, strict=True))
    filled = 0
    for run in row_runs(mapping, dims):
        first, last = max(top, run.row), min(top + rows, run.row + run.count)
        name = names[run.source]
        info = weights.tensors[name]
        straight = TORCH_DTYPES[info.dtype] == piece.dtype
        step = rows if straight else max(1, BUCKET_BYTES * info.shape[0] // info.nbytes)
        for row in range(first, last, step):
            stop = min(last, row + step)
            source = run.source_row + row - run.row
            ranges = ((source, source + stop - row), *columns)
            target = out[row - top : stop - top]
            if straight:
                finite_slice(weights, name, ranges, target)
            else:
                target.copy_(_cast(finite_slice(weights, name, ranges), piece.dtype, name))
            filled += stop - row
    if filled < rows:
        out[filled:] = 0


def _append(file: ItemFile, piece: _Piece, value: Tensor) -> None:
    tensor = piece.tensor
    stored = value.view(*(1,) * len(tensor.axes), *value.shape)
    file.add(tensor.key, stored, (*tensor.place, *piece.box.offsets), tensor.global_shape)
    if tensor.extra_state is not None and not any(piece.box.offsets):
        file.add_empty_object(tensor.extra_state)


def _cast(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """``value`` in ``dtype``; a finite number must not become an infinite one."""
    if value.dtype == dtype:
        return value
    cast = value.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(value.dtype).max:
        lost = cast.isinf() & value.isfinite()
        if lost.any():
            worst = value[lost].abs().max().item()
            raise UserError(f"{name} holds {worst:.4g}, which {dtype} cannot hold")
    return cast


def _fingerprint(kind: str, weights: Weights, settings: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for a later attempt to build on an earlier one."""
    files = sorted(p for p in weights.path.iterdir() if p.is_file())
    return {
        "conversion": kind,
        "version": megatron_rlsd.__version__,
        "source": str(weights.path.resolve()),
        "files": [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files],
        "settings": settings,
    }
