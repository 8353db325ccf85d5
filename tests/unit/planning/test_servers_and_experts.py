"""Servers as the configuration means them, what a step costs, and what experts cost."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_rlsd.config import Config, ParallelConfig, parse_config
from megatron_rlsd.hf_bridge import ModelDims, family_for
from megatron_rlsd.parallel.memory import rank_parameters
from megatron_rlsd.planning.experts import ExpertLayer
from megatron_rlsd.planning.plan import Machine, changed
from megatron_rlsd.planning.rates import Rates
from megatron_rlsd.planning.report import answer_lines
from megatron_rlsd.planning.search import search
from megatron_rlsd.planning.servers import servers_of
from tests.unit.hf_bridge.real_configs import QWEN3_30B_A3B
from tests.unit.planning.seventy import LENGTHS, plan_of


@pytest.mark.parametrize(
    ("rollout", "machine", "count", "beside"),
    [
        # Rank 0 starts its own where its machine has GPUs left.
        ({"num_servers": 1, "tensor_parallel": 4}, {"gpus": 4}, 1, 4),
        # Otherwise every rollout node starts as many, as under Slurm.
        ({"num_servers": 2, "tensor_parallel": 4}, {"gpus": 8}, 2, 8),
        ({"num_servers": 2, "tensor_parallel": 4}, {"gpus": 32}, 4, 16),
        ({"num_servers": 2, "tensor_parallel": 4}, {"gpus": 40}, 6, 24),
        ({"num_servers": 2, "tensor_parallel": 4}, {"gpus": 32, "nodes": 3}, 6, 24),
        ({"num_servers": 2, "tensor_parallel": 4}, {"gpus": 32, "given": 3}, 3, 12),
        ({"urls": ["http://a:1", "http://b:1"]}, {"gpus": 8}, 2, None),
        ({"urls": ["http://a:1"]}, {"gpus": 8, "given": 3}, 3, 3),
    ],
)
def test_servers_are_counted_by_the_machines_that_start_them(
    config: Config,
    rollout: dict[str, Any],
    machine: dict[str, int],
    count: int,
    beside: int | None,
) -> None:
    raw = config.model_dump(mode="json")
    raw["rollout"]["sglang"] = rollout
    servers = servers_of(parse_config(raw), gpus_per_node=8, **machine)
    assert servers is not None
    assert (servers.count, servers.beside) == (count, beside)


def test_what_a_step_costs_counts_the_servers_gpus(config: Config, model: ModelDims) -> None:
    plan = plan_of(config, model, server_nodes=2)
    assert plan.servers is not None
    assert (plan.servers.count, plan.gpus) == (8, 64 + 8 * 8)
    lines = "\n".join(answer_lines(plan))
    hours = 128 * plan.time.total / 3600
    assert f"{hours:.3g} GPU-hours" in lines
    rate = 64 * 8 * plan.tokens.response / plan.time.total / 128
    assert f"speed      {rate:,.0f} sampled tokens" in lines
    beside_nobody = changed(config, {"rollout.engine": "embedded"})
    assert beside_nobody is not None
    assert plan_of(beside_nobody, model).gpus == 64
    running = changed(config, {"rollout.sglang.urls": ["http://a:1"]})
    assert running is not None
    assert plan_of(running, model).gpus is None
    assert "cost       unknown" in "\n".join(answer_lines(plan_of(running, model)))


@pytest.fixture
def experts() -> ModelDims:
    return family_for(QWEN3_30B_A3B).dims(QWEN3_30B_A3B)


def laid_out(config: Config, **parallel: Any) -> Config:
    raw = config.model_dump(mode="json")
    raw["parallel"] = parallel
    return parse_config(raw)


def test_split_experts_pay_for_every_row_on_every_rank(experts: ModelDims) -> None:
    rows = 1000 / 4 * 8 * 2048 * 2  # tokens of a rank, 8 experts each, 2 bytes a channel
    split = ExpertLayer(experts, ParallelConfig(tensor=4, sequence=True), 2, "cuda")
    assert split.exchanged(1000) == (0, 2 * 3 * rows)
    whole = ParallelConfig(tensor=4, sequence=True, expert=8, expert_tensor=1)
    spread = ExpertLayer(experts, whole, 2, "cuda")
    assert spread.exchanged(1000) == (2 * 7 / 8 * rows, 0)
    # The same operations; all 128 experts are read and started on every rank in place of 16.
    assert split.products(1000) == spread.products(1000)
    rates = Rates()
    starts = (128 - 16) * rates.expert_start_us / 1e6
    assert split.pass_seconds(1000, rates) > spread.pass_seconds(1000, rates) + starts
    # Grouped products start all of them at once; a quarter of each weighs as much as 32 whole ones.
    grouped = ExpertLayer(experts, ParallelConfig(tensor=4, sequence=True), 2, "transformer_engine")
    weights = 2 * 128 * 3 * 2048 * 768 / 4
    assert grouped.pass_seconds(1, rates) == pytest.approx(
        weights / 3350e9 + rates.expert_start_us / 1e6, rel=0.01
    )


def test_the_search_does_not_split_experts_where_spreading_them_is_cheaper(
    config: Config, experts: ModelDims
) -> None:
    split = plan_of(laid_out(config, tensor=4, sequence=True), experts, gpus=16)
    layout = {"tensor": 4, "sequence": True, "expert": 8, "expert_tensor": 1}
    spread = plan_of(laid_out(config, **layout), experts, gpus=16)
    assert split.time.update > 2 * spread.time.update
    best = search(spread.config, experts, Machine(gpus=8, memory_gib=141), LENGTHS).plans[0]
    assert best.config.parallel.expert > 1


def test_experts_gradients_go_to_the_ranks_that_hold_the_same_experts(
    config: Config, experts: ModelDims
) -> None:
    """On 8 GPUs with 8 times expert parallelism nobody holds the same experts twice."""
    layout = {"tensor": 1, "expert": 8, "expert_tensor": 1}
    timer = plan_of(laid_out(config, **layout), experts, gpus=8).timer
    held = rank_parameters(experts, ParallelConfig(**layout), 0)
    # Float32 gradients one way, bfloat16 parameters back, over 7 of 8 ranks at 300 GB/s.
    assert timer.gradients() == pytest.approx(7 / 8 * held.dense * 6 / 300e9)
