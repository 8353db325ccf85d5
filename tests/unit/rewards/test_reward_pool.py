"""Every way in which a verifier can fail, with real worker processes and short limits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_rlsd.rewards import RewardPool
from megatron_rlsd.rewards.verdicts import Verdicts
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import RewardInput, RewardResult

pytestmark = pytest.mark.process

Sample = Callable[..., RewardInput]
Pool = Callable[..., RewardPool]

# The response says what the function is to do.
MISBEHAVING = """
import ctypes, math, os, subprocess, sys, time

def reward(sample):
    what = sample.response
    if what == "sleep": time.sleep(1e9)
    if what == "spin":
        while True: pass
    if what == "spin in C": return len(str(9 ** (9 ** 9)))
    if what == "print for ever":
        while True: print("x" * 1000)
    if what == "memory": return len(bytearray(1 << 34))
    if what == "_exit": os._exit(3)
    if what == "segfault": ctypes.string_at(0)
    if what == "exit": sys.exit("leaving")
    if what == "raise": raise KeyError("missing thing")
    if what == "orphan, _exit":
        if os.fork(): os._exit(3)
        time.sleep(60)
    if what == "close": os.closerange(3, 100)
    if what == "forge":
        for number in range(3, 9):
            try: os.write(number, b'{"job": 0, "call": 0, "value": 9}\\n')
            except OSError: pass
    return {"nan": math.nan, "inf": math.inf, "none": None, "text": "1.0", "list": [1.0],
            "huge": 10 ** 400, "complex": 1j, "true": True, "int": 2}.get(what, 1.0)

def length(sample):
    return len(sample.response)
