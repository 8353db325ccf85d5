"""Plans of published models: sums that add up, layouts that fit, refusals with a reason."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_rlsd.config import Config, ParallelConfig, load_config, parse_config
from megatron_rlsd.hf_bridge import ModelDims
from megatron_rlsd.parallel.eight_bit import check_eight_bit, copy_bytes
from megatron_rlsd.parallel.layout import LayoutError
from megatron_rlsd.parallel.memory import layer_products, rank_parameters
from megatron_rlsd.planning.activations import ActivationCounter, Pack, in_flight
from megatron_rlsd.planning.colocated import ASLEEP_BYTES, AWAKE_BYTES, CONTEXT_BYTES
from megatron_rlsd.planning.memory import GIB
from megatron_rlsd.planning.plan import Machine, RunPlan, changed, make_plan, remedies
from megatron_rlsd.planning.rates import Rates
from megatron_rlsd.planning.search import overrides, search
from megatron_rlsd.planning.work import Lengths
from megatron_rlsd.runtime.errors import UserError
from tests.conftest import ROOT
from tests.unit.planning.seventy import LENGTHS, plan_of, raw_config

SHARE = "rollout.sglang.args.mem_fraction_static"


def test_a_70b_layout_fits_and_its_parts_add_up(config: Config, model: ModelDims) -> None:
    plan = plan_of(config, model)
    assert plan.problems == []
    billions = (
        sum(rank_parameters(model, config.parallel, stage).total * 8 for stage in range(4))
        - 8 * 8192 * (2 * 80 + 1) * 7 / 8
    )  # norms, on each of the 8 ranks
    assert billions == pytest.approx(70.55e9, rel=1e-4)
    for rank in plan.ranks:
        held = rank_parameters(model, config.parallel, rank.stage).total
        assert rank.held == {
            "parameters": 2 * held,
            "gradients": 4 * held,
            "optimizer state": 12 * held // 2,  # over two data-parallel ranks
        }
        backward = rank.moments["backward"]
        assert rank.at("backward") == sum(rank.held.values()) + sum(backward.values())
        assert rank.peak == max(map(rank.at, rank.moments))
        assert ("head" in rank.moments["loss"]) == (rank.stage == 3)
    # Full recompute: a layer's input for each of 20 layers, of 4 micro-batches in flight.
    inputs = 4 * 20 * 2 * (16384 // 8) * 8192
    assert plan.ranks[0].moments["backward"]["activations"] == pytest.approx(inputs, rel=0.01)
    # The teacher's weights lie in main memory, and take the parameters' place while they score.
    assert not any("weights" in part for part in plan.ranks[0].moments["score"])
    assert plan.ranks[0].host == {"teacher weights": plan.ranks[0].held["parameters"]}
    assert plan.host_bytes == 8 * 2 * max(
        rank_parameters(model, config.parallel, stage).total for stage in range(4)
    )


def test_what_does_not_fit_is_refused_with_changes_that_help(
    config: Config, model: ModelDims
) -> None:
    without = changed(config, {"model.recompute": "none", "parallel.pipeline": 2})
    assert without is not None
    plan = plan_of(without, model)
    (problem,) = plan.problems
    assert "stage 0 needs" in problem
    assert "(backward)" in problem
    found = remedies(plan, model, LENGTHS)
    assert {"model.recompute": "full"} in [change for change, _ in found]
    for change, other in found:
        again = changed(without, change)
        assert again is not None
        assert plan_of(again, model).problems == []
        assert other.fullest.peak < plan.fullest.peak


def test_pinned_memory_can_be_what_does_not_fit(config: Config, model: ModelDims) -> None:
    (problem,) = plan_of(config, model, host_gib=16).problems
    assert "pinned host memory" in problem
    live = changed(config, {"teacher.mode": "live"})
    assert live is not None
    assert plan_of(live, model, host_gib=16).problems == []


def test_search_finds_what_its_overrides_reproduce(
    config: Config, model: ModelDims, folder: Path
) -> None:
    machine = Machine(gpus=64)
    found = search(config, model, machine, LENGTHS)
    assert found.plans
    times = [plan.time.training for plan in found.plans]
    assert times == sorted(times, key=lambda seconds: round(seconds, 3))
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw_config(folder)))
    for plan in found.plans[:10]:
        again = make_plan(load_config(path, overrides(plan, config)), model, machine, LENGTHS)
        assert (again.fullest.peak, again.time) == (plan.fullest.peak, plan.time)


def test_a_model_too_large_for_its_gpus_has_no_layout(config: Config, model: ModelDims) -> None:
    found = search(config, model, Machine(gpus=8), LENGTHS)
    assert found.plans == []
    assert found.tried > 10
    # Weights, gradients and optimizer alone: 18 bytes a parameter over 8 GPUs.
    assert found.smallest is not None
    assert found.smallest.fullest.peak > 18 * 70e9 / 8


def test_an_impossible_layout_is_an_error(config: Config, model: ModelDims) -> None:
    with pytest.raises(LayoutError, match="must divide the number of processes, 48"):
        plan_of(config, model, gpus=48)


def test_the_longest_sequence_decides_where_it_is_longer_than_a_micro_batch(
    config: Config, model: ModelDims
) -> None:
    short = changed(config, {"train.max_tokens_per_microbatch": 1024})
    assert short is not None
    plan = plan_of(short, model)
    assert plan.work.update.lengths == (2048 + 8192,)
    assert plan.work.score.lengths == (2048 + 2048 + 8192,)


def test_recompute_sequence_parallel_and_smaller_packs_keep_less(
    config: Config, model: ModelDims
) -> None:
    def kept(**changes: Any) -> int:
        settings = config.model.model_copy(update=changes.pop("model", {"recompute": "none"}))
        parallel = ParallelConfig(tensor=8, **changes)
        pack = Pack.of(16384, 8192)
        return ActivationCounter(model, parallel, settings, pack, "cuda").stage(0).kept

    everything = kept(sequence=True)
    selective = kept(
        sequence=True, model={"recompute": "selective", "recompute_modules": ["mlp", "layernorm"]}
    )
    full = kept(sequence=True, model={"recompute": "full"})
    assert full < selective < everything < kept(sequence=False)
    assert kept(sequence=True, context=2) < 0.65 * everything


def test_time_follows_from_operations_rates_and_waiting(config: Config, model: ModelDims) -> None:
    slow = plan_of(config, model).time
    fast = plan_of(config, model, rates=Rates().with_given(["peak_tflops=1978"])).time
    assert 0.1 < slow.mfu < Rates().product_efficiency
    # Twice the peak: computing takes half as long, so the step gains and MFU falls.
    assert slow.update / 2 < fast.update < slow.update
    assert fast.mfu < slow.mfu
    few = changed(config, {"train.global_batch_size": 16})
    assert few is not None
    assert plan_of(few, model).time.bubble > 3 * slow.bubble
    # Decoding reads 141 GB of weights over 8 GPUs for each of at least 8192 tokens.
    least = 8192 * 141e9 / (8 * 3350e9)
    assert slow.rollout is not None
    assert least < slow.rollout < 20 * least
    assert slow.total == slow.rollout + slow.training
    beside = changed(config, {"rollout.asynchronous": {"max_staleness": 1}})
    assert beside is not None
    assert plan_of(beside, model).time.total == max(slow.rollout, slow.training)


def test_lengths_have_the_mean_asked_for_and_the_cut() -> None:
    lengths = Lengths(prompt=1, hint=1, response=1000, spread=0.5)
    assert lengths.mean_response(10**6) == pytest.approx(1000, rel=0.01)
    cut = lengths.responses(1500, 100)
    assert cut == sorted(cut)
    assert max(cut) == 1500
    assert lengths.mean_response(1500) < 1000


def test_stages_near_the_end_keep_fewer_micro_batches() -> None:
    four = ParallelConfig(pipeline=4)
    assert [in_flight(four, stage, 16) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(four, 0, 2) == 2


@pytest.mark.parametrize("text", ["warp=9", "disk_gbs=fast", "disk_gbs=-1", "disk_gbs"])
def test_a_bad_rate_is_named(text: str) -> None:
    with pytest.raises(UserError, match=text.split("=")[0]):
        Rates().with_given([text])


def run_tool(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(raw_config(folder)))
    command = [sys.executable, str(ROOT / "tools/plan_run.py"), str(path), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.process
def test_the_tool_prints_a_plan_that_fits(folder: Path) -> None:
    done = run_tool(folder, "--gpus", "64", "--memory", "80", "--response-tokens", "3000")
    assert done.returncode == 0, done.stderr
    assert "TP8 PP4 DP2 SP full recompute distributed optimizer on 64 GPUs" in done.stdout
    first, servers, cost, speed = done.stdout.splitlines()[:4]
    assert first.startswith("FITS, ")
    # Eight of the trainer's nodes, and one rollout node for every two.
    assert servers.startswith(
        "servers    16 of 8 GPUs each (4 nodes of rollout.sglang.num_servers=4"
    )
    assert cost.startswith("cost       192 GPUs (64 trainer, 128 servers)")
    assert "tokens per second per GPU" in speed
    assert "assumed, not measured" in done.stdout


@pytest.mark.process
def test_the_tool_refuses_what_cannot_fit(folder: Path) -> None:
    done = run_tool(folder, "--gpus", "16", "parallel.pipeline=2", "model.recompute=none")
    assert done.returncode == 1
    assert "DOES NOT FIT: stage 0 needs" in done.stdout
    assert "74.0 GiB of a GPU" in done.stdout
    done = run_tool(folder, "--gpus", "8", "--search")
    assert done.returncode == 1
    assert "NO LAYOUT FITS" in done.stdout
    done = run_tool(folder, "--servers", "2", "rollout.engine=embedded")
    assert (done.returncode, done.stdout) == (2, "")
    assert "need rollout.engine=sglang" in done.stderr
    done = run_tool(folder, "--gpus", "64", "parallel.tensr=8")
    assert done.returncode == 2
    assert "parallel.tensr: unknown key" in done.stderr


@pytest.mark.process
def test_the_tool_says_what_of_the_model_it_needs(folder: Path) -> None:
    (folder / "config.json").unlink()
    done = run_tool(folder)
    assert done.returncode == 2
    assert f"{folder / 'config.json'} is missing" in done.stderr
    assert "a plan reads the config.json in it, and no weights" in done.stderr


def with_fp8(config: Config, **precision: Any) -> Config:
    raw = config.model_dump(mode="json")
    raw["model"]["precision"] = {"fp8": "current", **precision}
    return parse_config(raw)


def test_products_of_all_layers_and_what_is_none_of_them_make_the_model(model: ModelDims) -> None:
    one = ParallelConfig()
    products = sum(layer_products(model, one, layer).total for layer in range(80))
    embeddings, norms = 2 * 128256 * 8192, (2 * 80 + 1) * 8192
    assert products + embeddings + norms == rank_parameters(model, one, 0).total


def test_8_bit_weights_are_counted_twice_but_for_layers_kept_in_bfloat16(
    config: Config, model: ModelDims
) -> None:
    plain = plan_of(config, model, kernels="transformer_engine")
    eight = plan_of(with_fp8(config, first_layers_bf16=2), model, kernels="transformer_engine")
    # Each of 8 ranks has an eighth of 8192 x (8192 + 2 x 1024 + 8192 + 3 x 28672).
    layer = 8192 * (8192 + 2 * 1024 + 8192 + 3 * 28672) // 8
    added = [new.peak - old.peak for new, old in zip(eight.ranks, plain.ranks, strict=True)]
    assert added == [2 * 18 * layer, *[2 * 20 * layer] * 3]
    assert eight.time.update < plain.time.update
    assert eight.time.rollout == plain.time.rollout
    # Only products gain, and no more than by their gain.
    assert plain.time.update < 1.5 * eight.time.update


def test_8_bit_products_refuse_sizes_that_they_cannot_take(
    config: Config, model: ModelDims
) -> None:
    precision = with_fp8(config, fp8="blockwise").model.precision
    check_eight_bit(model, ParallelConfig(tensor=8), precision)
    odd = replace(model, ffn_hidden_size=28672 - 64)
    expected = r"fp8=blockwise needs multiples of 128: feed-forward rows / .*tensor=8 = 3576$"
    with pytest.raises(LayoutError, match=expected):
        check_eight_bit(odd, ParallelConfig(tensor=8), precision)
    check_eight_bit(odd, ParallelConfig(tensor=8), config.model.precision)
    assert copy_bytes(odd, ParallelConfig(), config.model.precision, range(80)) == 0


@pytest.fixture
def colocated(config: Config) -> Config:
    raw = config.model_dump(mode="json")
    raw["rollout"] |= {"colocated": True}
    raw["rollout"]["sglang"] |= {"args": {"mem_fraction_static": 0.5}}
    raw["weight_sync"] |= {"transport": "ipc"}
    return parse_config(raw)


def test_colocated_servers_and_the_trainers_state_take_turns(
    config: Config, colocated: Config, model: ModelDims
) -> None:
    plan, apart = plan_of(colocated, model), plan_of(config, model)
    assert plan.problems == []
    for rank, alone in zip(plan.ranks, apart.ranks, strict=True):
        weights = alone.held["parameters"]
        state = alone.held["gradients"] + alone.held["optimizer state"]
        # Of 8 ranks on rank 0's machine 7 have other GPUs; they read from the first publication on.
        contexts = 7 * CONTEXT_BYTES if rank.stage == 0 else 0
        # Half of 80 GiB; each of 8 ranks of a server has an eighth of 141 GB of weights.
        assert rank.at("rollout") == weights + 40 * GIB + AWAKE_BYTES + contexts
        assert rank.at("start") == weights + 40 * GIB + AWAKE_BYTES + state
        asleep = ASLEEP_BYTES + contexts
        for moment in ("backward", "score", "optimizer step"):
            assert rank.at(moment) == alone.at(moment) + asleep
        served = rank.at("weight sync") - asleep - (alone.at("weight sync") - state)
        assert served == pytest.approx(70.55e9 * 2 / 8, rel=1e-4)
        assert rank.host["optimizer state"] == alone.held["optimizer state"]
    assert plan.server is not None
    # Keys and values of 80 layers, 8 heads of 128, 2 bytes each, over 8 GPUs.
    cache = 8 * 40 * GIB - 70.55e9 * 2
    assert plan.server.cached_tokens == pytest.approx(cache / (80 * 2 * 8 * 128 * 2), rel=1e-3)
    # 12 bytes of state for each parameter of a rank's half go to the host and come back.
    held = max(rank_parameters(model, config.parallel, stage).total for stage in range(4))
    # Rank 0's way to main memory is the slowest of a bucket's; all are hashed each time.
    copied = 141.1e9 / 25e9 + 80 * 141.1e9 / 3350e9 + 2 * held * 12 / 2 / 25e9
    assert plan.time.weight_sync == pytest.approx(copied, rel=0.01)


def test_a_weight_sync_counts_every_servers_bytes_and_its_share_of_comparisons(
    config: Config, model: ModelDims
) -> None:
    def seconds(
        servers: int,
        interval: int,
        transport: str = "broadcast",
        group: str = "server",
        nodes: int = 1,
    ) -> float:
        other = changed(
            config,
            {
                "rollout.sglang.num_servers": servers,
                "weight_sync.verify_interval": interval,
                "weight_sync.transport": transport,
                "weight_sync.broadcast_group": group,
            },
        )
        assert other is not None
        return plan_of(other, model, server_nodes=nodes).time.weight_sync

    size = 2 * 70.55e9
    # Rank 0 sends all servers the same bytes one after the other, at 40 GB/s.
    assert seconds(2, 0) == pytest.approx(2 * size / 40e9, rel=1e-3)
    assert seconds(4, 0) == pytest.approx(4 * size / 40e9, rel=1e-3)
    # With one, the copy to main memory at 25 GB/s takes longer.
    assert seconds(1, 0) == pytest.approx(size / 25e9, rel=1e-3)
    # Four servers on two machines: the bytes go to each, to each machine, or once.
    assert seconds(2, 0, nodes=2) == pytest.approx(4 * size / 40e9, rel=1e-3)
    assert seconds(2, 0, group="node", nodes=2) == pytest.approx(2 * size / 40e9, rel=1e-3)
    assert seconds(2, 0, group="all", nodes=2) == pytest.approx(size / 25e9, rel=1e-3)
    compared = 80 * size / 3350e9
    assert seconds(4, 1) - seconds(4, 0) == pytest.approx(compared, rel=1e-3)
    assert seconds(4, 10) - seconds(4, 0) == pytest.approx(compared / 10, rel=1e-3)
    # Each server reads the folder, and so does whoever hashes it.
    read = seconds(4, 1, "disk") - seconds(3, 0, "disk")
    assert read == pytest.approx(2 * size / 2e9 + compared, rel=1e-3)


def test_what_the_gpu_and_the_host_hold_for_the_teacher(config: Config, model: ModelDims) -> None:
    ema = changed(config, {"teacher.mode": "ema", "algorithm.divergence_coef": 0.1})
    assert ema is not None
    for rank, plain in zip(plan_of(ema, model).ranks, plan_of(config, model).ranks, strict=True):
        parameters = rank.held["parameters"]
        # A float32 average does not fit into bfloat16 parameters and back: theirs lie beside it.
        assert rank.host == {
            "teacher weights": 2 * parameters,
            "weights while the teacher scores": parameters,
        }
        assert rank.moments["score"] == plain.moments["score"]
        head = rank.moments["backward"].get("teacher's head", 0)
        assert head == (2 * 128256 // 8 * 8192 if rank.stage == 3 else 0)


def test_a_servers_share_can_be_too_small_and_too_large(
    colocated: Config, model: ModelDims
) -> None:
    def with_share(share: float) -> RunPlan:
        other = changed(colocated, {SHARE: share})
        assert other is not None
        return plan_of(other, model)

    (problem,) = with_share(0.2).problems
    # 8 x 16 GiB are less than the weights.
    assert "16.0 GiB of each GPU" in problem
    assert "a cache for 0 tokens; one sequence takes 10240" in problem
    plan = with_share(0.75)
    (problem,) = plan.problems
    assert "at its peak (start)" in problem
    smaller = [plan for change, plan in remedies(plan, model, LENGTHS) if list(change) == [SHARE]]
    (remedy,) = smaller
    share = remedy.config.rollout.sglang.args["mem_fraction_static"]
    assert with_share(share + 0.05).problems


def test_every_prompt_under_which_the_teacher_reads_is_counted(
    config: Config, model: ModelDims
) -> None:
    def scoring(**sections: dict[str, object]) -> float:
        # Live weights, which need no copy: all of the phase is passes.
        teacher = {"mode": "live", "hint": "reference_solution", **sections.pop("teacher", {})}
        other = changed(config, {"teacher": teacher, **sections})
        assert other is not None
        return plan_of(other, model).time.score

    alone = scoring(algorithm={"name": "rlsd"})
    assert scoring(algorithm={"name": "ectr"}) == pytest.approx(2 * alone, rel=0.05)
    five = scoring(algorithm={"name": "rlcsd"}, teacher={"wrong_hints": 4})
    assert five == pytest.approx(5 * alone, rel=0.05)
