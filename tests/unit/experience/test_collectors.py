"""What holds for a batch holds whichever way it was collected."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_rlsd.algorithms import (
    Hint,
    Reading,
    Source,
    Variant,
    group_advantages,
    register_algorithm,
)
from megatron_rlsd.config import AlgorithmConfig, TokenizerConfig
from megatron_rlsd.data import load_tokenizer
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Group
from tests.unit.experience.conftest import BATCH, publish

pytestmark = [
    pytest.mark.process,
    pytest.mark.parametrize("staleness", [0, 1], ids=["synchronous", "stream"]),
]


def jsonl(folder: Path, *rows: dict[str, Any]) -> dict[str, Any]:
    """Sections of a run whose questions are these, over and over in their order."""
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data": {"train": [{"kind": "jsonl", "path": str(path), "shuffle": False}]}}


def test_a_critique_under_another_key_ends_the_run(start, staleness: int, tmp_path: Path) -> None:
    row = {"prompt": "2 + 2", "answer": "4", "metadata": {"remark": "Count to four."}}
    for key in ("critique", "Remark", "remark.text"):
        sections = jsonl(tmp_path, row) | {"teacher": {"hint": "critique", "critique_key": key}}
        with start(staleness, **sections) as (collector, engine):
            publish(collector, engine, 0)
            with pytest.raises(UserError, match=f"none of the first {BATCH} .*'{key}'"):
                collector.collect(0)


def test_one_critique_among_the_first_questions_is_enough(
    start, staleness: int, tmp_path: Path
) -> None:
    row = {"prompt": "2 + 2", "answer": "4"}
    told = row | {"metadata": {"remark": "Count to four."}}
    sections = jsonl(tmp_path, row, told, row)
    sections |= {"teacher": {"hint": "critique", "critique_key": "remark"}}
    with start(staleness, **sections) as (collector, engine):
        publish(collector, engine, 0)
        groups, metrics = collector.collect(0)
        publish(collector, engine, 1)
        collector.collect(1)
    assert metrics["teacher/without_hint_share"] == 0.5
    assert {t.teacher_prompt_ids is None for g in groups for t in g.trajectories} == {True, False}


def test_an_algorithms_own_function_says_what_the_teacher_reads(
    start, staleness: int, tiny_model: Path
) -> None:
    seen: list[tuple[list[Any], list[Any]]] = []

    def score_group(group: Group, hints: Sequence[Hint], algorithm: AlgorithmConfig):
        seen.append(([t.solved for t in group.trajectories], list(hints)))
        found = [Reading("Twice", contrast=("Once", "Thrice")), Reading(None)]
        return found[: algorithm.max_refills]

    own = Variant(fixed={"evidence": ("own_hints", "it says so")})
    register_algorithm("own", own, score_group=score_group)
    for taken in (2, 1):
        algorithm = {"name": "own", "max_refills": taken}
        with start(staleness, algorithm=algorithm) as (collector, engine):
            publish(collector, engine, 0)
            if taken == 1:
                with pytest.raises(UserError, match=r"score_group returned .* for each of 2 resp"):
                    collector.collect(0)
                continue
            groups, metrics = collector.collect(0)
    tokenizer = load_tokenizer(TokenizerConfig(), tiny_model)
    for first, second in (group.trajectories for group in groups):
        assert (second.teacher_prompt_ids, second.contrast_prompts) == (None, ())
        prompts = [first.teacher_prompt_ids, *first.contrast_prompts]
        texts = [tokenizer.decode(ids.tolist()) for ids in prompts]
        assert [[w for w in ("Twice", "Once", "Thrice") if w in text] for text in texts] == [
            *(["Twice"], ["Once"], ["Thrice"])
        ]
    assert metrics["teacher/without_hint_share"] == 0.5
    solved, hints = seen[0]
    assert None not in solved  # they are judged by then
    assert hints == [Source.PROBLEM] * 2


def test_groups_without_signal_make_room_but_not_for_ever(start, staleness: int) -> None:
    """No response is rewarded, so that the filter never finds a group."""
    never = {"functions": [{"name": "exact_match"}], "workers": 1}
    algorithm = {"group_filter": True, "max_refills": 2}
    with start(staleness, reward=never, algorithm=algorithm) as (collector, engine):
        publish(collector, engine, 0)
        groups, metrics = collector.collect(0)
        assert len(groups) == BATCH
        # The stream may have gone on to the groups of the next batch.
        sampled = [3 * BATCH, (2 + 1 + staleness) * BATCH]
        filtered = 2 if staleness else 3
        shares = [filtered * BATCH / count for count in sampled]
        assert min(shares) <= metrics["rollout/group_filter_share"] <= max(shares)


def rewards(folder: Path, source: str, *names: str, **settings: Any) -> dict[str, Any]:
    """The section ``reward`` with functions of a user's file."""
    (folder / "judges.py").write_text(source)
    functions = [{"name": f"{folder}/judges.py:{name}"} for name in names]
    return {"functions": functions, "workers": 1, "max_error_share": 1.0, **settings}


