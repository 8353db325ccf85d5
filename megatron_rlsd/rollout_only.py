"""Sample and score responses without training: to look at a model, a data set or a reward.

    torchrun --nproc-per-node N -m megatron_rlsd.rollout_only CONFIG.yaml [key=value ...]

Runs ``train.steps`` rollouts and writes what training would write of them: metrics.jsonl and
samples/ (set observability.samples_per_step as high as wanted). The weights are those of
model.hf_path or of the checkpoint ``train.resume``; use a run_dir of its own.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what may be missing is imported
    from megatron_rlsd.runtime.missing import tell_missing

    tell_missing()

import sys

from megatron_rlsd.config import Config
from megatron_rlsd.diagnosis.before_run import refuse
from megatron_rlsd.run import assemble, main


def rollout_only(config: Config) -> None:
    """Every step's questions and seeds are those that training would use at that step."""
    steps = config.train.steps
    with assemble(config, total_updates=None, total_steps=steps, program="rollout_only") as run:
        run.continuity.load_weights(run.actor)
        run.colocation.servers_take_over()
        run.publish_weights(version=0)
        if config.eval.at_start:
            run.evaluate(step=0)
        for step in range(steps):
            with run.phase("rollout", step):
                groups, _, metrics = run.rollout(step)
            run.log.samples(step, groups)
            run.log.step(step, metrics)
            run.alarm(step, metrics, groups)  # which only warns here: the number of steps is known
        run.log.summary()


if __name__ == "__main__":
    sys.exit(main(rollout_only, sys.argv[1:], __doc__ or "", refuse))
