"""Convert checkpoints between Hugging Face and Megatron, compare them, and look into them.

    rlsd convert to-megatron HF_DIR OUT [--tensor-parallel N ...]
    rlsd convert to-hf CHECKPOINT OUT [--dtype bfloat16]
    rlsd convert verify A B [--text FILE | --skip-log-probs]
    rlsd convert inspect PATH [--write-hashes FILE | --hashes FILE]

CHECKPOINT, A, B and PATH may be Megatron checkpoints of this project; A, B and PATH may also be
Hugging Face folders. --plugin FILE brings a model family of your own. See docs/convert.md. Exit
status: 0 done, 1 the checkpoints differ or are damaged, 2 bad input.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from megatron_rlsd.plugins import load_plugins
from megatron_rlsd.runtime.errors import UserError, tell
from megatron_rlsd.runtime.terminal_text import visible

DTYPES = ("float32", "bfloat16", "float16")
AGAIN = "a conversion goes on where it stopped if the same command is given again"
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    # Slow to import: --help does without.
    from megatron_rlsd.commands.conversions import convert

    try:
        load_plugins(args.plugin)
        return convert(args)
    except UserError as error:
        return tell(error)
    except OSError as error:
        print(f"error: {visible(str(error))}; {AGAIN}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; {AGAIN}", file=sys.stderr)
        return 130


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size; expected for example 5GB or 500MB"
        )
    return size


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlsd convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, dest="command")
    plugin_help = "a file that registers a model family (docs/extending.md); may be repeated"

    def command(name: str, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.add_argument("--plugin", action="append", default=[], help=plugin_help)
        return made

    pickle_help = "read pytorch_model*.bin where there are no safetensors, tensors only"
    overwrite_help = "replace a model or checkpoint in OUT; other files there stay"
    made = command("to-megatron", "Hugging Face folder -> Megatron checkpoint")
    made.add_argument("source", type=Path)
    made.add_argument("out", type=Path)
    for name in ("tensor", "pipeline", "expert"):
        made.add_argument(f"--{name}-parallel", type=_positive, default=1)
    made.add_argument("--expert-tensor-parallel", type=_positive, help="default: as for tensors")
    made.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    made.add_argument("--overwrite", action="store_true", help=overwrite_help)
    made.add_argument("--allow-pickle", action="store_true", help=pickle_help)

    made = command("to-hf", "Megatron checkpoint -> Hugging Face folder")
    made.add_argument("source", type=Path)
    made.add_argument("out", type=Path)
    made.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    made.add_argument("--max-shard-size", type=_size, default="5GB")
    made.add_argument("--overwrite", action="store_true", help=overwrite_help)

    made = command("verify", "compare two checkpoints: weights and log-probabilities")
    made.add_argument("a", type=Path)
    made.add_argument("b", type=Path)
    made.add_argument("--text", type=Path, help="default: a short passage")
    made.add_argument("--max-tokens", type=_positive, default=512)
    made.add_argument("--tolerance", type=float, default=0.0, help="of weights; default 0")
    made.add_argument("--log-prob-tolerance", type=float, default=1e-3)
    made.add_argument("--skip-log-probs", action="store_true")
    made.add_argument("--verbose", action="store_true", help="every tensor with its hash")
    made.add_argument("--allow-pickle", action="store_true", help=pickle_help)

    made = command("inspect", "say what a checkpoint holds and whether it is whole")
    made.add_argument("path", type=Path)
    made.add_argument("--tensors", action="store_true", help="list them")
    made.add_argument("--hashes", type=Path, help="compare the contents with this file")
    made.add_argument("--write-hashes", type=Path, help="write a file for --hashes")
    made.add_argument("--allow-pickle", action="store_true", help=pickle_help)
    return parser
