"""Supervised warm start, with the same configuration and the same trainer.

    rlsd sft CONFIG.yaml [--nproc N] [key=value ...]

The target is prompts.sft_response, or in a conversation all turns of the assistant. --nproc and the
exit codes are those of rlsd train.
"""

from __future__ import annotations

from megatron_rlsd.commands.launching import start


def main(argv: list[str] | None = None) -> int:
    return start("sft", argv, __doc__)