"""

FAILURES = {
    "sleep": "took longer than 1 s",
    "spin": "took longer than 1 s",
    "spin in C": "took longer than 1 s",
    "print for ever": "took longer than 1 s",
    "memory": "MemoryError",
    "_exit": "its worker process died (exit code 3)",
    "segfault": "its worker process died (signal 11: Segmentation fault)",
    "exit": "SystemExit: leaving",
    "raise": "KeyError: 'missing thing'",
    "close": "its worker process died",
    "forge": "its worker broke the pool's protocol",
    "nan": "ValueError: returned nan, which is not a finite number",
    "inf": "ValueError: returned inf, which is not a finite number",
    "none": "TypeError: returned None, which is not a number",
    "text": "TypeError: returned '1.0', which is not a number",
    "list": "TypeError: returned [1.0], which is not a number",
    "huge": "OverflowError",
    "complex": "TypeError: returned 1j, which is not a number",
}


def test_each_failure_costs_its_own_call_only(pool: Pool, sample: Sample) -> None:
    responses = []
    for failure in FAILURES:
        responses += ["fine", failure, "true", "int"]
    scorer = pool("reward", "length", source=MISBEHAVING, timeout_seconds=1, workers=2)
    samples = [sample(response, id=f"p{i}") for i, response in enumerate(responses)]
    results = scorer.score(samples)
    fine = {"fine": 1.0, "true": 1.0, "int": 2.0}
    for response, result in zip(responses, results, strict=True):
        assert result.parts["length"] == len(response)
        assert result.parts["reward"] == fine.get(response)
        if response in fine:
            assert result.errors == {}
            assert result.value == fine[response] + len(response)
        else:
            # What the other function said of it is not a verdict.
            assert result.value is None
            assert list(result.errors) == ["reward"]
            assert result.errors["reward"].startswith(FAILURES[response])
    # The pool is as good as new.
    assert [r.value for r in scorer.score([sample("fine")] * 3)] == [5.0] * 3


def test_a_function_without_a_weight_is_no_part_of_the_verdict(pool: Pool, sample: Sample) -> None:
    watched = {"name": "reward", "weight": 0}
    scorer = pool(watched, "length", source=MISBEHAVING, max_error_share=1)
    failed, fine = scorer.score([sample("raise"), sample("fine")])
    assert (failed.value, failed.parts["reward"]) == (5.0, None)
    assert list(failed.errors) == ["reward"]
    assert (fine.value, fine.parts["reward"]) == (4.0, 1.0)


def test_a_sum_that_is_no_finite_number_is_no_verdict(pool: Pool, sample: Sample) -> None:
    source = "def huge(sample): return 1e308"
    scorer = pool({"name": "huge", "weight": 10}, source=source)
    (result,) = scorer.score([sample("")])
    assert (result.value, result.parts) == (None, {"huge": 1e308})
    assert list(result.errors) == ["the weighted sum"]


def test_time_out_takes_the_limit_and_not_much_longer(pool: Pool, sample: Sample) -> None:
    scorer = pool("reward", source=MISBEHAVING, timeout_seconds=1, workers=2, max_error_share=1)
    scorer.wait_until_ready()
    start = time.monotonic()
    results = scorer.score([sample("sleep"), sample("spin"), *[sample("fine")] * 50])
    assert 1 <= time.monotonic() - start < 6
    assert [r.value for r in results] == [None, None] + [1.0] * 50


def test_waiting_behind_a_slow_call_is_not_counted(pool: Pool, sample: Sample) -> None:
    source = "import time\ndef reward(sample): time.sleep(0.4); return 1"
    scorer = pool("reward", source=source, timeout_seconds=1)
    assert [r.value for r in scorer.score([sample("")] * 6)] == [1.0] * 6


def test_time_limit_is_per_function(pool: Pool, sample: Sample) -> None:
    source = "import time\ndef slow(sample): time.sleep(0.4); return 1"
    scorer = pool("slow", "slow", "slow", "slow", source=source, timeout_seconds=1)
    [result] = scorer.score([sample("")])
    assert result.parts == dict.fromkeys(("slow", "slow#2", "slow#3", "slow#4"), 1.0)


def test_slow_import_is_not_counted_against_the_first_call(pool: Pool, sample: Sample) -> None:
    source = "import time; time.sleep(1)\ndef reward(sample): return 1"
    scorer = pool("reward", source=source, timeout_seconds=0.5)
    assert scorer.score([sample("")])[0].value == 1


def test_catastrophic_answer_is_stopped(pool: Pool, sample: Sample) -> None:
    scorer = pool("math_verify", timeout_seconds=1.5)
    samples = [
        sample(r"\boxed{\binom{100000000}{50000000}}"),
        sample(r"\boxed{7}"),
        sample(r"\boxed{8}"),
    ]
    bad, right, wrong = scorer.score(samples)
    assert bad.errors == {"math_verify": "took longer than 1.5 s"}
    assert bad.value is None
    assert (right.value, wrong.value) == (1.0, 0.0)


def test_many_answers_are_judged_off_the_main_thread_and_a_degenerate_one_costs_only_itself(
    pool: Pool, sample: Sample
) -> None:
    """As asynchronous rollouts have them judged: neither all wrong nor frozen."""
    repeated = r"\frac{1}{" * 3000
    answers = [sample(rf"\boxed{{{i % 2 + 6}}}", id=f"p{i}") for i in range(256)]
    answers[100:100] = [sample(repeated), sample(rf"\boxed{{{repeated}")]
    judge = pool("math_verify", workers=2, timeout_seconds=10)
    with ThreadPoolExecutor(1) as threads:
        results = threads.submit(judge.score, answers).result(120)
    verdicts = [result.value for result in results]
    assert verdicts[:100] + verdicts[102:] == [float(i % 2) for i in range(256)]
    assert set(verdicts[100:102]) <= {0.0, None}


def test_time_limit_of_the_function_itself_counts_like_the_pools(
    pool: Pool, sample: Sample
) -> None:
    limits = {"name": "math_verify", "params": {"timeout_seconds": 1}}
    scorer = pool(limits, timeout_seconds=30, on_error="stop", max_error_share=1)
    [result] = scorer.score([sample(rf"\boxed{{{'1+' * 20_000}1}}")])
    assert result.value is None
    assert "math-verify took longer than 1 s" in result.errors["math_verify"]


def test_printing_does_not_disturb_the_protocol(pool: Pool, sample: Sample) -> None:
    source = """
