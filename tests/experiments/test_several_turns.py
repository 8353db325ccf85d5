"""The experiment over several turns compares like with like, and reads its own results."""

from __future__ import annotations

import json

from examples.experiments import several_turns


def test_the_arms_of_a_seed_differ_in_the_algorithm_alone() -> None:
    arms = [several_turns.settings(arm, 1, []).model_dump() for arm in several_turns.ARMS]
    for arm in arms:
        # GRPO's section lacks what the file says of evidence, which GRPO does not use.
        del arm["run_dir"], arm["algorithm"]
    assert arms[0] == arms[1]
    assert arms[0]["train"]["seed"] == 1


def test_the_table_has_every_evaluation_of_finished_runs(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(several_turns, "ROOT", tmp_path)
    for arm, seed, success in (("grpo", 0, 0.5), ("grpo", 1, 0.7), ("rlsd", 0, 0.25)):
        run_dir = tmp_path / f"{arm}_{seed}"
        (run_dir / "hf/final").mkdir(parents=True)
        if arm == "grpo":
            (run_dir / "hf/final/config.json").touch()
        lines = [
            {"step": step, **{f"eval/guessing_game/{m}": value for m in several_turns.MEASURES}}
            for step, value in ((0, 0.1), (40, success))
        ]
        text = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 39}])
        (run_dir / "metrics.jsonl").write_text(text)
    several_turns.report([0, 1])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert rows == [
        "| grpo | 0 | 0 | 0.100 | 0.100 |",
        "| grpo | 0 | 40 | 0.500 | 0.500 |",
        "| grpo | 1 | 0 | 0.100 | 0.100 |",
        "| grpo | 1 | 40 | 0.700 | 0.700 |",
        "| grpo | mean | last | 0.600 | 0.600 |",
    ]
