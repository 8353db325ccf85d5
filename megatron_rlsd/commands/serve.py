"""The SGLang servers of this node, for a trainer that runs elsewhere.

    rlsd serve CONFIG.yaml [key=value ...]

Starts rollout.sglang.num_servers servers and, once all of them serve, writes their URLs to
run_dir/servers/NODE/urls. A server that dies is started again, rollout.sglang.max_restarts times in
all. SIGTERM or Ctrl-C ends them.
"""

from __future__ import annotations

from megatron_rlsd.config import config_parser


def main(argv: list[str] | None = None) -> int:
    arguments = config_parser(__doc__, "rlsd serve", settings=True).parse_intermixed_args(argv)
    # Slow to import: --help does without.
    from megatron_rlsd import serve

    return serve.main([str(arguments.config), *arguments.overrides])
