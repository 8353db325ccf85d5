"""RLSD training: one step, in order.

    torchrun --nproc-per-node N -m megatron_rlsd.train CONFIG.yaml [key=value ...]

The verifier's reward decides the direction of every update; the same model under a privileged
prompt decides how much credit each token gets (arXiv:2604.03128).
"""

from __future__ import annotations

if __name__ == "__main__":  # before what may be missing is imported
    from megatron_rlsd.runtime.missing import tell_missing

    tell_missing()

import sys

from megatron_rlsd.algorithms import lambda_at
from megatron_rlsd.config import Config
from megatron_rlsd.diagnosis.before_run import refuse
from megatron_rlsd.learner import Learner
from megatron_rlsd.run import assemble, main


def train(config: Config) -> None:
    """Run ``train.steps`` steps; see megatron_rlsd/config for every setting."""
    steps = config.train.steps
    with assemble(config, total_updates=config.total_updates, total_steps=steps) as run:
        learner = Learner(config, run.actor)
        start = run.continuity.resume(run.actor, learner.snapshots(), run.collector, learner)
        run.colocation.servers_take_over()
        run.publish_weights(version=start)
        if config.eval.at_start and start == 0:
            run.evaluate(step=0)

        for step in range(start, steps):
            rlsd_lambda = lambda_at(step, config.algorithm)

            with run.phase("rollout", step):
                sampling, early = run.sampling(step), []
                for arrived in sampling:  # whole groups, while servers sample the others
                    with run.phase("early_score", step):
                        part = run.hand_out(learner.plan(arrived, step, rlsd_lambda))
                        early.append((part, learner.score(part)))
                groups, batch, metrics = sampling.finished()
                run.colocation.trainer_takes_over()  # servers on the same GPUs sleep

            with run.phase("score", step):
                plan = run.hand_out(learner.plan(batch, step, rlsd_lambda))
                if early:
                    scores = learner.joined(plan, early, sampling.rows_of_parts())
                else:
                    scores = learner.score(plan)
                learner.gauge_noise(plan, scores)

            with run.phase("update", step):
                metrics |= learner.update(plan, scores)
                metrics |= learner.noise.metrics()
                run.continuity.record(plan, scores, metrics)
                learner.teacher.after_step(step)

            with run.phase("weight_sync", step):
                run.colocation.servers_take_over()  # the optimizer's state leaves the GPUs
                metrics |= run.publish_weights(version=step + 1)

            metrics["algorithm/lambda"] = rlsd_lambda
            run.log_samples(step, groups, learner.credit)
            run.log.step(step, metrics)
            alarm = run.alarm(step, metrics, groups)

            done = step + 1
            if config.eval.interval and done % config.eval.interval == 0:
                run.evaluate(done)
            run.end_of_step(done, last=done == steps, alarm=alarm)

        if start < steps or not run.exported("final"):
            if not config.eval.interval or steps % config.eval.interval:
                run.evaluate(steps)
            run.export_hf("final")
        run.log.summary()


if __name__ == "__main__":
    sys.exit(main(train, sys.argv[1:], __doc__ or "", refuse))
