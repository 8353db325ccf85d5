"""A Megatron checkpoint seen as the Hugging Face tensors that it holds."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_rlsd.conversion.checkpoint_keys import (
    MODEL_PREFIXES,
    CheckpointTensor,
    checkpoint_tensors,
)
from megatron_rlsd.conversion.restricted import METADATA_NAME
from megatron_rlsd.conversion.row_runs import row_runs
from megatron_rlsd.conversion.torch_dist import TorchDistFolder
from megatron_rlsd.hf_bridge.families import family_for
from megatron_rlsd.hf_bridge.mappings import Ranges, Shape
from megatron_rlsd.hf_bridge.reader import load_hf_config
from megatron_rlsd.hf_bridge.safetensors_file import DTYPE_NAMES, TensorInfo
from megatron_rlsd.hf_bridge.wording import listed
from megatron_rlsd.runtime.errors import UserError

HF_FILES = "hf"
"""The folder inside a checkpoint with config.json, tokenizer and generation files."""
_EMBEDDING = "embedding.word_embeddings.weight"


class MegatronWeights:
    """Reads a checkpoint of any layout; its optimizer and teacher state are left alone.

    Held at a time are the tensor that is asked for and one of the pieces it is stored in, or, of a
    fused parameter (queries, keys, values), all of its pieces.
    Raises UserError for model tensors that are missing, unknown, of another shape, or not
    tiled by their pieces, and for the config.json in its ``hf`` folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.hf_files = self.path / HF_FILES
        if not (self.hf_files / "config.json").is_file():
            _refuse_folder_of_checkpoints(self.path)
            raise UserError(
                f"{self.hf_files / 'config.json'} is missing: it says which model the "
                "checkpoint's tensors are"
            )
        self.hf_config = load_hf_config(self.hf_files)
        self.family = family_for(self.hf_config)
        self._stored = TorchDistFolder(path)
        embedding = self._stored.tensors.get(_EMBEDDING)
        padded = int(embedding.size[0]) if embedding is not None else None
        self.dims = self.family.dims(self.hf_config, padded_vocab_size=padded)
        self.tensors: dict[str, TensorInfo] = {}
        """Hugging Face name -> shape and dtype, in the order of export."""
        self._places: dict[str, tuple[CheckpointTensor, int]] = {}
        self._cached: tuple[CheckpointTensor | None, dict[int, Tensor]] = (None, {})
        alike = not any(key.startswith("decoder.layers.0.") for key in self._stored.tensors)
        expected = checkpoint_tensors(self.family, self.dims, layer_axis=alike)
        self._keys = self._match(expected)
        for tensor in expected:
            dtype = DTYPE_NAMES[self._stored.dtype(self._keys[tensor.key])]
            shapes = tensor.entry.mapping.hf_shapes(self.dims)
            for source, (name, shape) in enumerate(zip(tensor.entry.hf_names, shapes, strict=True)):
                size = torch.Size(shape).numel() * self.torch_dtype(tensor).itemsize
                self.tensors[name] = TensorInfo(shape, dtype, tensor.key, size)
                self._places[name] = (tensor, source)

    def slice(self, name: str, ranges: Ranges = (), out: Tensor | None = None) -> Tensor:
        """The part of a tensor within ``ranges``: (start, stop) of each leading dimension.

        The whole tensor is read. The next tensor of a fused parameter reuses its pieces.
        """
        tensor, source = self._places[name]
        part = self._assemble(tensor, source, self.tensors[name].shape)
        if ranges:
            part = part[tuple(slice(*pair) for pair in ranges)]
        return part if out is None else out.copy_(part)

    def torch_dtype(self, tensor: CheckpointTensor) -> torch.dtype:
        return self._stored.dtype(self._keys[tensor.key])

    def _assemble(self, tensor: CheckpointTensor, source: int, shape: Shape) -> Tensor:
        key = self._keys[tensor.key]
        runs = [run for run in row_runs(tensor.entry.mapping, self.dims) if run.source == source]
        out = torch.empty(shape, dtype=self.torch_dtype(tensor))
        for offsets, sizes, number in self._stored.pieces(key, tensor.place):
            top, bottom = offsets[0], offsets[0] + sizes[0]
            columns = tuple(slice(o, o + s) for o, s in zip(offsets[1:], sizes[1:], strict=True))
            for run in runs:
                first, last = max(top, run.row), min(bottom, run.row + run.count)
                if first >= last:
                    continue
                row = run.source_row + first - run.row
                target = out[(slice(row, row + last - first), *columns)]
                if tuple(target.shape) == sizes and target.is_contiguous():
                    self._stored.read_piece(key, number, tensor.place, target)
                    continue
                piece = self._piece(tensor, key, number)
                target.copy_(piece[first - top : last - top])
                del piece
        return out

    def _piece(self, tensor: CheckpointTensor, key: str, number: int) -> Tensor:
        """A stored piece, kept for the parameter's other tensors if it has any."""
        if len(tensor.entry.hf_names) == 1:
            return self._stored.read_piece(key, number, tensor.place)
        if self._cached[0] is not tensor:
            self._cached = (tensor, {})
        pieces = self._cached[1]
        if number not in pieces:
            pieces[number] = self._stored.read_piece(key, number, tensor.place)
        return pieces[number]

    def _match(self, expected: list[CheckpointTensor]) -> dict[str, str]:
        """Each expected key -> the key under which the checkpoint has it."""
        keys: dict[str, str] = {}
        problems, missing = [], []
        for tensor in expected:
            if tensor.key in keys:
                continue
            found = [k for k in (tensor.key, *tensor.other_keys) if k in self._stored.tensors]
            if not found:
                missing.append(tensor.key)
                continue
            keys[tensor.key] = found[0]
            size = tuple(self._stored.tensors[found[0]].size)
            if size != tensor.global_shape:
                problems.append(f"{found[0]} has shape {size}, expected {tensor.global_shape}")
        extra = [
            key
            for key in self._stored.tensors
            if key.startswith(MODEL_PREFIXES) and key not in keys.values()
        ]
        if missing:
            problems.insert(0, f"missing: {listed(sorted(set(missing)))}")
        if extra:
            problems.append(
                f"no part of a {self.family.name} model of this config: {listed(extra)}"
            )
        if problems:
            raise UserError(
                f"the tensors in {self.path} are not the model's:\n  " + "\n  ".join(problems)
            )
        self._stored.check_tiling(sorted(set(keys.values())))
        return keys


def _refuse_folder_of_checkpoints(path: Path) -> None:
    """Raise UserError that names the newest checkpoint, where a run's folder was given for it."""
    if (path / METADATA_NAME).is_file():
        return
    for pattern in ("step_*", "checkpoints/step_*"):
        found = sorted(f.parent for f in path.glob(f"{pattern}/{METADATA_NAME}"))
        if found:
            raise UserError(
                f"{path} is not a checkpoint but holds {len(found)} of them; "
                f"the newest is {found[-1]}"
            )
