"""A model that is evaluated as it is, and an engine that answers with it: no trainer is built."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rlsd.checkpoint.manifest import MANIFEST_NAME, read_manifest
from megatron_rlsd.config import Config
from megatron_rlsd.conversion.convert import to_hf
from megatron_rlsd.conversion.megatron_weights import HF_FILES, MegatronWeights
from megatron_rlsd.hf_bridge import load_hf_config
from megatron_rlsd.rollout.collective import CollectiveEngine
from megatron_rlsd.rollout.embedded import EmbeddedEngine
from megatron_rlsd.rollout.engine import RolloutEngine
from megatron_rlsd.rollout.sglang import ReadingEngine, SGLangEngine
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.runtime.machine import device

CONVERTED = ".weights"
"""Where servers find a Megatron checkpoint's weights while they run."""


@dataclass(frozen=True)
class EvaluatedModel:
    """A Hugging Face folder, or a Megatron checkpoint of any layout."""

    path: Path
    hf_files: Path
    """The folder with its config.json and tokenizer."""
    step: int | None
    """Training steps of a checkpoint; None: a Hugging Face folder, which does not say."""

    @classmethod
    def at(cls, path: Path) -> EvaluatedModel:
        """Raises UserError where there is neither, or a damaged checkpoint."""
        if (path / MANIFEST_NAME).is_file():
            return cls(path, path / HF_FILES, read_manifest(path).step)
        if (path / "config.json").is_file():
            return cls(path, path, None)
        if not path.exists():
            raise UserError(f"--model {path} does not exist; it must be a folder on this machine")
        found = [*path.glob("hf/*/config.json"), *path.glob(f"checkpoints/step_*/{MANIFEST_NAME}")]
        if found:
            choices = ", ".join(sorted(str(each.parent) for each in found))
            raise UserError(f"--model {path} is a run's folder; name one of its models: {choices}")
        raise UserError(
            f"--model {path} holds neither a config.json (a Hugging Face folder) nor a "
            f"{MANIFEST_NAME} (a checkpoint)"
        )

    @property
    def is_checkpoint(self) -> bool:
        return self.step is not None

    @property
    def hf_config(self) -> dict[str, Any]:
        return load_hf_config(self.hf_files)

    @property
    def max_positions(self) -> int | None:
        value = self.hf_config.get("max_position_embeddings")
        return value if isinstance(value, int) else None

    def run_config(self) -> Path | None:
        """config.yaml of the run that wrote it: RUN/hf/NAME, RUN/checkpoints/step_N."""
        run = self.path.absolute().parent.parent
        written = (run / "config.yaml").is_file() and (run / "metrics.jsonl").is_file()
        return run / "config.yaml" if written else None


@contextmanager
def answering(config: Config, model: EvaluatedModel, out: Path) -> Iterator[RolloutEngine]:
    """``rollout.engine`` with the model's weights; servers are those at urls, or started here.

    A checkpoint's weights are read straight into the embedded engine; for servers they are
    converted to a folder in ``out`` that is removed again.
    """
    rollout = config.rollout
    vocab_size = model.hf_config["vocab_size"]
    with ExitStack() as stack:
        if rollout.engine == "embedded":
            engine = embedded_engine(config, model)
            stack.callback(engine.close)
            yield engine
        elif rollout.sglang.urls:
            yield ReadingEngine(rollout.sglang, vocab_size, model.max_positions)
        else:
            folder = model.path
            if model.is_checkpoint:
                folder = out / CONVERTED
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
                to_hf(model.path, folder)
            servers = SGLangEngine(
                rollout.sglang,
                hf_path=folder,
                dtype=config.model.dtype,
                vocab_size=vocab_size,
                max_positions=model.max_positions,
                run_dir=out,
            )
            stack.callback(servers.close)
            servers.wait_until_ready()
            yield servers


def embedded_engine(config: Config, model: EvaluatedModel) -> EmbeddedEngine:
    """A replica on this rank's device."""
    engine = EmbeddedEngine(
        model.hf_files,
        getattr(torch, config.model.dtype),
        config.rollout.embedded.max_batch_size,
        device=device(),
        load_weights=not model.is_checkpoint,
    )
    if model.step is not None:
        weights = MegatronWeights(model.path)
        engine.update_weights(((name, weights.slice(name)) for name in weights.tensors), model.step)
    return engine


@contextmanager
def shared_by_ranks(engine: RolloutEngine) -> Iterator[CollectiveEngine | None]:
    """Under torchrun: one engine of all ranks' replicas; None where this is the only process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    assert isinstance(engine, EmbeddedEngine)
    dist.init_process_group("gloo")
    try:
        group = dist.group.WORLD
        assert group is not None
        yield CollectiveEngine(engine, group)
    finally:
        dist.destroy_process_group()


def own_dtype(model: EvaluatedModel) -> str:
    """float32 on a CPU, else as config.json says, if that is one that engines take."""
    named = model.hf_config.get("dtype") or model.hf_config.get("torch_dtype")
    return "float32" if device().type == "cpu" or named == "float32" else "bfloat16"


def described(model: EvaluatedModel) -> dict[str, Any]:
    """For the results: where it lies, and what it is."""
    return json.loads(
        json.dumps(
            {
                "path": str(model.path),
                "kind": "checkpoint" if model.is_checkpoint else "huggingface",
                "step": model.step,
                "model_type": model.hf_config.get("model_type"),
            }
        )
    )