import os, subprocess, sys
print("at import")
def reward(sample):
    print('{"ready": true}')
    sys.__stdout__.write("more\\n" * 50_000)
    os.write(1, b"raw")
    subprocess.run(["echo", "from a child"])
    assert sys.stdin.read() == ""
    return 1
"""
    scorer = pool("reward", source=source, on_error="stop")
    assert [r.value for r in scorer.score([sample("")] * 4)] == [1.0] * 4


def test_weights_order_and_text_survive(pool: Pool, sample: Sample) -> None:
    source = """
def number(sample): return float(sample.response.split()[0])
def echo(sample, text): return sample.problem.metadata == {"text": text, "n": [1, None]}
"""
    text = 'line\nbreak \u2028 \ud800 \U0001f600 \\ "'
    functions = [
        {"name": "number", "weight": 0.5},
        {"name": "echo", "weight": -1, "params": {"text": text}},
    ]
    scorer = pool(*functions, source=source, workers=2, on_error="stop")
    metadata = {"text": text, "n": [1, None]}
    big = "x" * 300_000  # several pipe buffers
    samples = [
        sample(f"{i} {text} {big if i % 50 == 0 else ''}", metadata=metadata) for i in range(300)
    ]
    results = scorer.score(samples)
    assert [r.parts for r in results] == [{"number": i, "echo": 1.0} for i in range(300)]
    assert [r.value for r in results] == [0.5 * i - 1 for i in range(300)]
    assert scorer.labels == ["number", "echo"]
    assert scorer.score([]) == []


def test_on_error_stop_names_function_problem_and_reason(pool: Pool, sample: Sample) -> None:
    scorer = pool("reward", source=MISBEHAVING, on_error="stop")
    samples = [sample("fine"), sample("raise", id="train.jsonl:17"), sample("fine")]
    with pytest.raises(UserError) as caught:
        scorer.score(samples)
    message = str(caught.value)
    assert "user_rewards.py:reward' failed on problem 'train.jsonl:17'" in message
    assert "KeyError: 'missing thing'" in message
    assert 'raise KeyError("missing thing")' in message  # the traceback
    assert scorer.score([sample("fine")])[0].value == 1


def test_on_error_stop_goes_on_after_a_time_limit(pool: Pool, sample: Sample) -> None:
    scorer = pool("reward", source=MISBEHAVING, on_error="stop", timeout_seconds=0.5)
    results = scorer.score([sample("sleep"), sample("fine"), sample("fine")])
    assert [r.value for r in results] == [None, 1.0, 1.0]


def test_too_many_failures_stop_with_the_most_frequent_reason(pool: Pool, sample: Sample) -> None:
    scorer = pool("reward", source=MISBEHAVING, max_error_share=0.5)
    half = [sample("raise", id="r"), sample("nan", id="n"), sample("fine"), sample("fine")]
    assert [r.value for r in scorer.score(half)] == [None, None, 1, 1]
    with pytest.raises(UserError) as caught:
        scorer.score([sample("nan", id="n"), *half[:2], sample("fine")])
    message = str(caught.value)
    assert "3 of 4 reward calls have failed" in message
    assert "most frequent (2 times): reward: ValueError: returned nan" in message
    assert "problem 'n'" in message


def test_import_failure_in_the_worker_is_reported_with_its_place(pool: Pool) -> None:
    scorer = pool("reward", source="import absent_package\ndef reward(sample): return 1")
    with pytest.raises(UserError) as caught:
        scorer.wait_until_ready()
    assert "No module named 'absent_package'" in str(caught.value)
    assert "user_rewards.py, line 1: import absent_package" in str(caught.value)


def test_wrong_params_of_a_users_function_are_found_at_the_start(pool: Pool) -> None:
    scorer = pool({"name": "reward", "params": {"y": 1}}, source="def reward(sample, x): return x")
    with pytest.raises(UserError, match=r"missing a required argument: 'x'; it is reward\("):
        scorer.wait_until_ready()


def test_workers_that_never_start_end_the_attempts(pool: Pool, sample: Sample) -> None:
    source = "import os, sys\nprint('my last words', file=sys.stderr, flush=True)\nos._exit(9)"
    scorer = pool("reward", source=source + "\ndef reward(sample): return 1")
    with pytest.raises(UserError, match=r"(?s)3 reward workers in a row.*code 9.*my last words"):
        scorer.score([sample("")])


def test_start_has_its_own_limit(pool: Pool, sample: Sample) -> None:
    scorer = pool("reward", source="while True: pass\ndef reward(sample): return 1")
    scorer._start_seconds = 0.3
    with pytest.raises(UserError, match=r"took longer than 0\.3 s"):
        scorer.wait_until_ready()


def test_worker_that_died_between_calls_is_replaced_without_blame(
    pool: Pool, sample: Sample
) -> None:
    scorer = pool("reward", source="import os\ndef reward(sample): return os.getpid()")
    pids = {int(r.value) for r in scorer.score([sample("")] * 10)}
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.2)
    results = scorer.score([sample("")] * 10)
    assert not any(r.errors for r in results)
    assert not pids & {int(r.value) for r in results}


def test_what_a_worker_started_ends_with_it_however_it_ends(pool: Pool, sample: Sample) -> None:
    source = """