SHAKY = """
def judge(sample):
    size = len(sample.response)
    if size % 3 == 0: raise TimeoutError("the judge is busy")
    if size % 3 == 1: return -1.0
    return -0.2
def broken(sample): raise RuntimeError("never")
"""


def test_a_failed_judge_is_no_verdict(start, staleness: int, tmp_path: Path) -> None:
    """Among penalties a failed call that counted 0 would be the best response of its group."""
    section = rewards(tmp_path, SHAKY, "judge", "broken")
    section["functions"][1]["weight"] = 0  # no part of the verdict
    rollout = {"n_samples_per_prompt": 8}
    with start(staleness, reward=section, rollout=rollout) as (collector, engine):
        publish(collector, engine, 0)
        groups, metrics = collector.collect(0)
    seen = Counter[int]()
    for group in groups:
        sizes = [len(t.response_text) % 3 for t in group.trajectories]
        seen.update(sizes)
        judged = [{1: -1.0, 2: -0.2}[size] for size in sizes if size]
        advantages = iter(group_advantages(judged, "group_std").tolist() if judged else [])
        for size, trajectory in zip(sizes, group.trajectories, strict=True):
            assert trajectory.advantage == (next(advantages) if size else 0)
    assert min(seen[size] for size in range(3)) > 0
    total = seen.total()
    assert metrics["rollout/reward_error_share"] == seen[0] / total
    assert metrics["rollout/reward_mean"] == pytest.approx(
        (-seen[1] - 0.2 * seen[2]) / (seen[1] + seen[2])
    )
    assert metrics["rollout/solved_share"] == 0


def test_a_group_with_too_few_verdicts_makes_room_but_not_for_ever(
    start, staleness: int, tmp_path: Path
) -> None:
    for failure in ("raise ValueError", "return None", "return float('nan')"):
        judge = f"def judge(sample):\n    {failure}\n    return 1.0\n"
        section = rewards(tmp_path, judge, "judge")
        algorithm = {"max_refills": 2}
        with start(staleness, reward=section, algorithm=algorithm) as (collector, engine):
            publish(collector, engine, 0)
            groups, metrics = collector.collect(0)
        assert len(groups) == BATCH
        assert metrics["rollout/group_filter_share"] >= 0.5
        assert {t.advantage for g in groups for t in g.trajectories} == {0.0}
        assert math.isnan(metrics["rollout/reward_mean"])
        assert math.isnan(metrics["rollout/solved_share"])


def test_one_verdict_is_nothing_to_compare_with(start, staleness: int, tmp_path: Path) -> None:
    judge = (
        "count = 0\n"
        "def judge(sample):\n"
        "    global count\n"
        "    count += 1\n"
        "    if count % 4 != 1 and count <= 8: raise ValueError('busy')\n"
        "    return float(count % 2)\n"
    )
    section = rewards(tmp_path, judge, "judge", min_verdict_share=0)
    rollout = {"n_samples_per_prompt": 4}
    with start(staleness, reward=section, rollout=rollout) as (collector, engine):
        publish(collector, engine, 0)
        groups, metrics = collector.collect(0)
    assert metrics["rollout/group_filter_share"] > 0
    assert all(t.has_verdict for g in groups for t in g.trajectories)


SHAPED = """
def right(sample): return 0.0
def shape(sample): return 1 + sum(map(ord, sample.response))
"""


