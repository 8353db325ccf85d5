"""Order, mixing, resuming and evaluation views of problem sources."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_rlsd.config import (
    CurriculumConfig,
    DataConfig,
    GuessingGameSource,
    JsonlSource,
    ReasoningGymSource,
    Source,
)
from megatron_rlsd.data import build_sources, evaluation_problems
from megatron_rlsd.runtime.errors import UserError


def jsonl(folder: Path, name: str, count: int, **settings: object) -> JsonlSource:
    path = folder / f"{name}.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{name} {i}", "answer": i}) + "\n" for i in range(count))
    )
    return JsonlSource.model_validate({"kind": "jsonl", "path": str(path), **settings})


def gym(**settings: object) -> ReasoningGymSource:
    return ReasoningGymSource.model_validate(
        {"kind": "reasoning_gym", "task": "chain_sum", **settings}
    )


def ids(problems: list) -> list[str]:
    return [problem.id for problem in problems]


@pytest.mark.parametrize("sizes", [(1,), (7,), (7, 3), (1, 1, 5)])
def test_resuming_anywhere_continues_the_same_stream(
    tmp_path: Path, sizes: tuple[int, ...]
) -> None:
    sources = [jsonl(tmp_path, f"s{i}", size, weight=i + 1) for i, size in enumerate(sizes)]
    whole = ids(build_sources(sources, seed=5).next(60))
    for position in (0, 1, 6, 7, 8, 29):
        interrupted = build_sources(sources, seed=5)
        interrupted.next(position)
        state = json.loads(json.dumps(interrupted.state()))
        resumed = build_sources(sources, seed=5)
        resumed.next(13)
        resumed.load_state(state)
        assert ids(resumed.next(60 - position)) == whole[position:]


def test_state_does_not_grow_with_the_position(tmp_path: Path) -> None:
    source = build_sources([jsonl(tmp_path, "a", 10)], seed=0)
    source.next(3)
    early = len(json.dumps(source.state()))
    source.next(5000)
    assert len(json.dumps(source.state())) <= early + 4


def test_the_batch_size_does_not_change_the_stream(tmp_path: Path) -> None:
    sources = [jsonl(tmp_path, "a", 9, weight=2), jsonl(tmp_path, "b", 4)]
    one_by_one = build_sources(sources, seed=1)
    assert [one_by_one.next(1)[0].id for _ in range(40)] == ids(
        build_sources(sources, seed=1).next(40)
    )


def test_every_epoch_holds_each_problem_once_in_another_order(tmp_path: Path) -> None:
    source = build_sources([jsonl(tmp_path, "a", 50)], seed=0)
    epochs = [ids(source.next(50)) for _ in range(3)]
    assert all(len(set(epoch)) == 50 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_seed_decides_the_order(tmp_path: Path) -> None:
    config = jsonl(tmp_path, "a", 50)
    orders = [ids(build_sources([config], seed=seed).next(50)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_without_shuffling_the_file_order_repeats(tmp_path: Path) -> None:
    source = build_sources([jsonl(tmp_path, "a", 3, shuffle=False)], seed=0)
    assert ids(source.next(7)) == [f"a.jsonl:{n}" for n in (1, 2, 3, 1, 2, 3, 1)]


def test_any_stretch_is_mixed_by_weight(tmp_path: Path) -> None:
    sources: list[Any] = [
        jsonl(tmp_path, "a", 5, weight=6.0),
        jsonl(tmp_path, "b", 100, weight=3.0),
        gym(weight=1.0, size=20),
    ]
    source = build_sources(sources, seed=3)
    for start in range(0, 200, 20):
        counts = Counter(problem.source for problem in source.next(20))
        assert counts["a"] in (11, 12, 13), start
        assert counts["b"] in (5, 6, 7), start
        assert counts["chain_sum"] in (1, 2, 3), start


def test_state_of_other_data_is_refused(tmp_path: Path) -> None:
    state = build_sources([jsonl(tmp_path, "a", 5)], seed=0).state()
    with pytest.raises(UserError, match=r"a \(5 problems\).*a \(6 problems\)"):
        build_sources([jsonl(tmp_path, "a", 6)], seed=0).load_state(state)
    with pytest.raises(UserError, match=r"seed 0 .* seed 1"):
        build_sources([jsonl(tmp_path, "a", 5)], seed=1).load_state(state)


def rewritten(source: JsonlSource, how: str) -> None:
    path = Path(source.path)
    lines = path.read_text().splitlines()
    if how == "reordered":
        lines.reverse()
    elif how == "edited":
        lines[2] = lines[2].replace('"answer": 2', '"answer": 7')
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("how", ["reordered", "edited"])
def test_a_file_of_the_same_length_with_other_content_is_refused(tmp_path: Path, how: str) -> None:
    sources = [jsonl(tmp_path, "a", 5), jsonl(tmp_path, "b", 5)]
    state = build_sources(sources, seed=0).state()
    rewritten(sources[1], "in the same way")
    build_sources(sources, seed=0).load_state(state)
    rewritten(sources[1], how)
    with pytest.raises(UserError, match="the content of b has changed since"):
        build_sources(sources, seed=0).load_state(state)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (gym(size=9), gym(size=9, seed=1)),
        (gym(size=9), gym(size=9, params={"min_terms": 2, "max_terms": 3})),
        (
            GuessingGameSource(kind="guessing_game", size=9),
            GuessingGameSource(kind="guessing_game", size=9, high=50),
        ),
    ],
)
def test_a_generator_with_other_settings_is_other_data(before: Source, after: Source) -> None:
    state = build_sources([before], seed=0).state()
    build_sources([before], seed=0).load_state(state)
    with pytest.raises(UserError, match="a generator got other settings"):
        build_sources([after], seed=0).load_state(state)


def test_a_state_of_release_0_1_has_no_digest_to_compare(tmp_path: Path) -> None:
    source = build_sources([jsonl(tmp_path, "a", 5)], seed=0)
    state = source.state()
    del state["tables"][0]["digest"]
    source.load_state(state)


def test_evaluation_takes_the_first_problems_unshuffled(tmp_path: Path) -> None:
    config = jsonl(tmp_path, "a", 5, shuffle=True)
    assert ids(evaluation_problems(config, 3)) == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
    assert len(evaluation_problems(config, 100)) == 5
    assert ids(evaluation_problems(gym(), 2)) == ["chain_sum/0", "chain_sum/1"]


def test_skipped_lines_are_told(tmp_path: Path) -> None:
    config = jsonl(tmp_path, "a", 2, on_malformed="skip")
    with Path(config.path).open("a") as file:
        file.write("nonsense\n")
    (note,) = build_sources([config], seed=0).notes()
    assert "a.jsonl" in note
    assert "skipped 1" in note
    assert "a.jsonl:3" in note


def test_a_schedule_moves_the_mix(tmp_path: Path) -> None:
    sources = [
        jsonl(tmp_path, "a", 5, weight_schedule=[[0, 1.0], [10, 0.0]]),
        jsonl(tmp_path, "b", 9, weight_schedule=[[0, 0.0], [10, 1.0]]),
        jsonl(tmp_path, "c", 7, weight=1.0),
    ]
    stream = build_sources(sources, seed=3, questions_per_step=20)
    parts = [Counter(problem.source for problem in stream.next(100)) for _ in range(4)]
    # The integral of a's weight over steps 0 to 5 is 3.75 of 10 in total, over 5 to 10 it is 1.25.
    for part, expected in zip(parts, [(37.5, 12.5), (12.5, 37.5), (0, 50), (0, 50)], strict=True):
        assert abs(part["a"] - expected[0]) <= 1
        assert abs(part["b"] - expected[1]) <= 1
        assert part["c"] in (49, 50, 51)


@pytest.mark.parametrize("position", [1, 57, 130])
def test_a_schedule_is_resumed_to_the_question(tmp_path: Path, position: int) -> None:
    sources = [
        jsonl(tmp_path, "a", 5, weight_schedule=[[0, 0.9], [7, 0.1], [8, 0.3]]),
        jsonl(tmp_path, "b", 9, weight=0.7),
    ]
    whole = ids(build_sources(sources, seed=3, questions_per_step=10).next(200))
    interrupted = build_sources(sources, seed=3, questions_per_step=10)
    interrupted.next(position)
    resumed = build_sources(sources, seed=3, questions_per_step=10)
    resumed.load_state(json.loads(json.dumps(interrupted.state())))
    assert ids(resumed.next(200 - position)) == whole[position:]


def test_a_schedule_that_is_new_begins_without_debts(tmp_path: Path) -> None:
    plain = [jsonl(tmp_path, "a", 5), jsonl(tmp_path, "b", 9)]
    stream = build_sources(plain, seed=0)
    stream.next(100)
    planned = [
        each.model_copy(update={"weight_schedule": [(0, w)]})
        for each, w in zip(plain, (1, 3), strict=True)
    ]
    resumed = build_sources(planned, seed=0, questions_per_step=1)
    resumed.load_state(stream.state())
    assert Counter(problem.source for problem in resumed.next(40)) == {"a": 10, "b": 30}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([{"weight_schedule": [[5, 1.0], [5, 2.0]]}], "steps from 0 that rise"),
        ([{"weight_schedule": [[-1, 1.0]]}], "steps from 0 that rise"),
        ([{"weight_schedule": [[0, -1.0]]}], "greater than or equal to 0"),
        ([{"weight_schedule": [[0, 1.0]], "weight": 2}], "give one"),
        (
            [{"weight_schedule": [[0, 1.0], [9, 0.0]]}],
            "no source of data.train has a weight at step 9",
        ),
    ],
)
def test_a_schedule_that_cannot_be_is_named(settings: list[dict], expected: str) -> None:
    sources = [{"kind": "jsonl", "path": "x", **each} for each in settings]
    with pytest.raises(ValueError, match=expected):
        DataConfig.model_validate({"train": sources})


def easy_stream(sources: list[JsonlSource], fraction: float = 0.1):
    return build_sources(
        sources, 5, curriculum=CurriculumConfig(easy_threshold=1.0, easy_fraction=fraction)
    )


def play(stream, count: int, easy: set[str]) -> list[str]:
    """Ask questions, of which those in ``easy`` are solved each time."""
    asked = []
    for _ in range(count):
        (problem,) = stream.next(1)
        stream.answered(problem, float(problem.id in easy))
        asked.append(problem.id)
    return asked


def test_an_easy_question_is_asked_less_and_each_epoch_still_asks_the_others(
    tmp_path: Path,
) -> None:
    easy = {f"a.jsonl:{number}" for number in range(1, 11)}
    stream = easy_stream([jsonl(tmp_path, "a", 20)])
    first = play(stream, 20, easy)
    assert len(set(first)) == 20
    later = Counter(play(stream, 400, easy))
    hard = [count for name, count in later.items() if name not in easy]
    assert len(hard) == 10
    assert max(hard) - min(hard) <= 1
    share = sum(later[name] for name in easy) / 400
    assert 0.04 < share < 0.16, share  # a tenth of the turns of half the questions
    assert stream.metrics()["data/easy_questions"] == 10
    assert stream.metrics()["data/turns_passed_over"] > 200


def test_a_question_that_is_no_longer_solved_is_asked_again(tmp_path: Path) -> None:
    stream = easy_stream([jsonl(tmp_path, "a", 4)], fraction=0.5)
    play(stream, 4, {f"a.jsonl:{n}" for n in range(1, 5)})
    asked = play(stream, 40, set())
    assert stream.metrics()["data/easy_questions"] == 0
    counts = Counter(asked[-16:])
    assert len(counts) == 4
    assert max(counts.values()) - min(counts.values()) <= 2


def test_easy_questions_alone_are_asked_all_the_same(tmp_path: Path) -> None:
    stream = easy_stream([jsonl(tmp_path, "a", 3)], fraction=0.0)
    assert len(play(stream, 30, {f"a.jsonl:{n}" for n in range(1, 4)})) == 30


def test_the_mix_is_of_questions_asked_not_of_turns(tmp_path: Path) -> None:
    sources = [jsonl(tmp_path, "a", 10, weight=3), jsonl(tmp_path, "b", 10)]
    stream = easy_stream(sources)
    counts = Counter(name[0] for name in play(stream, 200, {f"a.jsonl:{n}" for n in range(1, 9)}))
    assert counts == {"a": 150, "b": 50}


@pytest.mark.parametrize("position", [1, 30, 95])
def test_a_curriculum_is_resumed_to_the_question(tmp_path: Path, position: int) -> None:
    sources = [jsonl(tmp_path, "a", 12), jsonl(tmp_path, "b", 5, weight_schedule=[[0, 0.3]])]
    easy = {f"a.jsonl:{n}" for n in range(1, 9)} | {"b.jsonl:2"}
    whole = play(easy_stream(sources), 160, easy)
    interrupted = easy_stream(sources)
    play(interrupted, position, easy)
    resumed = easy_stream(sources)
    resumed.load_state(json.loads(json.dumps(interrupted.state())))
    assert resumed.metrics() == interrupted.metrics()
    assert play(resumed, 160 - position, easy) == whole[position:]
