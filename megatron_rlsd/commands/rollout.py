"""Sample and score responses without training: to look at a model, a data set or a reward.

    rlsd rollout CONFIG.yaml [--nproc N] [key=value ...]

Runs train.steps rollouts and writes what training would write of them: metrics.jsonl and samples/.
The weights are those of model.hf_path or of the checkpoint train.resume; use a run_dir of its own.
--nproc and the exit codes are those of rlsd train.
"""

from __future__ import annotations

from megatron_rlsd.commands.launching import start


def main(argv: list[str] | None = None) -> int:
    return start("rollout", argv, __doc__)
