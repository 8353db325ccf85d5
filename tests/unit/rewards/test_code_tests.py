"""Programs against tests: what counts as passed, and what a program cannot do to the machine.

The sandbox needs bubblewrap. Where it is not installed (CI's image lacks it) its cases are skipped
with that reason, and the same programs run without it (``unsafe``), under all limits but its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_rlsd.config import RewardConfig
from megatron_rlsd.rewards import RewardPool
from megatron_rlsd.rewards import code_tests as graders
from megatron_rlsd.rewards.sandbox import Sandbox, Unavailable, output_of
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import RewardInput
from tests.conftest import ROOT
from tests.unit.rewards.sandbox_attacks import (
    DAEMON,
    SECRET,
    check_attacks,
    check_forks,
    check_limits_of_a_process,
    limits,
)

Sample = Callable[..., RewardInput]


def missing_sandbox() -> str | None:
    try:
        Sandbox().check()
    except Unavailable as reason:
        return f"no sandbox on this machine: {reason}"
    return None


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    if reason := missing_sandbox():
        pytest.skip(reason)
    return Sandbox()


@pytest.fixture(scope="module", params=[False, True], ids=["bubblewrap", "unsafe"])
def unsafe(request: pytest.FixtureRequest) -> bool:
    if not request.param and (reason := missing_sandbox()):
        pytest.skip(reason)
    return request.param


def fenced(code: str) -> str:
    return f"Here you are:\n```python\n{code}\n```\nThat is all."


TWICE = [{"input": "3\n", "output": "6\n"}, {"input": "5", "output": "10"}]
BY_NAME = {"fn_name": "twice", "inputs": [[3], ["[4]"]], "outputs": [6, "[4, 4]"]}
ASSERTS = ["assert twice(2) == 4", "import math\nassert math.isclose(twice(0.5), 1)"]
GRADED: dict[str, tuple[str, Any, float, float]] = {
    # name: program, tests, all or nothing, share
    "right": ("print(int(input()) * 2)", TWICE, 1, 1),
    "one of two": ("print(int(input()) + 3)", TWICE, 0, 0.5),
    "right and then an error": ("print(int(input()) * 2); 1 / 0", TWICE, 0, 0),
    "right and then an exit code": ("print(int(input()) * 2); exit(3)", TWICE, 0, 0),
    "no program": ("print(", TWICE, 0, 0),
    "reads nothing": ("print(6)", TWICE, 0, 0.5),
    "a function": ("def twice(x): return x * 2", ASSERTS, 1, 1),
    "a function, one of two": ("def twice(x): return 4", ASSERTS, 0, 0.5),
    "no function": ("x = 1", ASSERTS, 0, 0),
    "ends before": ("import os; os._exit(0)", ASSERTS, 0, 0),
    "ends when asked": ("import os\ndef twice(x): os._exit(0)", ASSERTS, 0, 0),
    "equal to all": (
        "class Equal:\n"
        "    __eq__ = __ge__ = __le__ = lambda *_: True\n"
        "    __float__ = lambda s: 1.0\n"
        "def twice(x): return Equal()",
        ASSERTS,
        0,
        0,
    ),
    "a number that is equal to all": (
        "class Equal(int):\n    __eq__ = lambda *_: True\ndef twice(x): return Equal(7)",
        ASSERTS[:1],
        0,
        0,
    ),
    "patches what asserts": (
        "import builtins, math\n"
        "builtins.AssertionError = ZeroDivisionError\n"
        "math.isclose = lambda *_: True\n"
        "def twice(x): return None",
        ASSERTS,
        0,
        0,
    ),
    "looks for the tests": (
        "import gc, inspect, os, re, sys\n"
        "def twice(x):\n"
        "    seen = [str(f.frame.f_locals) + str(f.frame.f_globals) for f in inspect.stack()]\n"
        "    seen += [str(o)[:10000] for o in gc.get_objects() if type(o) in (list, dict)]\n"
        "    for pid in filter(str.isdigit, os.listdir('/proc')):\n"
        "        for name in ('cmdline', 'environ'):\n"
        "            try: seen.append(open(f'/proc/{pid}/{name}').read())\n"
        "            except OSError: pass\n"
        "    for number in range(100):\n"
        "        try: seen.append(os.pread(number, 10000, 0).decode())\n"
        "        except (OSError, UnicodeDecodeError): pass\n"
        "    found = re.search(r'twice\\(2\\) == (\\d+)', ' '.join(seen))\n"
        "    return int(found[1]) if found else x",
        # What it is handed it finds.
        ["assert twice(2) == 424242", "assert twice('twice(2) == 77') == 77"],
        0,
        0.5,
    ),
    "changes its argument": (
        "def order(x, d): x.sort(); d['n'] = len(x)",
        ["a, d = [3, 1], {}\norder(a, d)\nassert a == [1, 3] and d == {'n': 2}"],
        1,
        1,
    ),
    "a class": (
        "class Solution:\n"
        "    def __init__(self): self.seen = []\n"
        "    def add(self, x): self.seen.append(x); return self\n"
        "    def total(self): return sum(self.seen)",
        ["s = Solution()\nassert s.add(2).add(3).total() == 5\nassert s.seen == [2, 3]"],
        1,
        1,
    ),
    "an exception": (
        "def root(x):\n    if x < 0: raise ValueError('below 0')\n    return x ** 0.5",
        "try:\n    root(-1)\n    assert False\nexcept ValueError as e: assert str(e) == 'below 0'",
        1,
        1,
    ),
    "an exception of no assert": (
        "def twice(x): raise SystemExit(0)",
        ASSERTS,
        0,
        0,
    ),
    "all kinds of values": (
        "def same(x): return x\ndef pairs(x): return enumerate(x)",
        [
            "for x in (None, True, 10 ** 5000, -0.5, 'ä\\ud800', b'\\x00', (1, [2]), {1}, 2j,\n"
            "          {(1, 2): frozenset({3})}):\n    assert same(x) == x, x\n"
            "    assert type(same(x)) is type(x)\n"
            "assert same(float('nan')) != same(float('nan'))\n"
            "assert list(pairs('ab')) == [(0, 'a'), (1, 'b')]"
        ],
        1,
        1,
    ),
    "by name": ("def twice(x): return x * 2", BY_NAME, 0, 0.5),
}


@pytest.mark.process
@pytest.mark.parametrize("name", GRADED)
def test_programs_are_graded_by_their_tests(name: str, sample: Sample, unsafe: bool) -> None:
    code, tests, whole, share = GRADED[name]
    if name == "looks for the tests" and unsafe:
        pytest.skip("without a sandbox all processes of the user are in sight")
    about = sample(fenced(code), metadata={"tests": tests})
    assert graders.code_tests(about, partial=True, unsafe=unsafe) == share
    if whole != share:
        assert graders.code_tests(about, unsafe=unsafe) == whole


def test_the_last_block_of_python_is_the_program() -> None:
    other = "```text\n1\n```"
    assert graders.code_of(fenced("a = 1") + "\n```py\nb = 2\n```\n" + other).strip() == "b = 2"
    assert graders.code_of("```\nc = 3\n```").strip() == "c = 3"
    assert graders.code_of("a = 1") is None
    assert graders.code_of("```python\na = 1") is None  # cut off


def test_tests_come_in_the_forms_of_known_data_sets() -> None:
    pairs = [("1\n2", "3"), ("4", "5")]
    apps = {"inputs": ["1\n2", "4"], "outputs": [["3"], "5"]}
    for found in (apps, json.dumps(apps), [{"input": "1\n2", "output": "3"}, TWICE[0]]):
        assert graders.tests_of({"tests": found}, "tests")[0][0] == pairs[0]
    assert graders.tests_of({"t": "assert f(1)"}, "t") == ([], ["assert f(1)"])
    human = {"test": "def check(candidate):\n    assert candidate(1)", "entry_point": "f"}
    assert graders.tests_of(human, "test") == ([], [human["test"] + "\ncheck(f)"])
    wrongs: list[dict[str, Any]] = [{"tests": x} for x in ([], [1], [{"in": 1}], None)]
    for wrong in [{}, *wrongs]:
        with pytest.raises(ValueError, match="tests"):
            graders.tests_of(wrong, "tests")


def test_outputs_are_compared_by_lines() -> None:
    assert graders.same_output("1 \n2\n\n", "1\n2")
    assert not graders.same_output("1\n\n2", "1\n2")
    assert not graders.same_output("1 2", "1\n2")


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that every user may read, in a folder where every user may write.

    Not in pytest's own folder, which it closes to others again whenever a session starts.
    """
    monkeypatch.setenv("RLSD_SECRET", SECRET)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        path = Path(folder, "secret")
        path.write_text(SECRET)
        path.chmod(0o666)
        yield path
        assert path.read_text() == SECRET


