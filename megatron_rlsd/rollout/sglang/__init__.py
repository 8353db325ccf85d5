"""SGLang servers: starting them, watching them, and generating on them over HTTP."""

from megatron_rlsd.rollout.sglang.agreement import agreeing, set_nccl_switches
from megatron_rlsd.rollout.sglang.answers import RequestRefused, ServerFault
from megatron_rlsd.rollout.sglang.client import ServerFacts, SGLangClient
from megatron_rlsd.rollout.sglang.engine import SGLangEngine
from megatron_rlsd.rollout.sglang.process import giving_memory_back
from megatron_rlsd.rollout.sglang.reading import ReadingEngine
from megatron_rlsd.rollout.sglang.scorer import SGLangScorer
from megatron_rlsd.rollout.sglang.server import Server
from megatron_rlsd.rollout.sglang.update import Update

__all__ = [
    "ReadingEngine",
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