def test_the_group_filter_reads_correctness_and_no_shaped_total(
    start, staleness: int, tmp_path: Path
) -> None:
    """Every total of a group differs, and no response is right."""
    algorithm = {"name": "dapo", "rlsd_lambda": 0.0, "max_refills": 1}
    shaped = rewards(tmp_path, SHAPED, "right", "shape")
    shaped["functions"].append({"name": "length", "params": {"buffer_tokens": 3}})
    for correctness, learns in ((None, False), (f"{tmp_path}/judges.py:shape", True)):
        section = {**shaped, "correctness": correctness}
        rollout = {"n_samples_per_prompt": 4}
        with start(staleness, reward=section, algorithm=algorithm, rollout=rollout) as (
            collector,
            engine,
        ):
            publish(collector, engine, 0)
            groups, metrics = collector.collect(0)
        assert any(len(set(group.rewards)) > 1 for group in groups)
        assert (metrics["rollout/group_filter_share"] == 0) == learns
        assert metrics["rollout/solved_share"] == learns


def test_without_the_filter_no_group_is_left_out(start, staleness: int) -> None:
    never = {"functions": [{"name": "exact_match"}], "workers": 1}
    with start(staleness, reward=never) as (collector, engine):
        publish(collector, engine, 0)
        _, metrics = collector.collect(0)
        assert metrics["rollout/group_filter_share"] == 0
        assert metrics["rollout/zero_advantage_share"] == 1


def test_questions_that_do_not_fit_are_left_out_and_counted(
    start, staleness: int, tmp_path: Path
) -> None:
    short, long = ({"prompt": text, "answer": "4"} for text in ("2 + 2", "2 + " * 200 + "2"))
    sections = jsonl(tmp_path, long, short, short, long) | {"prompts": {"max_prompt_tokens": 100}}
    with start(staleness, **sections) as (collector, engine):
        publish(collector, engine, 0)
        groups, metrics = collector.collect(0)
        assert metrics["rollout/prompts_too_long"] >= 1
        assert {g.problem.messages[-1]["content"] for g in groups} == {"2 + 2"}
    sections |= jsonl(tmp_path, long)
    with start(staleness, **sections) as (collector, engine):
        publish(collector, engine, 0)
        with pytest.raises(UserError, match="max_prompt_tokens=100"):
            collector.collect(0)


def test_a_conversation_to_imitate_is_refused(start, staleness: int, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"}]
    row = {"messages": turns, "answer": "4"}
    with start(staleness, **jsonl(tmp_path, row)) as (collector, engine):
        publish(collector, engine, 0)
        with pytest.raises(UserError, match="a conversation to imitate"):
            collector.collect(0)


THINKS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)


def test_rewards_see_what_the_template_wrote_of_the_turn(start, staleness, tmp_path: Path) -> None:
    """In training and, by the same builder, in an evaluation; in a span's marks as well."""
    source = "def judge(s):\n    return float(s.turn.startswith('<think>' + s.response[:1]))\n"
    sections = {"reward": rewards(tmp_path, source, "judge")}
    sections["tokenizer"] = {"chat_template": THINKS}
    with start(staleness, **sections) as (collector, engine):
        publish(collector, engine, 0)
        groups, _ = collector.collect(0)
        builder = collector._rules._builder if staleness else collector._builder
        problems = [group.problem for group in groups]
        groups += builder.respond(problems, 1, builder.sampling, "eval/some")
    assert {t.reward.value for g in groups for t in g.trajectories} == {1.0}


def test_what_is_solved_is_asked_less_and_each_source_has_its_figures(
    start, staleness: int, tmp_path: Path
) -> None:
    """The reward solves the first source's only question always, the other's never."""
    reward = tmp_path / "known.py"
    reward.write_text("def known(sample):\n    return float(sample.problem.answer == '1')\n")
    for name, answer in (("a", "1"), ("b", "2")):
        row = {"prompt": "2 + 2", "answer": answer}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    sources = [{"kind": "jsonl", "path": str(tmp_path / f"{name}.jsonl")} for name in "ab"]
    sections = {
        "data": {"train": sources, "curriculum": {"easy_threshold": 1.0, "easy_fraction": 0.0}},
        "reward": {"functions": [{"name": f"{reward}:known"}], "workers": 1},
    }
    with start(staleness, **sections) as (collector, engine):
        for step in range(3):
            publish(collector, engine, step)
            groups, metrics = collector.collect(step)
        for name, solved in (("a", 1), ("b", 0)):
            assert metrics[f"source/{name}/solved_share"] == solved
            assert metrics[f"source/{name}/reward_mean"] == solved
            mine = [g for g in groups if g.problem.source == name]
            assert metrics[f"source/{name}/share"] == len(mine) / BATCH
            assert metrics[f"source/{name}/response_tokens_mean"] > 0
        assert metrics["data/easy_questions"] == 1
        assert metrics["data/turns_passed_over"] > 0
        collector.load_state(collector.state())
