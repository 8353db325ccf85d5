# ruff: noqa: F821
# Added by benchmarks/gpu_sglang.sh: kernels that were built before come from a folder, whatever
# compilers this machine has. Anything else is built here as ever, and said so.
_build_or_find = load_jit


def load_jit(*args, **options):
    import hashlib
    import sys
    import time

    folder = pathlib.Path(os.environ.get("SGLANG_PREBUILT_KERNELS", "/nonexistent"))
    wanted = repr((args, sorted(options.items())))
    library = folder / f"{args[0]}-{hashlib.sha256(wanted.encode()).hexdigest()[:16]}.so"
    if library.is_file():
        return _load(library)
    started = time.monotonic()
    _copies.append(library if "SGLANG_RECORD_KERNELS" in os.environ else None)
    module = _build_or_find(*args, **options)
    print(
        f"built kernel {wanted} in {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True
    )
    return module


_copies = []
_load_library = _load


def _load(library):
    if _copies and _copies[-1] is not None:
        # Before the build's folder goes.
        shutil.copy(library, _copies.pop())
    return _load_library(library)
