"""Run one recorded update again. The program is ``rlsd replay``; this file starts it."""

import sys

from megatron_rlsd.commands import run

if __name__ == "__main__":
    sys.exit(run("replay", sys.argv[1:]))
