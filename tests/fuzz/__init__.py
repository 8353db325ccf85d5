"""Fuzz targets: a module each, which makes inputs from a seed and checks what must hold of any.

    python -m tests.fuzz NAME [--seconds 3600] [--seed 1] [--only NUMBER]

runs one by hand; ``test_fuzz.py`` gives each some seconds in CI, always with the same inputs in the
same order. A target has ``make(rng)``, which returns an input whose repr() tells it all, and
``check(input, folder)``, which raises where the input finds a fault; ``folder`` is empty and its
own. ``CPU_SECONDS``: what one input may cost. ``prepared()``: a context manager around all inputs.
"""
