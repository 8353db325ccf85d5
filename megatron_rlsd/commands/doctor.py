"""Is everything in order for a run? Checks the machine, and what a configuration names.

    rlsd doctor [CONFIG.yaml] [--json] [--gpus N] [--deep] [key=value ...]

--deep also loads the weights, starts the rollout engine, and compares the log-probabilities of what
it samples with the trainer's; a layout of several processes is started with torchrun. Exit code 0:
nothing failed. 1: something did.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict

from megatron_rlsd.config import config_parser
from megatron_rlsd.diagnosis.check import Check
from megatron_rlsd.runtime.terminal_text import visible

MARKS = {"ok": "ok", "warning": "WARNING", "failed": "FAILED", "skipped": "skipped"}


def main(argv: list[str] | None = None) -> int:
    parser = config_parser(__doc__, "rlsd doctor", optional=True)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--gpus", type=int, help="processes of the trainer; default: WORLD_SIZE")
    parser.add_argument("--deep", action="store_true")
    args = parser.parse_intermixed_args(argv)
    if args.deep and args.config is None:
        parser.error("--deep needs a CONFIG")
    rank, world = int(os.environ.get("RANK", "0")), os.environ.get("WORLD_SIZE")
    known = args.gpus or (int(world) if world else None)
    if rank > 0 and not args.deep:
        return 0
    checks: Iterable[Check]
    try:
        # Imported late: --help does without, and where Megatron-Core fails the versions say why.
        from megatron_rlsd.diagnosis.doctor import Doctor
    except Exception as error:
        from megatron_rlsd.diagnosis.versions import version_checks

        checks = [*version_checks(), Check("program", "failed", f"cannot be imported: {error}")]
    else:
        doctor = Doctor(args.config, args.overrides, world_size=known, deep=args.deep)
        if rank > 0:
            return int(doctor.engine_check().status == "failed")
        checks = doctor.checks()
    found = list(show(checks, quiet=args.json))
    failed = [check.name for check in found if check.status == "failed"]
    if args.json:
        print(json.dumps({"failed": failed, "checks": [asdict(check) for check in found]}))
    else:
        print(f"\n{len(failed)} failed: {', '.join(failed)}" if failed else "\nnothing failed")
    return int(bool(failed))


def show(checks: Iterable[Check], *, quiet: bool) -> Iterator[Check]:
    """Print each check as it is done."""
    for check in checks:
        if not quiet:
            first, *more = visible(check.message).splitlines() or [""]
            print(f"{MARKS[check.status]:<8} {check.name:<28} {first}", flush=True)
            for line in more:
                print(f"{'':<37} {line}")
        yield check
