"""The commands that README and docs show, and those of them that no test runs as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OURS = ("rlsd", "tool", "module")
"""Kinds of commands whose parsers are this repository's."""
FIRST_WORDS = (
    *("sbatch", "srun", "scancel", "git", "docker", "pre-commit", "pip", "source", "bash"),
    *("pytest", "TINY=1"),
)
"""Of commands that are not ours."""
TOOLS = {
    "convert_hf_checkpoint.py": "convert",
    "doctor.py": "doctor",
    "inspect_samples.py": "inspect",
    "make_tiny_model.py": "tiny-model",
    "plan_run.py": "plan",
    "prepare_benchmark.py": "prepare",
    "replay_step.py": "replay",
    "report.py": "report",
}
PROGRAMS = {"train": "train", "sft": "sft", "serve": "serve", "rollout_only": "rollout"}
NOT_RUN = {
    r"make (demo|check|test|test-sglang|test-slurm|sglang-cpu)": "the set-up and the tests "
    "themselves, which CI runs; tests/test_wheel.py runs the demo's three parts, cut short",
    r"make (test-vllm|te-cpu)": "gigabytes of packages that CI does without",
    r"rlsd demo": "10 minutes: tests/test_wheel.py runs it with few steps",
    r"rlsd report runs/demo/rlsd": "tests/test_wheel.py runs it, on what rlsd demo has left",
    r"(.*)bash examples/run_rlsd_tiny\.sh": "rlsd demo under another name",
    r"rlsd train CONFIG\.yaml --nproc 4 .*": "four ranks: two are started in this way by "
    "tests/distributed/test_launched_signals.py, and tests/distributed/test_train_layouts.py "
    "trains in such layouts",
    r"python tools/fetch_smollm2\.py .*": "a download; tests/unit/tools/test_fetch_smollm2.py",
    r"rlsd evaluate --model Qwen3-8B .*": "needs the model: tests/test_evaluate.py has the options",
    r"torchrun .* -m megatron_rlsd\.train examples/configs/algorithms/NAME\.yaml": "needs the "
    "demo's model: tests/test_algorithms.py takes a step of each",
    r"torchrun .* -m megatron_rlsd\.train examples/extensions/tiny\.yaml": "needs the demo's "
    "model: tests/test_extending.py trains with its parts",
    r"python -m megatron_rlsd\.serve CONFIG": "needs SGLang: tests/sglang starts servers",
    r"python -m megatron_rlsd\.diagnosis\.preflight .*": "asked by the job script, which "
    "tests/slurm submits; tests/unit/diagnosis/test_preflight.py",
    r"python -m examples\.experiments\.scripted_play .*": "plays thousands of games: "
    "tests/unit/data/test_conversations.py plays some",
    r"python -m examples\.experiments\.(claims|several_turns) .*": "hours of training: "
    "tests/experiments",
    r"python tools/convert_hf_checkpoint\.py .* --plugin .*/model_family/phi3\.py": "needs "
    "such a model: tests/test_extending.py loads one by this file",
    r"python -m benchmarks\..*": "measures for minutes or hours; its numbers stand on the page",
    r"rlsd reward-server .*": "serves until it is told to end: "
    "tests/unit/rewards/test_reward_server.py",
    r"rlsd prepare .*": "needs a published file: tests/unit/data/test_benchmarks.py has the forms",
    r"python -m tests\.fuzz .*": "an hour: tests/fuzz runs each target for seconds",
    r"python -m tests\.test_golden_run": "writes committed figures anew: tests/test_golden_run.py",
    r"(\.venv/bin/python -m )?pytest .*": "is these tests",
    r"python -m venv \.venv|source .*|pre-commit install": "changes the checkout or the shell",
    r"(\.venv/bin/)?pip install.*": "minutes and gigabytes: CI's own set-up is made so",
    r"git clone .*": "needs the repository's address",
    r"docker .*": "needs a container engine: tests/unit/test_container.py reads the Dockerfile",
    r"(\S+=\S* +)*(sbatch|srun|scancel).*|bash examples/run_rlsd_70b\.sh": "needs Slurm: "
    "tests/slurm submits and cancels jobs; tests/unit/test_zero_to_70b.py reads the options",
}
"""Commands by the whole of their text -> why they are not run, or what runs them.

All others are run by tests/test_documented_commands_run.py.
"""


def shown() -> list[tuple[str, str]]:
    """(page, command) of every fenced block and every inline code that begins like a command."""
    found = []
    for page in PAGES:
        text = page.read_text()
        lines = [
            line.removeprefix("$ ")
            for language, block in re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, re.M | re.S)
            if language in ("", "bash")
            for line in _commands_of(block)
        ]
        lines += [
            code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", without_blocks(text))
        ]
        for line in lines:
            for part in line.split(" && "):
                if kind(part) and not _is_name(part.strip()):
                    found.append((page.name, part.strip()))
    return list(dict.fromkeys(found))


def without_blocks(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)


def _commands_of(block: str) -> list[str]:
    joined = block.replace("\\\n", " ").splitlines()
    return [re.sub(r"\s#.*", "", line).strip() for line in joined]


def kind(command: str) -> str | None:
    """rlsd, tool, module, make or elsewhere; None: it is no command."""
    words = command.split()
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if len(words) < 2:
        return None
    first = words[0].removeprefix(".venv/bin/")
    if first == "rlsd":
        return "rlsd"
    if first in ("python", "torchrun"):
        return "module" if "-m" in words else "tool" if words[1].startswith("tools/") else None
    if first.startswith("tools/") and first.endswith(".py"):
        return "tool"
    if first == "make":
        return "make"
    return "elsewhere" if first in FIRST_WORDS else None


def _is_name(command: str) -> bool:
    """A program's name in a sentence, which cannot run without arguments."""
    words = program_words(command) if kind(command) in OURS else None
    whole = ("demo", "settings", "--version", "--help")
    return words is not None and len(words) == 1 and words[0] not in whole


def words_of(command: str) -> list[str]:
    """Without the marks of a usage line, and with values for what is only a number's name."""
    plain = re.sub(r"\[NAME=\]| \[RUN \.\.\.\]", "", command)
    plain = re.sub(r"[\[\]](?![^ ]*=\[|.*\{)", "", plain) if " [" in plain else plain
    usage = ("key=value", "...") if plain != command else ()
    values = {"N": "1", "X": "0", "KEY": "train.steps"}
    return [values.get(word, word) for word in shlex.split(plain) if word not in usage]


def program_words(command: str) -> list[str] | None:
    """What would stand behind ``rlsd``; None: it is another module or tool."""
    words = words_of(command)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    words[0] = words[0].removeprefix(".venv/bin/")
    if words[0] == "rlsd":
        return words[1:]
    if "-m" in words:
        module, *rest = words[words.index("-m") + 1 :]
        name = module.removeprefix("megatron_rlsd.")
        return [PROGRAMS[name], *rest] if name in PROGRAMS else None
    tool, *rest = words[words.index("python") + 1 :] if words[0] == "python" else words
    name = Path(tool).name
    return [TOOLS[name], *rest] if name in TOOLS else None


def reason(command: str) -> str | None:
    """Why the command is not run as it stands; None: it is run."""
    found = [why for pattern, why in NOT_RUN.items() if re.fullmatch(pattern, command)]
    assert len(found) < 2, f"{command}: {found}"
    return found[0] if found else None


SHOWN = shown()
RUN = list(dict.fromkeys(command for _, command in SHOWN if reason(command) is None))
