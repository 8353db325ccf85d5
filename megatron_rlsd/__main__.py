"""``python -m megatron_rlsd`` is ``rlsd``, and ``torchrun -m megatron_rlsd`` makes ranks of it."""

import sys

from megatron_rlsd.commands import main

if __name__ == "__main__":
    sys.exit(main())
