"""The sets of held-out problems, each under a name that says which one it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron_rlsd.config import FileSource, ReasoningGymSource, Source
from megatron_rlsd.data.sources import evaluation_problems
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Problem

SAY_LITTLE = {"data", "dev", "eval", "test", "train", "val", "valid", "validation"}
"""Names of files that need their folder's name to tell what is in them."""


def evaluation_sets(sources: Sequence[Source], n: int | None) -> dict[str, list[Problem]]:
    """Name -> at most ``n`` problems of each source (None: all); see ``set_names``.

    Raises UserError as ``evaluation_problems`` and ``set_names`` do.
    """
    names = set_names(sources)
    return {
        name: evaluation_problems(source, n) for name, source in zip(names, sources, strict=True)
    }


def set_names(sources: Sequence[Source]) -> list[str]:
    """A name of its own for each source.

    A source's ``name`` as it is; UserError where two have the same. Else the task, or the file
    without its ending, with as many folders before it as tell files apart (``gsm8k-test``), one at
    least where the file's own name says little. What is still alike is numbered from the second on.
    """
    given = [source.name for source in sources if source.name is not None]
    if twice := [name for name, count in Counter(given).items() if count > 1]:
        raise UserError(f"two evaluation sources have the name {twice[0]!r}")
    whole = [_base(source, None) for source in sources]
    depths = [1 + (_base(source, 1) in SAY_LITTLE) for source in sources]
    while True:
        names = [_base(source, depth) for source, depth in zip(sources, depths, strict=True)]
        deeper = [
            depth
            + any(n == name and w != mine for n, w in zip(names, whole, strict=True))
            * (name != mine)
            for name, mine, depth in zip(names, whole, depths, strict=True)
        ]
        if deeper == depths:
            break
        depths = deeper
    taken: set[str] = set()
    unique = []
    for name in names:
        number, each = 1, name
        while each in taken or (each != name and each in names):
            number += 1
            each = f"{name}.{number}"
        taken.add(each)
        unique.append(each)
    return unique


def _base(source: Source, depth: int | None) -> str:
    """The source's own name, of a file with its last ``depth`` - 1 folders (None: all)."""
    if source.name is not None:
        return source.name
    if isinstance(source, ReasoningGymSource):
        return source.task
    if not isinstance(source, FileSource):
        return source.kind
    path = Path(source.path).absolute()
    parts = [part for part in path.with_suffix("").parts if part != path.anchor]
    shown = parts if depth is None else parts[-depth:]
    return "-".join("_".join(part.split()) for part in shown).replace("=", "_")
