"""A small random model with a tokenizer of its own. The program is ``rlsd tiny-model``."""

import sys

from megatron_rlsd.commands import run

if __name__ == "__main__":
    sys.exit(run("tiny-model", sys.argv[1:]))