import os, subprocess, time
def reward(sample):
    if sample.response == "fine": return 1
    with open(sample.response, "w") as file:
        # Both out of its process group and session, and an orphan by the time it is looked for.
        file.write(subprocess.run(
            ["setsid", "sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo $!"],
            capture_output=True, text=True,
        ).stdout)
    if "exit" in sample.response: os._exit(1)
    if "hang" in sample.response: time.sleep(1e9)
    return 0
"""
    scorer = pool("reward", source=source, timeout_seconds=1, max_error_share=1)
    for ending in ("exit", "hang", "close"):
        path = Path(scorer._functions[0].name.rpartition(":")[0]).with_name(ending)
        scorer.score([sample(str(path)), sample("fine")])
        if ending == "close":
            assert _is_running(int(path.read_text()))
            scorer.close()
        assert not _is_running(int(path.read_text()))


def test_orphan_that_holds_the_pipe_open_does_not_hide_the_death(
    pool: Pool, sample: Sample
) -> None:
    scorer = pool("reward", source=MISBEHAVING, timeout_seconds=1, max_error_share=1)
    bad, fine = scorer.score([sample("orphan, _exit"), sample("fine")])
    assert list(bad.errors) == ["reward"]
    assert fine.value == 1


@pytest.mark.parametrize("busy", [False, True])
def test_workers_and_what_they_started_end_with_a_killed_trainer(
    tmp_path: Path, busy: bool
) -> None:
    (tmp_path / "reward.py").write_text(f"""
import os, subprocess, time
def reward(sample):
    left = subprocess.run(
        ["setsid", "sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo $!"],
        capture_output=True, text=True,
    ).stdout.strip()
    for pid in (left, os.getpid()):
        open({str(tmp_path / "pid")!r} + str(pid), "w").close()
    while {busy}: pass
    return 1
""")
    script = f"""
