"""Random models in Hugging Face folders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from megatron_rlsd.hf_bridge import family_for, save_hf_folder


def save_random_model(
    config: PretrainedConfig,
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer_of: Path | None = None,
) -> Path:
    """What transformers makes of ``config`` in float32, rounded to ``dtype``; ``folder`` again.

    ``tokenizer_of``: another model's folder, whose files beside the weights are copied.
    """
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype).save_pretrained(folder)
    for file in [] if tokenizer_of is None else tokenizer_of.iterdir():
        if not (folder / file.name).exists() and file.suffix != ".safetensors":
            shutil.copyfile(file, folder / file.name)
    return folder


def save_random_tensors(
    hf_config: dict[str, Any], folder: Path, generator: torch.Generator
) -> None:
    """Every tensor of the checkpoint, norms too, from a normal distribution, in float32."""
    family = family_for(hf_config)
    shapes = family.hf_shapes(family.dims(hf_config))
    tensors = ((n, torch.randn(shape, generator=generator)) for n, shape in shapes.items())
    save_hf_folder(tensors, folder, hf_config)
