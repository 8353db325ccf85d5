"""An engine inside the trainer's own process: transformers' model, our decoding loop.

For laptops, tests and models small enough to be held twice. What a server would add (paged
caches, fused kernels, tensor parallelism) is left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from megatron_rlsd.hf_bridge import SafetensorsFolder, max_positions
from megatron_rlsd.rollout.checks import check_request
from megatron_rlsd.rollout.decoding import DecodingBatch
from megatron_rlsd.rollout.engine import EngineError, ResponsesDone
from megatron_rlsd.rollout.routes import RouteRecorder, RoutesShape
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Generation, GenerationRequest


class EmbeddedEngine:
    """A RolloutEngine over ``transformers.AutoModelForCausalLM``.

    Serves decoder-only models with full attention in every layer (Llama, Qwen2, Qwen3 and their
    like). A request's tokens depend on its own seed and parameters, up to floating-point noise
    not on the other requests nor on ``max_batch_size``.

    hf_path: local folder with config.json and, unless load_weights is False, safetensors.
    dtype: of weights, cache and computation; sampling is done in float32 and float64.
    max_batch_size: most sequences decoded at once.
    load_weights: False leaves the weights to the first ``update_weights``; ``generate`` raises
        EngineError until then.
    routes: of a model with routed experts, to have generations say which experts tokens took.
    Raises EngineError for a missing folder, an architecture it does not serve, and weights that
    are missing, unknown or of the wrong shape.
    """

    def __init__(
        self,
        hf_path: str | Path,
        dtype: torch.dtype,
        max_batch_size: int,
        device: torch.device | str = "cpu",
        *,
        load_weights: bool = True,
        routes: RoutesShape | None = None,
    ) -> None:
        self._routes = routes
        self.on_progress: ResponsesDone | None = None
        if max_batch_size < 1:
            raise EngineError(f"max_batch_size must be at least 1, got {max_batch_size}")
        if not (Path(hf_path) / "config.json").is_file():
            raise EngineError(f"no config.json in {hf_path}")
        self.max_batch_size = max_batch_size
        self.device = torch.device(device)
        self._weight_version: int | None = 0 if load_weights else None
        try:
            config = AutoConfig.from_pretrained(
                hf_path, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            raise EngineError(f"transformers does not know the model in {hf_path}: {error}") from (
                error
            )
        _require_full_attention(config)
        # The trainer's random numbers must not depend on whether it holds an engine.
        with torch.random.fork_rng(devices=[]), _no_progress_bar():
            model = _load(hf_path, dtype) if load_weights else _build(config, dtype)
        self._model: Any = model.to(self.device).eval().requires_grad_(False)
        text_config = config.get_text_config()
        self._vocab_size: int = text_config.vocab_size
        self._max_positions = max_positions(text_config.to_dict())

    @property
    def weight_version(self) -> int:
        """Version of the weights in use; 0 for those it started with, or before it has any."""
        return self._weight_version or 0

    def generate(self, requests: list[GenerationRequest]) -> list[Generation]:
        """One generation per request, in order; see ``RolloutEngine.generate``.

        Raises EngineError, before anything is generated, for an empty prompt, token ids beyond the
        vocabulary, sampling parameters out of range, and sequences that could pass the model's
        max_position_embeddings; later for logits that are NaN.
        """
        model = self._open_model()
        if self._weight_version is None:
            raise EngineError("the engine has no weights yet: it waits for update_weights")
        for index, request in enumerate(requests):
            check_request(request, index, self._vocab_size, self._max_positions)
        if not requests:
            return []
        recorder = None if self._routes is None else RouteRecorder(model, self._routes)
        try:
            batch = DecodingBatch(model, requests, self.max_batch_size, self.device, recorder)
            rows = batch.run(self.on_progress)
        finally:
            if recorder is not None:
                recorder.close()
        return [
            Generation.of(
                row.token_ids,
                row.log_probs,
                row.finish_reason,
                self._weight_version,
                routed_experts=torch.cat(row.routes) if row.routes else None,
            )
            for row in rows
            if row.finish_reason is not None
        ]

    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Take every weight once from a stream of (Hugging Face name, full tensor): parameters, and
        buffers that checkpoints have, as DeepSeek's expert bias.

        Tensors of any dtype and device are copied to the engine's. For a model with tied
        embeddings one name of the pair is enough; both are taken when they are equal.

        The whole stream is staged before it replaces the old weights, so memory holds both for a
        moment. Names are those of checkpoints, whose experts transformers joins.

        Raises EngineError that lists unknown, repeated, missing, misshapen and unequal tied
        tensors; weights and version then stay as they were. The stream is read to its end even
        so, because the ranks that feed it may be meeting in collectives.
        """
        expected: dict[str, torch.Tensor] = self._open_model().state_dict(keep_vars=True)
        staged: dict[torch.Tensor, torch.Tensor] = {}
        seen: set[str] = set()
        problems: list[str] = []
        filled: Counter[str] = Counter()
        for name, tensor in tensors:
            joined = joined_name(name)
            if joined is not None and joined in expected:
                whole = expected[joined]
                staged.setdefault(whole, torch.empty_like(whole))
                place = part(name, staged[whole])
                if place is None or place.shape != tensor.shape or name in seen:
                    problems.append(f"{name}: repeated, misshapen or beyond the model's experts")
                else:
                    place.copy_(tensor)
                    filled[joined] += place.numel()
                seen.add(name)
                continue
            parameter = expected.get(model_name(name))
            if parameter is None:
                problems.append(f"{name}: unknown")
            elif name in seen:
                problems.append(f"{name}: repeated")
            elif tensor.shape != parameter.shape:
                got, wanted = list(tensor.shape), list(parameter.shape)
                problems.append(f"{name}: shape {got}, expected {wanted}")
            else:
                value = torch.empty_like(parameter).copy_(tensor)
                if parameter in staged and not torch.equal(staged[parameter], value):
                    problems.append(f"{name}: differs from the weight it is tied to")
                staged[parameter] = value
            seen.add(name)
        problems += [
            f"{name}: {expected[name].numel() - count} numbers are missing"
            for name, count in filled.items()
            if count != expected[name].numel()
        ]
        problems += [
            f"{name}: missing"
            for name, parameter in expected.items()
            if parameter not in staged and name not in seen
        ]
        if problems:
            raise EngineError(
                f"weights of version {version} do not fit the model; the old ones stay:\n  "
                + "\n  ".join(problems)
            )
        for parameter, value in staged.items():
            parameter.data = value
        self._weight_version = version

    def close(self) -> None:
        """Release the model; every later call raises EngineError."""
        self._model = None

    def _open_model(self) -> Any:
        if self._model is None:
            raise EngineError("the engine is closed")
        return self._model


