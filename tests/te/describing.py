"""What ranks tell of a Transformer Engine for test_stand_in.py."""

from __future__ import annotations

import inspect
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.te import engine

MARKS = (
    *("tensor_model_parallel", "partition_dim", "partition_stride"),
    *("sequence_parallel", "allreduce"),
)


class _StandIn:
    """Unpickled, it has installed the stand-in, whatever else is there."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return install_stand_in, ()


STAND_IN_BEFORE: list[Any] = [_StandIn()]


def install_stand_in() -> None:
    engine.IS_REAL = False
    engine.install()


def describe(out: str) -> None:
    import transformer_engine
    from transformer_engine import pytorch as te

    from megatron_rlsd.actor import model as actor_model
    from megatron_rlsd.hf_bridge import family_for, load_hf_config
    from megatron_rlsd.parallel.groups import parallel_world
    from tests.distributed.layouts import Layout, layout_config, save_latent_model

    with tempfile.TemporaryDirectory() as folder:
        path = save_latent_model(Path(folder))
        config = layout_config(Layout(2, model="deepseek", tensor=2, sequence=True), str(path))
        hf_config = load_hf_config(path)
        family = family_for(hf_config)
        settings = actor_model.transformer_config(
            config.model, config.parallel, family, hf_config, "transformer_engine"
        )
        shape = family.dims(hf_config)
        with parallel_world(config.parallel, shape, timeout_seconds=60, seed=0) as groups:
            parameters = {name: described(m) for name, m in modules(te, groups.tp).items()}
            with mock.patch.object(actor_model, "set_marks", return_value=[]):
                chunks = actor_model.build_model(
                    settings, family, hf_config, groups, "transformer_engine"
                )
    report = {
        "path": transformer_engine.__file__,
        "version": transformer_engine.__version__,
        "signatures": {
            name: [
                [p.name, p.kind.name] for p in inspect.signature(cls.__init__).parameters.values()
            ]
            for name, cls in ((name, getattr(te, name)) for name in engine.FORWARDS)
        },
        "parameters": parameters,
        "model": described(chunks[0]),
    }
    if os.environ["RANK"] == "1":
        Path(out).write_text(json.dumps(report))


def modules(te: Any, group: dist.ProcessGroup) -> dict[str, torch.nn.Module]:
    """Each kind in each mode, as Megatron's wrappers make them."""
    made: dict[str, torch.nn.Module] = {
        "norm": te.RMSNorm(8, eps=1e-6, sequence_parallel=True, device="cpu", dtype=torch.float32)
    }
    common = {"init_method": torch.nn.init.zeros_, "device": "cpu", "params_dtype": torch.float32}
    for mode in ("column", "row", None):
        for bias in (False, True):
            settings = common | {
                "parallel_mode": mode,
                "bias": bias,
                "sequence_parallel": True,
                "tp_group": group if mode else None,
                "tp_size": group.size() if mode else 1,
            }
            made[f"Linear {mode} {bias}"] = te.Linear(8, 12, **settings)
            if mode != "row":
                made[f"LayerNormLinear {mode} {bias}"] = te.LayerNormLinear(
                    8, 12, normalization="RMSNorm", **settings
                )
            if not bias:
                made[f"GroupedLinear {mode}"] = te.GroupedLinear(2, 8, 12, **settings)
    return made


def described(module: torch.nn.Module) -> dict[str, list[Any]]:
    return {
        name: [list(p.shape), str(p.dtype), {m: getattr(p, m) for m in MARKS if hasattr(p, m)}]
        for name, p in module.named_parameters()
    }
