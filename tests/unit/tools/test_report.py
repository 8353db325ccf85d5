"""tools/report.py: the page is opened in a real browser."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_rlsd.observability.metrics_file import metrics_line
from megatron_rlsd.observability.report import ReportLimits, report_page, run_data
from megatron_rlsd.observability.report.reduce import evenly, keep_extremes
from megatron_rlsd.observability.samples import write_samples
from megatron_rlsd.types import (
    Generation,
    Group,
    Problem,
    RewardResult,
    TokenCredit,
    Trajectory,
)
from tests.batches import trajectory
from tests.browser.chromium import Page, chromium, chromium_or_skip

# The page is made by the tool and opened in a browser, by whichever test comes first.
pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[3]
TOOL = ROOT / "tools" / "report.py"
NASTY = "</script><img src=x onerror=alert(1)>"


def response(pieces: list[str], reward: float, gains: list[float] | None, text: str) -> Trajectory:
    """Tokens of the student's probability 0.5; its advantage has the reward's sign."""
    advantage = 1.0 if reward > 0 else -1.0
    count = len(pieces)
    problem = Problem("sum/1", ({"role": "user", "content": f"1 + 1? {NASTY}"},), "2")
    generation = Generation.of(list(range(count)), [math.log(0.4)] * count, "stop", 0)
    credit = None
    if gains is not None:
        gain = np.array(gains, np.float32)
        same = np.ones(count, np.float32)
        credit = TokenCredit(
            log_probs=math.log(0.5) * same,
            teacher_log_probs=math.log(0.5) + gain,
            gain=gain,
            evidence_weight=np.exp(advantage * gain),
            advantages=advantage * 0.9 * same,
            entropy=0.7 * same,
        )
    return trajectory(
        *(problem, generation, text),
        reward=RewardResult(reward, {}),
        advantage=advantage,
        credit=credit,
    )


def write_run(folder: Path, steps: int, loss: float) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(
        f"run_dir: {folder}\noptimizer: {{lr: {loss}}}\nalgorithm: {{evidence_clip: 0.2}}\n"
    )
    lines = []
    for step in range(steps):
        spike = 100.0 if step == steps // 3 else 0.0
        metrics = {"train/loss": loss + spike, "rollout/reward_mean": step / steps}
        times = {"time/step_s": 3.0, "time/rollout_s": 1.0, "time/update_s": 1.5}
        lines.append(metrics_line(step, metrics | times))
    (folder / "metrics.jsonl").write_text("".join(lines))
    pieces = ["the ", "reference ", "solution ", NASTY]
    groups = [
        Group(
            Problem("sum/1", ({"role": "user", "content": "1 + 1?"},), "2"),
            [
                response(pieces, 1.0, [0.3, -0.1, 0.0, 0.01], "".join(pieces)),
                response(["1", " é", ""], 0.0, [0.0, -0.9, 0.0], "1 é"),
                response(["no", " signal"], 0.5, None, "no signal"),
            ],
        )
    ]
    for step in (0, steps - 1):
        write_samples(folder / "samples", step, groups, lambda ids: "".join(pieces[i] for i in ids))
    # The second and third response have pieces of their own.
    for path in (folder / "samples").iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows[1]["token_columns"]["text"] = ["1", " é", ""]
        rows[2]["token_columns"]["text"] = ["no", " signal"]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    event = {"ph": "X", "tid": 0, "cat": "phase", "args": {"step": 0}}
    events = [{**event, "name": "rollout", "ts": 1e6, "dur": 5e3, "pid": rank} for rank in range(2)]
    (folder / "trace").mkdir()
    (folder / "trace/trace.json").write_text(
        "[\n" + "".join(json.dumps(each) + ",\n" for each in events)
    )
    return folder


def report(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, one of them long."""
    folder = tmp_path_factory.mktemp("report")
    runs = [write_run(folder / "short", 12, 1.0), write_run(folder / "long", 5000, 2.0)]
    ended = report(*runs, "--out", folder / "report.html")
    assert ended.returncode == 0, ended.stderr
    return folder / "report.html"


