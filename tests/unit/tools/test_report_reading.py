"""The report as people read it: on phones, in the dark, by keys and touch, and while runs go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rlsd.commands import report as command
from megatron_rlsd.observability.metrics_file import metrics_line
from megatron_rlsd.observability.report import run_data
from megatron_rlsd.observability.report.summary import axes, differing, same_but_for_the_seed
from tests.browser.chromium import Page, chromium, chromium_or_skip

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[3]
LONG = "a_name_without_any_break_" * 6
READY = "document.documentElement?.dataset.ready === 'true'"
RUNS = "document.querySelector('#runs').textContent"
SIZES = [(360, "light"), (360, "dark"), (1280, "light"), (1280, "dark")]


def step_line(step: int, seed: int = 0) -> str:
    metrics = {
        "rollout/reward_mean": step + seed / 10,
        "rollout/response_tokens": 100.0,
        f"reward/{LONG}": step * 0.5,
        "train/lr": 1e-4,
        "time/step_s": 36.0,
        "time/rollout_s": 30.0,
    }
    return metrics_line(step, metrics, 1e9 + step)


def response(number: int, reward: float) -> dict[str, object]:
    columns = {"id": [1, 2], "text": ["on", "e"], "gain": [0.1 * number, -0.2]}
    return {
        "problem_id": "sum/1",
        "question": "1 + 1?",
        "answer": "2",
        "response": "one",
        "reward": reward,
        "advantage": reward - 0.5,
        "finish_reason": "stop",
        "tokens": 2,
        "token_columns": columns,
    }


def write_run(folder: Path, seed: int, steps: int = 5) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(
        f"run_dir: {folder}\nalgorithm: {{name: rlsd}}\nmodel: {{hf_path: /models/{LONG}}}\n"
        f"train: {{steps: 8, seed: {seed}}}\noptimizer: {{lr: {1 + seed // 9}}}\n"
        "data: {train: [{kind: reasoning_gym, task: chain_sum}]}\n"
    )
    lines = [metrics_line(0, {"eval/sums/greedy_pass@1": 0.25})]
    lines += [step_line(step, seed) for step in range(steps)]
    lines += [metrics_line(steps, {"eval/sums/greedy_pass@1": 0.75})]
    (folder / "metrics.jsonl").write_text("".join(lines))
    warning = {"time": 1.0, "step": 2, "text": f"{LONG} <b>drifts</b>\nsecond line"}
    (folder / "warnings.jsonl").write_text(json.dumps(warning) + "\n")
    (folder / "samples").mkdir()
    rows = [response(0, 0.0), response(1, 0.0), response(2, 1.0)]
    rows.append({**response(3, 0.5), "problem_id": "sum/2"})
    (folder / "samples/step_000004.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def end(folder: Path) -> None:
    (folder / "status.json").write_text(
        json.dumps({"status": "finished", "exit_code": 0, "message": ""})
    )


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds of one run, and a run with another learning rate."""
    folder = tmp_path_factory.mktemp("reading")
    runs = [write_run(folder / f"seed_{seed}", seed) for seed in (1, 2, 3)]
    runs.append(write_run(folder / LONG, 9))
    end(runs[0])
    out = folder / "report.html"
    assert command.main([*map(str, runs), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(chromium_or_skip(), tmp_path_factory.mktemp("profile")) as page:
        yield page


def show(page: Page, file: Path, width: int = 1280, scheme: str = "light") -> None:
    page.errors.clear()
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=900,
              deviceScaleFactor=1, mobile=False)  # fmt: skip
    page.call(
        "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
    )
    page.open(file.as_uri())
    page.wait_for(READY)


def press(page: Page, key: str, code: int) -> None:
    for kind in ("keyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code)


def tip(page: Page) -> str:
    return page.run("(tip => tip.hidden ? '' : tip.innerText)(document.querySelector('#tip'))")


def contrast(first: list[float], second: list[float]) -> float:
    """As WCAG 2 defines it, of two sRGB colours [0, 255]."""

    def luminance(colour: list[float]) -> float:
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
            for c in (part / 255 for part in colour)
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted([luminance(first), luminance(second)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_nothing_spills_and_curves_are_seen(
    opened: Page, page_file: Path, width: int, scheme: str
) -> None:
    show(opened, page_file, width, scheme)
    opened.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    opened.run("document.querySelector('.compare').click()")
    assert opened.errors == []
    inside = opened.run("document.documentElement.clientWidth")
    assert opened.run("document.documentElement.scrollWidth") <= inside
    spilling = opened.run(
        "[...document.querySelectorAll('header *, main *')].filter((node) => node.offsetParent"
        " && !node.closest('.scroll') && node.getBoundingClientRect().right >"
        " Math.min(innerWidth, (node.closest('.card') ?? document.body).getBoundingClientRect()"
        ".right) + 1).map((node) => `${node.tagName} ${node.textContent.slice(0, 30)}`)"
    )
    assert spilling == []
    colours = opened.run(
        "(() => { const node = document.body.appendChild(document.createElement('i'));"
        " const of = (name) => { node.style.color = `var(${name})`;"
        " return getComputedStyle(node).color.match(/[0-9.]+/g).slice(0, 3).map(Number); };"
        " return [of('--panel'), ...[...Array(8).keys()].map((i) => of(`--run-${i}`))]; })()"
    )
    panel, *runs = colours
    assert len({tuple(colour) for colour in runs}) == 8
    assert min(contrast(panel, colour) for colour in runs) >= 3.0  # WCAG 1.4.11, graphics


def test_the_summary_says_what_ran_and_what_came_of_it(opened: Page, page_file: Path) -> None:
    show(opened, page_file)
    card = opened.run("document.querySelector('.summary').innerText")
    assert card.startswith("seed_1\n")
    for row in ("state\tfinished", "steps\t5 of 8", f"what\trlsd on /models/{LONG}",
                "data\tchain_sum", "spent\t3 minutes, 500 tokens sampled",
                "reward\t0.1\t4.1\t+4", "sums, greedy\t0.25\t0.75\t+0.5",
                "1 warning"):  # fmt: skip
        assert row in card, card
    warning = opened.run("document.querySelector('.warnings p').textContent")
    assert warning == f"step 2 {LONG} <b>drifts</b>"
    assert opened.run("document.querySelectorAll('.summary')[1].innerText").count("not ended") == 1


def test_what_matters_stands_first_and_constants_are_folded(opened: Page, page_file: Path) -> None:
    show(opened, page_file)
    groups = opened.run(
        "[...document.querySelectorAll('#curve-groups details')].map((each) => [each.dataset.group,"
        " each.open, [...each.querySelectorAll('.card')].map((card) => card.dataset.metric)])"
    )
    assert groups[0] == ["first", True, ["rollout/reward_mean", "eval/sums/greedy_pass@1"]]
    assert groups[-1][0] == "constant"
    assert groups[-1][1] is False
    assert {"train/lr", "time/step_s"} <= set(groups[-1][2])
    assert f"reward/{LONG}" not in groups[-1][2]


def test_seeds_are_a_mean_with_its_range(opened: Page, page_file: Path) -> None:
    show(opened, page_file)
    card = "[data-metric='rollout/reward_mean']"
    counts = "['polyline', 'polygon'].map((n) => document.querySelectorAll(`CARD ${n}`).length)"
    assert opened.run(counts.replace("CARD", card)) == [2, 1]
    opened.move_to(f"{card} svg")
    assert "seed_1 and 2 more seeds @ 2\t2.2 (2.1 to 2.3)" in tip(opened), tip(opened)
    opened.choose("#bands", "")
    assert opened.run(counts.replace("CARD", card)) == [4, 0]


def test_curves_go_by_steps_tokens_or_hours(opened: Page, page_file: Path) -> None:
    show(opened, page_file)
    assert opened.run("[...document.querySelector('#x-axis').options].map((o) => o.value)") == [
        *("step", "tokens", "hours"),
    ]
    last = '[...document.querySelectorAll(\'[data-metric="rollout/reward_mean"] svg text'
    last += "[text-anchor=middle]')].at(-1).textContent"
    opened.choose("#x-axis", "tokens")
    assert opened.run(last) == "400"  # spent before step 4
    opened.choose("#x-axis", "hours")
    assert opened.run(last) == "0.04"


def test_the_keyboard_reaches_charts_bars_and_tokens(opened: Page, page_file: Path) -> None:
    show(opened, page_file)
    opened.choose("#bands", "")
    opened.run("document.querySelector('#bands').focus()")
    for _ in range(2):  # the folding group's heading, its first chart
        press(opened, "Tab", 9)
    assert "seed_1 @ 4\t4.1" in tip(opened)
    press(opened, "ArrowLeft", 37)
    assert "seed_1 @ 3\t3.1" in tip(opened)
    press(opened, "Home", 36)
    assert "seed_1 @ 0\t0.1" in tip(opened)
    press(opened, "Escape", 27)
    assert tip(opened) == ""
    opened.run("document.querySelector('.phase-bars').focus()")
    press(opened, "ArrowRight", 39)
    assert tip(opened).startswith("step 0")
    opened.run("document.querySelector('.tokens').focus()")
    press(opened, "ArrowRight", 39)
    press(opened, "ArrowRight", 39)
    assert tip(opened).startswith('"e" token 1, id 2')
    press(opened, "Escape", 27)
    assert tip(opened) == ""


def test_a_touch_shows_what_the_mouse_does(opened: Page, page_file: Path) -> None:
    show(opened, page_file, 360)
    opened.call("Emulation.setTouchEmulationEnabled", enabled=True)
    try:
        for selector, told in (
            ("[data-metric='rollout/reward_mean'] svg", "seed_1 and 2 more seeds @ 2"),
            (".token", '"on" token 0, id 1'),
        ):
            opened.run(
                f"document.querySelector(\"{selector}\").scrollIntoView({{block: 'center'}})"
            )
            x, y = opened.run(
                f'(() => {{ const box = document.querySelector("{selector}")'
                ".getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2];"
                " })()"
            )
            opened.call(
                "Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}]
            )
            opened.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
            opened.wait_for("!document.querySelector('#tip').hidden")
            assert told in tip(opened)
            box = opened.run(
                "(() => { const b = document.querySelector('#tip').getBoundingClientRect();"
                " return [b.left, b.right]; })()"
            )
            assert box[0] >= 0
            assert box[1] <= 360
    finally:
        opened.call("Emulation.setTouchEmulationEnabled", enabled=False)


def test_two_responses_of_a_group_side_by_side(opened: Page, page_file: Path) -> None:
    show(opened, page_file)
    opened.choose("#credit-order", "file")
    buttons = opened.run("[...document.querySelectorAll('#responses .response')].map((card) =>"
                         " card.querySelectorAll('.compare').length)")  # fmt: skip
    assert buttons == [1, 1, 1, 0]  # the last one is alone with its question
    opened.run("document.querySelector('.compare').click()")
    rewards = "[...document.querySelectorAll('#pair .reward')].map((node) => node.textContent)"
    assert opened.run(rewards) == ["0", "1"]  # the other one is judged otherwise
    left, right = opened.run(
        "[...document.querySelectorAll('#pair .response')].map((n) => n.getBoundingClientRect().x)"
    )
    assert right > left + 300
    opened.choose("#pair-sides > div:nth-child(2) select", "1")
    assert opened.run(rewards) == ["0", "0"]
    opened.run("document.querySelector('#pair-close').click()")
    assert opened.run("document.querySelector('#pair').hidden") is True
    assert opened.run("document.querySelectorAll('#responses .response').length") == 4


def test_a_live_page_follows_and_stays_as_it_was_left(opened: Page, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 1)
    command = [sys.executable, "-m", "megatron_rlsd", "report", str(run), "--live", "--every", "1"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            assert "report.html" in process.stdout.readline()
            show(opened, run / "report.html")
            assert "every 1 s" in opened.run("document.querySelector('#live').textContent")
            opened.choose("#x-axis", "hours")
            with (run / "metrics.jsonl").open("a") as file:
                file.write(step_line(5))
            opened.wait_for(f"{READY} && {RUNS} === 'run (6 steps)'")
            assert opened.run("document.querySelector('#x-axis').value") == "hours"
            end(run)
            assert process.wait(60) == 0
            opened.wait_for(f"{READY} && document.querySelector('#live').hidden")
            assert "finished" in opened.run("document.querySelector('.summary').innerText")
        finally:
            process.kill()
    assert opened.errors == []


def test_the_command_says_which_settings_differ(
    page_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [page_file.parent / name for name in ("seed_1", LONG)]
    assert command.main([*map(str, runs), "--out", str(page_file.parent / "two.html")]) == 0
    told = capsys.readouterr().out.partition("settings that differ:\n")[2].split()
    assert told == [
        *("train.seed", "seed_1", "1", LONG, "9", "optimizer.lr", "seed_1", "1", LONG, "2"),
    ]


def test_seeds_are_runs_that_differ_in_nothing_else() -> None:
    settings = [
        {"run_dir": "a", "train.seed": "1", "lr": "1"},
        {"run_dir": "b", "train.seed": "2", "lr": "1"},
        {"run_dir": "c", "train.seed": "1", "lr": "2"},
        {},
        {},
    ]
    assert same_but_for_the_seed(settings) == [[0, 1], [2], [3], [4]]
    assert differing(settings[:3]) == {"train.seed": ["1", "2", "1"], "lr": ["1", "1", "2"]}
    assert differing([{"old": "1"}, {"new": "1"}]) == {}


def test_old_runs_without_times_or_tokens_have_no_such_axis(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "time/step_s": 0.0}\n')
    assert run_data(tmp_path)["axis"] == {"steps": [0, 1]}
    assert axes([], 10) == {"steps": []}
    spent = axes([{"step": 3, "time/step_s": 1800.0, "train/tokens": 7}], 10)
    assert spent == {"steps": [3, 4], "hours": [0, 0.5], "tokens": [0, 7]}
