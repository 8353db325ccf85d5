from __future__ import annotations

import argparse
import sys

from tests.fuzz.driver import fuzz
from tests.fuzz.targets import TARGETS

parser = argparse.ArgumentParser(description="Run a fuzz target by hand.")
parser.add_argument("name", choices=sorted(TARGETS))
parser.add_argument("--seconds", type=float, default=3600)
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--only", type=int, metavar="NUMBER", help="check this input alone")
arguments = parser.parse_args()

outcome = fuzz(
    arguments.name,
    TARGETS[arguments.name],
    seconds=arguments.seconds,
    seed=arguments.seed,
    only=arguments.only,
)
for finding in outcome.findings:
    print(f"--seed {arguments.seed} --only {finding.number}: {finding.shown}\n{finding.trouble}\n")
print(
    f"{arguments.name}: {outcome.inputs} inputs in {outcome.seconds:.0f} s, "
    f"{len(outcome.findings)} findings, the most expensive input {outcome.slowest:.2f} s of CPU"
)
sys.exit(bool(outcome.findings))
