"""The reward functions of CONFIG behind HTTP, for trainers on other nodes.

    rlsd reward-server CONFIG.yaml [key=value ...]

Scores with reward.functions, under the limits of that section, in reward.workers processes at
reward.server.host and port. A trainer asks it with
{name: http, form: reward_server, url: http://NODE:8650}. CONFIG may be a run's, or hold nothing but
a reward section. SIGTERM or Ctrl-C ends it.
"""

from __future__ import annotations

from megatron_rlsd.config import config_parser
from megatron_rlsd.runtime.errors import UserError, tell


def main(argv: list[str] | None = None) -> int:
    arguments = config_parser(__doc__, "rlsd reward-server", settings=True).parse_intermixed_args(
        argv
    )
    # Slow to import: --help does without.
    from megatron_rlsd.config import load_config
    from megatron_rlsd.rewards.server import serve

    try:
        config = load_config(arguments.config, arguments.overrides, rewards_only=True)
        serve(config.reward)
    except UserError as error:
        return tell(error)
    return 0
