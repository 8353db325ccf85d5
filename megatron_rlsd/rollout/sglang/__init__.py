"""SGLang servers: starting them, watching them, and generating on them over HTTP."""

from megatron_rlsd.rollout.sglang.agreement import agreeing, set_nccl_switches
from megatron_rlsd.rollout.sglang.client import (
    RequestRefused,
    ServerFacts,
    ServerFault,
    SGLangClient,
)
from megatron_rlsd.rollout.sglang.engine import SGLangEngine
from megatron_rlsd.rollout.sglang.fleet import Update
from megatron_rlsd.rollout.sglang.process import giving_memory_back
from megatron_rlsd.rollout.sglang.scorer import SGLangScorer
from megatron_rlsd.rollout.sglang.server import Server

__all__ = [
    "RequestRefused",
    "SGLangClient",
    "SGLangEngine",
    "SGLangScorer",
    "Server",
    "ServerFacts",
    "ServerFault",
    "Update",
    "agreeing",
    "giving_memory_back",
    "set_nccl_switches",
]
