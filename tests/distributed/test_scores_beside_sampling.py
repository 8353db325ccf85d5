"""Groups that are scored while others are being sampled: the same run, to the last bit."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rlsd.config import Config
from megatron_rlsd.learner import Learner, Plan, Scores
from megatron_rlsd.rollout.embedded import EmbeddedEngine
from megatron_rlsd.rollout.served import ServedEngine
from megatron_rlsd.train import train
from megatron_rlsd.types import Generation, GenerationRequest
from megatron_rlsd.weight_sync.publisher import EmbeddedTransport, Publisher
from tests.distributed.ranks import run_on_ranks
from tests.distributed.runs import run_all, steps_of

PROMPTS, SAMPLES, STEPS = 3, 4, 2


class Servers:
    """Rank 0's replica in place of servers, which cannot be made to answer in a chosen order.

    The last question's responses come first, and the next question's once those were scored.
    """

    def __init__(self, replica: EmbeddedEngine) -> None:
        self._replica = replica
        self._thread = ThreadPoolExecutor(1)
        self.scored = threading.Event()
        self.generate = replica.generate
        self.on_progress = self.longest_prompt = None

    @property
    def weight_version(self) -> int:
        return self._replica.weight_version

    def counted(self) -> Counter[str]:
        return Counter()

    def submit_requests(
        self, requests: list[GenerationRequest], *, on_arrival: Callable[[int, Generation], None]
    ) -> Future[list[Generation]]:
        def answer() -> list[Generation]:
            found = self._replica.generate(requests)
            self.scored.clear()
            for number in reversed(range(len(requests))):
                if number % SAMPLES == SAMPLES - 1 and number < len(requests) - 1:
                    assert self.scored.wait(60), "nothing was scored while others were sampled"
                    self.scored.clear()
                on_arrival(number, found[number])
            return found

        return self._thread.submit(answer)


def train_beside(config: Config) -> None:
    """On every rank: ``train`` with a replica of the model on each."""
    times_scored = 0
    servers: list[Servers] = []
    score = Learner.score

    @contextmanager
    def engine(config: Config, groups: Any, *_: Any) -> Iterator[tuple[ServedEngine, Publisher]]:
        replica = EmbeddedEngine(config.model.hf_path, torch.float32, 64)
        servers.append(Servers(replica))
        own: Any = None if groups.rank else servers[-1]
        served = ServedEngine(own, groups.control)
        yield served, Publisher(served, EmbeddedTransport(replica))
        replica.close()

    def counted(learner: Learner, plan: Plan) -> Scores:
        nonlocal times_scored
        times_scored += 1
        found = score(learner, plan)
        servers[-1].scored.set()
        return found

    with pytest.MonkeyPatch.context() as patch:
        # Its module has the name of its function.
        patch.setattr(sys.modules["megatron_rlsd.run.assemble"], "rollout_engine", engine)
        patch.setattr(Learner, "score", counted)
        train(config)
    beside = config.rollout.score_while_sampling
    assert times_scored == STEPS * (PROMPTS if beside else 1)


@pytest.mark.process
def test_the_steps_of_a_run_that_scores_all_at_once(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    """Two updates a step and a KL term, so that there is something of each kind to score."""
    runs = []
    for name, beside in (("once", False), ("beside", True)):
        config = make_config(
            run_dir=str(tmp_path / name),
            rollout={
                "engine": "sglang",
                "prompts_per_step": PROMPTS,
                "n_samples_per_prompt": SAMPLES,
                "score_while_sampling": beside,
                "sglang": {"urls": ["http://unused:1"], "generate_timeout_seconds": 50}
                | {"start_timeout_seconds": 50},
            },
            # In 64 tokens no two sequences fit.
            train={"steps": STEPS, "global_batch_size": 6, "max_tokens_per_microbatch": 64},
            algorithm={"kl_coef": 0.01},
            data={"eval": []},
        )
        runs.append((train_beside, config))
    run_on_ranks(run_all, 2, runs, seconds=200, worlds=len(runs) + 1)
    once, streamed = (steps_of(tmp_path / name) for name in ("once", "beside"))
    assert len(once) == STEPS
    for one, other in zip(once, streamed, strict=True):
        own = [n for n in one if not n.startswith(("time", "perf/", "memory/"))]
        assert {name: other[name] for name in own} == {name: one[name] for name in own}
        assert other["time/early_score_s"] > 0
