"""The one command line, ``rlsd``: a table of commands, each a module of its own.

A command's module has ``main(argv) -> exit code``, where ``argv`` is what stands behind the
command's name. It imports torch and whatever imports torch only inside ``main``, after the command
line is read, so that ``--help`` answers at once.
"""

from __future__ import annotations

import difflib
import importlib
import os
import select
import sys
from dataclasses import dataclass

from megatron_rlsd import __version__
from megatron_rlsd.runtime.errors import UserError, tell
from megatron_rlsd.runtime.missing import explained
from megatron_rlsd.runtime.one_voice import LAUNCHED

EXIT_INTERRUPTED = 130
EXIT_NO_READER = 141
STANDARD_OUTPUT = 1


@dataclass(frozen=True)
class Command:
    """One line of the table."""

    module: str
    help: str
    """One line for ``rlsd --help``."""


COMMANDS = {
    "demo": Command("demo", "build a small model, warm-start it and train it with RLSD, on CPUs"),
    "train": Command("train", "RLSD and its relatives on the questions and rewards of a CONFIG"),
    "sft": Command("sft", "supervised warm start with the same CONFIG"),
    "serve": Command("serve", "this node's SGLang servers, for a trainer that runs elsewhere"),
    "reward-server": Command(
        "reward_server", "the reward functions of a CONFIG over HTTP, for trainers elsewhere"
    ),
    "rollout": Command("rollout", "sample and score responses without training"),
    "evaluate": Command("evaluate", "pass@k, avg@k and maj@k of a model on held-out problems"),
    "prepare": Command("prepare", "a benchmark's published file as questions in our form"),
    "plan": Command("plan", "does a CONFIG fit, how long does a step take, which layout is best"),
    "doctor": Command("doctor", "is everything in order for a run"),
    "convert": Command("convert", "Hugging Face folders to Megatron checkpoints and back"),
    "report": Command("report", "one HTML file about one or several runs"),
    "watch": Command("watch", "follow a run from another shell: phase, reward, speed, time left"),
    "inspect": Command("inspect", "a run's responses in the terminal, coloured by credit"),
    "replay": Command("replay", "make one recorded update again and compare"),
    "tiny-model": Command("tiny_model", "a small random model with a tokenizer of its own"),
    "settings": Command("settings", "what every key of a CONFIG means; a JSON schema for editors"),
}


def main(argv: list[str] | None = None) -> int:
    """``rlsd COMMAND ...``; the exit code."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"megatron_rlsd {__version__}")
        return 0
    if words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        return tell(
            UserError(f"rlsd has no command {words[0]!r}{meant}; it has {', '.join(COMMANDS)}")
        )
    return run(words[0], words[1:])


def run(name: str, argv: list[str]) -> int:
    """One command with its own arguments; also what the files in tools/ start."""
    try:
        module = importlib.import_module(f"megatron_rlsd.commands.{COMMANDS[name].module}")
        code = int(module.main(argv))
        sys.stdout.flush()
        return code
    except UserError as error:  # of an import: Megatron-Core is missing or not supported
        return tell(error)
    except ImportError as error:
        return tell(explained(error))
    except BrokenPipeError:
        return _reader_left()
    except KeyboardInterrupt:
        if LAUNCHED not in os.environ:  # else the launcher says so, once
            print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _reader_left() -> int:
    """The exit code where whoever read standard output has ended, as in ``rlsd plan ... | head``.

    Raises the error at hand again where another pipe is the broken one.
    """
    output = select.poll()
    output.register(STANDARD_OUTPUT, 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        raise
    # Python would flush, and complain, once more at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), STANDARD_OUTPUT)
    return EXIT_NO_READER


def overview() -> str:
    """What ``rlsd --help`` prints."""
    lines = [
        "usage: rlsd COMMAND ... | rlsd COMMAND --help | rlsd --version",
        "",
        "Post-training of language models with RLSD (arXiv:2604.03128) on Megatron-Core.",
        "",
    ]
    width = max(map(len, COMMANDS))
    lines += [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(lines)