@pytest.mark.process
def test_attacks_meet_nothing(sandbox: Sandbox, secret: Path) -> None:
    check_attacks(sandbox, secret)


AS_A_USER = """
import os, sys
from pathlib import Path
from megatron_rlsd.rewards.sandbox import Sandbox
from tests.unit.rewards import sandbox_attacks as here
os.setgroups([]); os.setgid(61000); os.setuid(61000)
assert os.geteuid() == 61000
here.check_attacks(Sandbox(), Path(sys.argv[1]))
here.check_forks(Sandbox())
"""


@pytest.mark.process
@pytest.mark.skipif(os.geteuid() != 0, reason="the tests run as a user already")
def test_attacks_meet_nothing_where_the_trainer_is_no_root(sandbox: Sandbox, secret: Path) -> None:
    command = [sys.executable, "-c", AS_A_USER, str(secret)]
    subprocess.run(command, check=True, timeout=300, cwd=ROOT)


@pytest.mark.process
def test_limits_hold_and_nothing_is_left_behind(sandbox: Sandbox) -> None:
    check_forks(sandbox)
    check_limits_of_a_process(sandbox)
    before = set(psutil.pids())
    assert output_of(sandbox, DAEMON, b"", limits(), 60) == b"left one behind\n"
    left = set(psutil.pids()) - before
    assert not [p for p in left if "sleep(600)" in " ".join(_words(p))]


