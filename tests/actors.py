"""The actor of a configuration, without the program around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_rlsd.actor.actor import Actor
from megatron_rlsd.config import Config
from megatron_rlsd.hf_bridge import family_for, load_hf_config
from megatron_rlsd.parallel.groups import parallel_world


@contextmanager
def actor_of(
    config: Config, updates: int | None, *, seconds: float, seed: int = 0
) -> Iterator[Actor]:
    """On every rank: the actor that makes so many updates (None: it makes none), with
    ``model.hf_path``'s weights, in process groups that end with the block."""
    hf_config = load_hf_config(config.model.hf_path)
    family = family_for(hf_config)
    shape = family.dims(hf_config)
    with parallel_world(config.parallel, shape, timeout_seconds=seconds, seed=seed) as groups:
        yield Actor(config, family, hf_config, groups, updates)