import os
from megatron_rlsd.config import RewardConfig
from megatron_rlsd.rewards import RewardPool
from megatron_rlsd.types import Problem, RewardInput
name = {str(tmp_path / "reward.py:reward")!r}
config = RewardConfig(functions=[dict(name=name)], workers=1, timeout_seconds=60)
problem = Problem("p", ({{"role": "user", "content": "?"}},), "1")
pool = RewardPool(config)
pool.score([RewardInput(problem, "", 1, 1, "stop")])
print("scored", flush=True)
input()
"""
    root = Path(__file__).resolve().parents[3]
    parent = subprocess.Popen(
        [sys.executable, "-c", script], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        found: list[Path] = []
        for _ in range(600):
            if len(found := list(tmp_path.glob("pid*"))) == 2:
                break
            time.sleep(0.05)
        pids = [int(path.name.removeprefix("pid")) for path in found]
        if not busy:
            assert parent.stdout is not None
            assert parent.stdout.readline() == b"scored\n"
        assert all(map(_is_running, pids))
    finally:
        parent.kill()
        parent.wait()
    for _ in range(100):
        if not any(map(_is_running, pids)):
            return
        time.sleep(0.05)
    pytest.fail("a process outlived the trainer")


def test_close_ends_the_workers(pool: Pool, sample: Sample) -> None:
    scorer = pool("reward", source="import os\ndef reward(sample): return os.getpid()")
    with scorer:
        pids = {int(r.value) for r in scorer.score([sample("")] * 10)}
    assert not any(_is_running(pid) for pid in pids)


def test_signals_that_ask_the_job_to_stop_cost_no_reward(pool: Pool, sample: Sample) -> None:
    """Slurm may send them to a job's whole process tree; the trainer then finishes its step."""
    source = """
import os, signal
def reward(sample):
    os.kill(os.getpid(), getattr(signal, sample.response))
    return os.getpid()
"""
    with pool("reward", source=source) as scorer:
        results = scorer.score([sample(s) for s in ("SIGTERM", "SIGUSR1", "SIGTERM")])
    assert len({result.value for result in results}) == 1
    assert not any(result.errors for result in results)


def test_metadata_that_is_no_json_names_the_problem(pool: Pool, sample: Sample) -> None:
    scorer = pool("exact_match")
    with pytest.raises(UserError, match=r"problem 'odd' .* plain JSON data: .*set"):
        scorer.score([sample("", id="odd", metadata={"a": {1}})])


def _is_running(pid: int) -> bool:
    """Whether the process is there and no zombie that only waits to be reaped."""
    with suppress(FileNotFoundError, ProcessLookupError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZX"
    return False


COUNTED = """
def counted(sample):
    with open("calls.txt", "a") as file:
        file.write(f"{sample.response}\\n")
    if sample.response == "fails":
        raise RuntimeError("not now")
    return len(sample.response)
"""


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_deterministic_judge_is_asked_once_for_each_response(
    pool: Pool, sample: Sample, tmp_path: Path, deterministic: bool
) -> None:
    entry = {"name": "counted", "deterministic": deterministic}
    scores = pool(entry, source=COUNTED, max_error_share=1.0)
    samples = [sample(response) for response in ("a", "bb", "a", "fails")]
    first, second = scores.score(samples), scores.score(samples)
    for results in (first, second):
        assert [result.value for result in results] == [1, 2, 1, None]
    assert scores.score([sample("a", id="other"), sample("a", num_tokens=3)])[0].value == 1
    calls = (tmp_path / "calls.txt").read_text().split()
    # What failed is asked again; another question, and another length, are another thing.
    expected = {"a": 3, "bb": 1, "fails": 2} if deterministic else {"a": 6, "bb": 2, "fails": 2}
    assert Counter(calls) == expected


def test_verdicts_that_were_not_used_for_long_are_forgotten(sample: Sample) -> None:
    asked: list[str] = []

    def score(samples: list[RewardInput]) -> list[RewardResult]:
        asked.extend(each.response for each in samples)
        return [RewardResult(1.0, {}, {}) for _ in samples]

    verdicts = Verdicts(most=2)
    for response in ("a", "b", "a", "c", "a", "b"):
        verdicts.of([sample(response)], score)
    assert asked == ["a", "b", "c", "b"]
