"""One HTML file about one or several runs. The program is ``rlsd report``; this file starts it."""

import sys

from megatron_rlsd.commands import run

if __name__ == "__main__":
    sys.exit(run("report", sys.argv[1:]))
