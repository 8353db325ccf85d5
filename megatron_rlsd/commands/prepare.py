"""From a benchmark's published file to questions in our form; nothing is downloaded.

    rlsd prepare gsm8k test-00000-of-00001.parquet data/gsm8k.jsonl
    rlsd evaluate --model FOLDER --preset gsm8k --data data/gsm8k.jsonl

FILE is JSONL, CSV or parquet in the layout in which the benchmark is published (docs/evaluate.md).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_rlsd.runtime.errors import UserError, tell


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="rlsd prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("benchmark", metavar="BENCHMARK", help="gsm8k, aime24, ...")
    parser.add_argument("file", type=Path, metavar="FILE", help="as published")
    parser.add_argument("out", type=Path, metavar="OUT", help="the JSONL file to write")
    arguments = parser.parse_args(argv)
    try:
        prepare(arguments.benchmark, arguments.file, arguments.out)
    except UserError as error:
        return tell(error)
    return 0


def prepare(name: str, file: Path, out: Path) -> None:
    """Write ``out``; a set of another size than the published one is told of."""
    from megatron_rlsd.data.benchmarks import as_jsonl, benchmark, prepared
    from megatron_rlsd.runtime.durable import write_whole

    published = benchmark(name).problems
    records = prepared(name, file)
    write_whole(out, as_jsonl(records))
    print(f"{out}: {len(records)} problems of {name}")
    if len(records) != published:
        print(
            f"note: the published {name} has {published}; its numbers cannot be compared with this "
            "file's",
            file=sys.stderr,
        )
