"""Worker processes that run users' code within limits; what they run is the caller's."""

from megatron_rlsd.workers.jobs import Job, Outcomes
from megatron_rlsd.workers.pool import WORKER_MEMORY_BYTES, WorkerPool
from megatron_rlsd.workers.serving import Calls, StillAlive, problem_of, serve

__all__ = [
    "WORKER_MEMORY_BYTES",
    "Calls",
    "Job",
    "Outcomes",
    "StillAlive",
    "WorkerPool",
    "problem_of",
    "serve",
]
