"""RLSD training: one step, in order.

    torchrun --nproc-per-node N -m megatron_rlsd.train CONFIG.yaml [key=value ...]

The verifier's reward decides the direction of every update; the same model under a privileged
prompt decides how much credit each token gets (arXiv:2604.03128).
"""

from __future__ import annotations

import sys

from megatron_rlsd.algorithms import lambda_at
from megatron_rlsd.config import Config
from megatron_rlsd.learner import Learner
from megatron_rlsd.run import assemble, main


def train(config: Config) -> None:
    """Run ``train.steps`` steps; see megatron_rlsd/config.py for every setting."""
    rollouts = config.train.steps
    trajectories = config.rollout.prompts_per_step * config.rollout.n_samples_per_prompt
    updates = trajectories // (config.train.global_batch_size or trajectories)
    total_updates = rollouts * updates * config.train.epochs_per_rollout

    with assemble(config, total_updates=total_updates, total_steps=rollouts) as run:
        learner = Learner(config, run.actor)
        log = run.log
        run.publish_weights(version=0)
        if config.eval.at_start:
            run.evaluate(step=0)

        for step in range(config.train.steps):
            rlsd_lambda = lambda_at(step, config.algorithm)

            with log.phase("rollout"):
                groups, batch, metrics = run.rollout(step)

            with log.phase("score"):
                splits = learner.split(batch, step)
                scores = learner.score(batch, splits, rlsd_lambda)

            with log.phase("update"):
                metrics |= learner.update(batch, splits, scores, rlsd_lambda)
                learner.teacher.after_step(step)

            with log.phase("weight_sync"):
                run.publish_weights(version=step + 1)

            metrics["algorithm/lambda"] = rlsd_lambda
            log.samples(step, groups)
            log.step(step, metrics)

            done = step + 1
            if config.eval.interval and done % config.eval.interval == 0:
                run.evaluate(done)
            if config.checkpoint.hf_export_interval and (
                done % config.checkpoint.hf_export_interval == 0
            ):
                run.export_hf(f"step_{done}")

        if not config.eval.interval or config.train.steps % config.eval.interval:
            run.evaluate(config.train.steps)
        run.export_hf("final")
        log.summary()


if __name__ == "__main__":
    sys.exit(main(train, sys.argv[1:], __doc__ or ""))