@pytest.fixture(scope="module")
def opened(page_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(chromium_or_skip(), tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(opened: Page, page_file: Path) -> Page:
    opened.errors.clear()
    opened.requests.clear()
    opened.open(page_file.as_uri())
    opened.wait_for("document.documentElement.dataset.ready === 'true'")
    return opened


def texts(page: Page, selector: str) -> list[str]:
    return page.run(
        f"[...document.querySelectorAll({json.dumps(selector)})]"
        ".filter(n => n.offsetParent).map(n => n.textContent)"
    )


def test_the_page_is_one_file_that_asks_for_nothing(page: Page, page_file: Path) -> None:
    assert page.errors == []
    assert page.requests == [page_file.as_uri()]
    source = page_file.read_text()
    links = re.findall(r'\b(?:src|href)="([^"]*)"', source)
    assert links == ["#summary", "#curves", "#phases", "#credit"]
    assert source.count("</script>") == 2  # what the responses hold ends no script
    assert page.run("document.querySelectorAll('img').length") == 0


def test_runs_are_compared_in_curves(page: Page) -> None:
    card = "[data-metric='rollout/reward_mean']"
    assert texts(page, "#runs > span") == [
        "short (12 steps)",
        "long (5000 steps)",
    ]
    assert page.run(f'document.querySelectorAll("{card} polyline").length') == 2
    page.move_to(f"{card} svg")
    hover = page.run("document.querySelector('#tip').innerText")
    # The middle of the axis is half of the long run; the short one is nearest at its end.
    assert re.search(r"long @ 2\d{3}\s+0\.[45]", hover), hover
    assert re.search(r"short @ 11\s+0\.9167", hover), hover
    assert texts(page, "#settings td") == ["optimizer.lr", "1.0", "2.0"]


def test_a_search_leaves_the_metrics_it_names(page: Page) -> None:
    page.write("#metric-search", "LOSS")
    assert texts(page, ".chart h3") == ["losstrain/loss"]
    page.write("#metric-search", "")
    assert {"losstrain/loss", "time/step_s"} <= set(texts(page, ".chart h3"))


def test_phases_by_step_and_on_every_rank(page: Page) -> None:
    assert page.run("document.querySelectorAll('.phase-bars g').length") == 12
    page.move_to(".phase-bars g:nth-of-type(4) rect")
    hover = page.run("document.querySelector('#tip').innerText")
    assert hover.startswith("step 3")
    for row in ("rollout\t1 s", "update\t1.5 s", "other\t0.5 s", "step\t3 s"):
        assert row in hover
    assert page.run("document.querySelectorAll('.rank-rows rect').length") == 2
    page.choose("#phase-run", "1")
    assert page.run("document.querySelectorAll('.phase-bars g').length") == ReportLimits().bars


def test_a_token_tells_its_numbers(page: Page) -> None:
    assert len(texts(page, ".response")) == 3
    page.choose("#credit-order", "file")
    page.move_to(".response:nth-child(2) .token:nth-child(2)")
    hover = page.run("document.querySelector('#tip').innerText")
    assert page.run("document.querySelector('#tip').hidden") is False
    for row in (
        '" é" token 1, id 1',
        "privileged information gain\t-0.9",
        "evidence weight\t2.46",  # exp(0.9): blame that the teacher makes larger
        "advantage of the response\t-1",
        "advantage of the token\t-0.9",
        "p of the student\t0.5",
        "p of the teacher\t0.2033",
        "p at sampling\t0.4",
    ):
        assert row in hover, hover
    page.move_to("h1")
    assert page.run("document.querySelector('#tip').hidden") is True
    shades = page.run(
        "[...document.querySelectorAll('.response:nth-child(1) .token')]"
        ".map(n => n.style.background)"
    )
    more, less, none, _ = shades
    assert "--more" in more  # w = e^0.3, at the clip
    assert "--less" in less
    assert none == ""


def test_what_a_response_says_is_shown_and_never_run(page: Page) -> None:
    page.choose("#credit-order", "file")
    tokens = "[...document.querySelectorAll('.response:nth-child(1) .token')]"
    assert page.run(f"{tokens}.map(n => n.textContent).join('')").endswith(NASTY)
    leaking = page.run(
        f"{tokens}.filter(n => n.classList.contains('leak')).map(n => n.textContent)"
    )
    assert leaking == ["the ", "reference ", "solution "]
    assert texts(page, ".flag") == ["speaks of a solution"]


def test_filters_by_reward_gain_and_leakage(page: Page) -> None:
    def rewards() -> list[str]:
        return texts(page, ".response .reward")

    assert rewards() == ["0", "1", "0.5"]  # the largest |gain| first
    page.choose("#credit-order", "reward")
    assert rewards() == ["1", "0.5", "0"]
    page.write("#reward-min", "0.4")
    assert rewards() == ["1", "0.5"]
    page.write("#reward-max", "0.6")
    assert rewards() == ["0.5"]
    page.write("#reward-min", "")
    page.write("#reward-max", "")
    page.write("#gain-min", "0.5")
    assert rewards() == ["0"]
    assert texts(page, ".token:not(.faint)") == [" é"]
    page.write("#gain-min", "0.2")
    assert rewards() == ["1", "0"]
    page.choose("#leaks-only", "true")
    assert rewards() == ["1"]
    assert texts(page, "#credit-count") == ["1 of 3 responses"]


def test_long_runs_stay_small_and_keep_their_spikes(page_file: Path) -> None:
    assert page_file.stat().st_size < 400_000
    long = run_data(page_file.parent / "long")
    steps, values = long["series"]["train/loss"]
    assert len(steps) <= ReportLimits().points
    assert (steps[0], steps[-1]) == (0, 4999)
    assert steps == sorted(set(steps))
    assert max(values) == 102.0
    assert long["phases"]["steps"][-1][-1] == 4999


def test_reducing_keeps_the_ends_and_the_bounds() -> None:
    for count in (1, 4, 5, 17, 600, 601, 4321):
        values = [math.sin(7 * i) for i in range(count)]
        steps, kept = keep_extremes(list(range(count)), values, 600)
        assert len(steps) <= 600
        assert (steps[0], steps[-1]) == (0, count - 1)
        assert max(kept) == pytest.approx(max(values), rel=1e-5)
        assert min(kept) == pytest.approx(min(values), rel=1e-5)
    assert evenly(list(range(100)), 4) == [0, 33, 66, 99]
    assert evenly([1, 2], 4) == [1, 2]
    assert evenly([1, 2, 3], 1) == [3]


def test_the_credit_view_is_bounded_by_tokens(page_file: Path) -> None:
    run = page_file.parent / "short"
    [first, last] = run_data(run, ReportLimits(credit_tokens=10))["credit"]
    assert [len(r["columns"]["text"]) for r in first["responses"]] == [4, 1]
    assert (first["in_file"], last["step"]) == (3, 11)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path, page_file: Path) -> None:
    ended = report(tmp_path)
    assert ended.returncode == 2
    assert f"error: {tmp_path} is not a run folder" in ended.stderr
    run = page_file.parent / "short"
    assert "is named twice" in report(run, run, "--out", tmp_path / "x.html").stderr
    assert not (tmp_path / "x.html").exists()


def test_the_documented_number_of_tokens_is_shown_and_no_control_character(
    opened: Page, tmp_path: Path
) -> None:
    evil, count = "\x1b[31m\u202e", ReportLimits().credit_tokens
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "train/loss": 1.0, "time/step_s": 2.0}\n')
    columns = {"id": [1] * count, "text": [evil] * count, "gain": [0.5] * count}
    row = {
        "problem_id": evil,
        "question": evil,
        "answer": evil,
        "response": evil * count,
        "reward": 1.0,
        "advantage": 1.0,
        "finish_reason": "length",
        "tokens": count + 7,
        "leakage": {"phrases": []},
        "token_columns": columns,
    }
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/step_000000.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "report.html").write_text(report_page([tmp_path]))
    opened.errors.clear()
    opened.open((tmp_path / "report.html").as_uri())
    opened.wait_for("document.documentElement.dataset.ready === 'true'")
    assert opened.errors == []
    assert opened.run("document.querySelectorAll('.token').length") == count
    shown = opened.run("document.querySelector('#responses').textContent")
    assert shown.endswith(r"\x1b[31m\u202e" + " \u2026 7 more tokens")
    assert shown.count(r"\x1b[31m\u202e") == count + 3
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", shown)


def test_a_run_without_samples_or_settings_still_makes_a_page(opened: Page, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "train/loss": 1.0, "time/step_s": 2.0}\n')
    assert report(tmp_path).returncode == 0
    opened.errors.clear()
    opened.open((tmp_path / "report.html").as_uri())
    opened.wait_for("document.documentElement.dataset.ready === 'true'")
    assert opened.errors == []
    assert texts(opened, "#credit-count") == [
        "No run has samples (observability.samples_per_step)."
    ]
