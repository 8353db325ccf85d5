"""Whose turn it is with devices that the trainer and the rollout servers share."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_rlsd.actor.actor import Actor
from megatron_rlsd.rollout.engine import TrainerEngine


class Colocation:
    """Passes the devices' memory between trainer and servers (``rollout.colocated``). Collective.

    The trainer's weights, those of the servers and their cache are never all there together with
    what an update needs:

        trainer_takes_over  servers free weights and cache | the optimizer's state comes back
        servers_take_over   the optimizer's state leaves, gradients are freed | memory for weights
        (a publication)
        weights_arrived     the trainer frees what publishing left | memory for the cache

    Where devices are not ``shared`` every call does nothing.
    """

    def __init__(
        self, actor: Actor, engine: TrainerEngine, control: dist.ProcessGroup, *, shared: bool
    ) -> None:
        self._actor, self._engine, self._control = actor, engine, control
        self._shared = shared
        self._trainer_has_them = True

    def trainer_takes_over(self) -> None:
        """Before an update, once no response is under way; nothing if the trainer has its turn."""
        if not self._shared or self._trainer_has_them:
            return
        self._engine.sleep()
        # Only now is there memory on the other ranks' devices.
        dist.barrier(self._control)
        self._actor.take_room()
        self._trainer_has_them = True

    def servers_take_over(self) -> None:
        """Before a publication; nothing if the servers have their turn."""
        if not self._shared or not self._trainer_has_them:
            return
        self._actor.make_room()
        # No rank's memory is needed for training any more once all are here.
        dist.barrier(self._control)
        self._engine.wake("weights")
        self._trainer_has_them = False

    def weights_arrived(self) -> None:
        """After a publication: the servers can sample when this returns on rank 0."""
        if not self._shared:
            return
        give_back_cached_memory()
        dist.barrier(self._control)
        self._engine.wake("kv_cache")


def give_back_cached_memory() -> None:
    """Return GPU memory that torch holds free to the device, buckets that servers read included."""
    if torch.cuda.is_available():
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()