def _words(pid: int) -> list[str]:
    try:
        return psutil.Process(pid).cmdline()
    except psutil.Error:
        return []


@pytest.mark.process
def test_limits_of_a_process_hold_without_a_sandbox() -> None:
    check_limits_of_a_process(Sandbox(unsafe=True))


@pytest.mark.process
def test_without_bubblewrap_it_is_refused_with_the_reason(
    sample: Sample, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    graders._sandbox.cache_clear()  # what was found to work is not tried again
    monkeypatch.setenv("PATH", str(tmp_path))
    functions: list[dict[str, Any]] = [{"name": "code_tests"}]
    with pytest.raises(UserError, match=r"bubblewrap is not installed.*\{unsafe: true\}"):
        RewardPool(RewardConfig.model_validate({"functions": functions}))
    for wrong in ({"memory_mb": 1}, {"time_limit_seconds": 0}, {"tests": ""}):
        functions[0]["params"] = {"unsafe": True, **wrong}
        with pytest.raises(UserError, match="code_tests"):
            RewardPool(RewardConfig.model_validate({"functions": functions}))
    functions[0]["params"] = {"unsafe": True, "python": str(tmp_path / "python")}
    with pytest.raises(UserError, match="no Python that"):
        RewardPool(RewardConfig.model_validate({"functions": functions}))


@pytest.mark.process
def test_a_pool_scores_programs_and_leaves_out_what_has_no_tests(
    sample: Sample, unsafe: bool
) -> None:
    params = {"unsafe": unsafe, "partial": True, "tests": "cases"}
    functions = [{"name": "code_tests", "params": params}]
    raw = {"functions": functions, "timeout_seconds": 60, "max_error_share": 1}
    right, half = fenced("print(int(input()) * 2)"), fenced("print(6)")
    samples = [sample(text, metadata={"cases": TWICE}) for text in (right, half, "none")]
    with RewardPool(RewardConfig.model_validate(raw)) as pool:
        results = pool.score([*samples, sample(right)])
    assert [r.value for r in results] == [1, 0.5, 0, None]
    assert "metadata has no tests under 'cases'" in results[3].errors["code_tests"]
