"""Start an SGLang server whose secret flags are in a variable (hidden_flags.py).

    PYTHON_OF_SGLANG launch.py --model-path DIR ... (arguments of sglang.launch_server)

Run by path in SGLang's own environment. Its worker processes are spawned and import this file
again, which does nothing there.
"""

from __future__ import annotations

import runpy

import hidden_flags

if __name__ == "__main__":
    hidden_flags.take()
    runpy.run_module("sglang.launch_server", run_name="__main__")
