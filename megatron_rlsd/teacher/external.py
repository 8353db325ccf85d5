"""A teacher that is another model: a second HF folder, scored by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from megatron_rlsd.hf_bridge import SafetensorsFolder
from megatron_rlsd.hf_bridge.finite import check_finite
from megatron_rlsd.ops import token_log_probs
from megatron_rlsd.runtime.errors import UserError

if TYPE_CHECKING:
    from megatron_rlsd.types import IntArray


class ExternalTeacher:
    """Holds the whole model on this rank; the ranks that share sequences share the work.

    Sequences are scored one at a time, from the last hidden states, without full logits. The model
    is loaded in the student's precision; it is not part of checkpoints, since it never changes.
    """

    def __init__(
        self, hf_path: str, *, vocab_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Raises UserError where the folder or its vocabulary does not fit."""
        if not (Path(hf_path) / "config.json").is_file():
            raise UserError(f"teacher.hf_path={hf_path}: no config.json there")
        if any(Path(hf_path).glob("*.safetensors")):
            SafetensorsFolder(hf_path)  # as the student's: whole, and one checkpoint
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                hf_path,
                dtype=dtype,
                attn_implementation="sdpa",
                local_files_only=True,
                trust_remote_code=False,
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"teacher.hf_path={hf_path} does not load: {error}") from error
        for name, parameter in model.named_parameters():
            check_finite(parameter.detach(), f"{name} in teacher.hf_path={hf_path}")
        found = model.config.vocab_size
        if found != vocab_size:
            raise UserError(
                f"teacher.hf_path={hf_path} embeds {found} tokens and the student {vocab_size}: "
                "on-policy distillation needs the same tokenizer"
            )
        self._model = model.to(device).eval().requires_grad_(False)
        self._device = device
        if not self._has_plain_head():
            raise UserError(
                f"teacher.hf_path={hf_path}: {type(model).__name__} does more to its logits than "
                "one product with the head's weight (a cap, a scale, a bias), which is all that "
                "the scoring of teachers does"
            )

    @torch.no_grad()
    def _has_plain_head(self) -> bool:
        ids = torch.arange(3, device=self._device)[None]
        logits = self._model(input_ids=ids).logits.float()
        hidden = self._model.base_model(input_ids=ids).last_hidden_state
        product = (hidden @ self._model.get_output_embeddings().weight.T).float()
        return bool((product - logits).abs().max() <= 2e-2 * logits.abs().max())

    @torch.no_grad()
    def log_probs(
        self,
        sequences: list[tuple[IntArray, IntArray]],
        temperature: float,
        sharers: list[dist.ProcessGroup],
    ) -> list[Tensor]:
        """[T] log-probabilities of each response, in the order of ``sequences``, on every sharer.

        Args:
            sequences: pairs of prompt and response ids, both non-empty.
            temperature: divides the logits.
            sharers: groups whose ranks give the same sequences (tensor and context parallel): each
                scores its part, and one all-reduce over each group completes all of them.
        """
        part, parts = 0, 1
        for group in sharers:
            part += parts * group.rank()
            parts *= group.size()
        lengths = [len(response) for _, response in sequences]
        flat = torch.zeros(sum(lengths), device=self._device)
        rows = list(flat.split(lengths)) if sequences else []
        weight = self._model.get_output_embeddings().weight
        for index in range(part, len(sequences), parts):
            prompt, response = sequences[index]
            ids = torch.from_numpy(np.concatenate([prompt, response[:-1]])).to(self._device)[None]
            hidden = self._model.base_model(input_ids=ids).last_hidden_state[0]
            log_probs, _ = token_log_probs(
                hidden[len(prompt) - 1 :],
                weight,
                torch.from_numpy(response).to(self._device, torch.int64),
                temperature=temperature,
            )
            rows[index].copy_(log_probs)
        for group in sharers:
            if group.size() > 1 and flat.numel():
                dist.all_reduce(flat, group=group)
        return rows
