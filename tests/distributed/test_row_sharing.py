"""Rank 0 has all rows of a batch; each other rank gets those that it trains on, and no more."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_rlsd.config import ParallelConfig
from megatron_rlsd.hf_bridge import family_for, load_hf_config
from megatron_rlsd.parallel.groups import parallel_world
from megatron_rlsd.parallel.row_sharing import share_outlines, share_rows
from megatron_rlsd.types import TrainBatch
from tests.batches import plain, train_row
from tests.distributed.layouts import save_models
from tests.distributed.ranks import next_world, run_on_ranks

LAYOUTS: tuple[dict[str, int], ...] = (
    {"pipeline": 2},
    {"tensor": 2},
    {"context": 2, "tensor": 2},
    {},
)
SHARES = {1: [[3, 0, 2]], 2: [[0, 3], [2]], 4: [[2], [], [0, 3], []]}


def make_batch() -> TrainBatch:
    """Rows that lack different things; row 1 is trained on nowhere."""
    routes = torch.arange(2 * 3 * 2, dtype=torch.int16).view(2, 3, 2)
    rows = [
        train_row([1, 2], [6, 7, 8], 1 / 3, loss_mask=[1, 0, 1], rollout_log_probs=[-0.1, 0, -9]),
        train_row([3], [9], -1.0, teacher_prompt_ids=[4, 5], evidence_span=(0, 0), solved=False),
        train_row([3], [2, 2], 0.0, contrast_prompts=[[9], [8]], evidence_span=(1, 2), solved=True),
        train_row([3], [2, 2], 0.1, routed_experts=routes),
    ]
    return TrainBatch.of(rows)


def check(model: str) -> None:
    """On every rank, in each layout."""
    hf_config = load_hf_config(model)
    shape, whole = family_for(hf_config).dims(hf_config), make_batch()
    for number, layout in enumerate(LAYOUTS):
        if number:
            next_world()
        parallel = ParallelConfig(**layout)
        with parallel_world(parallel, shape, timeout_seconds=60, seed=0) as groups:
            known = share_outlines(whole if groups.rank == 0 else None, groups)
            assert known.outlines == whole.outlines
            assert list(known.rows) == ([0, 1, 2, 3] if groups.rank == 0 else [])
            by_rank = SHARES[groups.dp.size()]
            found = share_rows(known, by_rank, groups)
            mine = by_rank[groups.dp.rank()]
            assert list(found.rows) == ([0, 1, 2, 3] if groups.rank == 0 else mine)
            for row in mine:
                one, other = plain(found.rows[row]), plain(whole.rows[row])
                assert found.rows[row].outline == whole.outlines[row]
                routes, expected = one.__dict__.pop("routed_experts"), other.routed_experts
                assert (routes is None) == (expected is None)
                assert routes is None or torch.equal(routes, expected)
                del other.routed_experts
                assert one == other


def test_each_rank_has_the_rows_of_its_replica(tmp_path: Path) -> None:
    model = str(save_models(tmp_path / "models")["untied"])
    run_on_ranks(check, 4, model, seconds=180, worlds=len(LAYOUTS))