def _load(hf_path: str | Path, dtype: torch.dtype) -> Any:
    try:
        SafetensorsFolder(hf_path)  # names what is damaged, or read differently by other programs
        model, info = AutoModelForCausalLM.from_pretrained(
            hf_path,
            dtype=dtype,
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, UserError) as error:
        raise EngineError(f"cannot load weights from {hf_path}: {error}") from error
    problems = [f"{kind}: {sorted(map(str, names))}" for kind, names in info.items() if names]
    if problems:
        raise EngineError(f"weights in {hf_path} do not fit the model; " + "; ".join(problems))
    return model


def _build(config: Any, dtype: torch.dtype) -> Any:
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
        )
    model.tie_weights()  # no_init_weights skips that too
    # As from_pretrained does: a bias that chooses experts is compared in full precision.
    precise = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for name, buffer in model.named_buffers():
        if precise.intersection(name.split(".")):
            buffer.data = buffer.to(torch.promote_types(dtype, torch.float32))
    return model


def _require_full_attention(config: Any) -> None:
    """The cache holds whole sequences: no sliding windows, no recurrent states."""
    text_config = config.get_text_config()
    layer_types = getattr(text_config, "layer_types", None)
    if layer_types is None:
        window = getattr(text_config, "sliding_window", None)
        layer_types = ["full_attention" if window is None else "sliding_attention"]
    others = sorted(set(layer_types) - {"full_attention"})
    if others:
        raise EngineError(
            f"the embedded engine serves full attention only; {config.model_type} has {others}"
        )


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Every rank loads the model; their bars would overwrite each other on the terminal."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(\w+)\.weight")
PARTS = {
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "down_proj": ("down_proj", None),
    "w1": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "w2": ("down_proj", None),
}
"""Projection -> the joined parameter and the half of its rows; Mixtral's names are w1 to w3."""


def model_name(name: str) -> str:
    """The name of a parameter in transformers' model, where the checkpoint's differs (Mixtral)."""
    return name.replace(".block_sparse_moe.", ".mlp.")


def joined_name(name: str) -> str | None:
    """The joined parameter that holds this expert's tensor; None: it is not an expert's."""
    found = EXPERT.fullmatch(model_name(name))
    if found is None or found[3] not in PARTS:
        return None
    return f"{found[1]}.experts.{PARTS[found[3]][0]}"


def part(name: str, joined: Tensor) -> Tensor | None:
    """The view of ``joined`` [experts, rows, columns] that the tensor ``name`` fills; None: there
    is not such an expert."""
    found = EXPERT.fullmatch(model_name(name))
    assert found is not None
    expert, half = int(found[2]), PARTS[found[3]][1]
    if expert >= joined.shape[0]:
        return None
    if half is None:
        return joined[expert]
    return joined[expert].chunk(2)[half]
