"""What runs inside of the sandbox, with nothing but the standard library.

    python -I -S -c THIS program LIMITS READY CODE    the program, as __main__
    python -I -S -c THIS calls LIMITS READY CODE      answers calls of its functions
    python -I -S -c THIS asserts LIMITS READY CODE    runs asserts, and asks for calls

READY and CODE are descriptors: of a pipe that is told that the limits hold, and of the source.
``asserts`` never runs in the process that has the program: what tests expect is not where the
program could look, and plain data is all that crosses over, so that no object of the program's can
compare itself equal to anything.
"""

from __future__ import annotations

import builtins
import json
import os
import resource
import sys

TYPE_CHECKING = False  # typing takes longer to import than everything here together
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Ask = Callable[[int | None, str, Any, Any], dict[str, Any]]

PLAIN = (bool, int, float, str, type(None))
MAX_ITEMS = 1_000_000
"""Items of an iterator that a program returns, at most."""


def limit(limits: dict[str, int]) -> None:
    """Hard limits of this process and what comes of it."""
    for name, value in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        resource.setrlimit(number, (value, value))


def source(descriptor: int) -> str:
    with os.fdopen(descriptor, "rb") as file:
        return file.read().decode("utf-8", "surrogatepass")


def program(code: str) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    sys.argv = ["solution.py"]
    names = {"__name__": "__main__", "__builtins__": builtins}
    exec(compile(code, "solution.py", "exec"), names)


class Unsendable(Exception):
    pass


def encoded(value: Any, keep: Callable[[Any], int] | None = None) -> Any:
    """Plain data as JSON, containers tagged; ``keep`` makes a number of anything else."""
    if type(value) in PLAIN:
        return value
    for kind, tag in ((list, "l"), (tuple, "t"), (set, "s"), (frozenset, "f")):
        if isinstance(value, kind):
            return [tag, [encoded(each, keep) for each in value]]
    if isinstance(value, dict):
        return ["d", [[encoded(k, keep), encoded(v, keep)] for k, v in value.items()]]
    if isinstance(value, (bytes, bytearray)):
        return ["b", value.decode("latin-1")]
    if isinstance(value, complex):
        return ["c", [value.real, value.imag]]
    for plain in (bool, int, float, str):
        if isinstance(value, plain):
            return plain(value)
    if isinstance(value, Remote):
        return ["o", value._number]
    if keep is None:
        raise Unsendable(f"a {type(value).__name__} cannot be handed to the program")
    if hasattr(value, "tolist"):
        return encoded(value.tolist(), keep)
    if hasattr(value, "__next__") or isinstance(value, (range, type({}.keys()), type({}.values()))):
        items = []
        for item in value:
            items.append(item)
            if len(items) > MAX_ITEMS:
                raise Unsendable("an iterator without an end")
        return encoded(items, keep)
    return ["o", keep(value)]


def decoded(data: Any, find: Callable[[int], Any]) -> Any:
    if not isinstance(data, list):
        return data
    tag, inner = data
    if tag in ("l", "t", "s", "f"):
        kind = {"l": list, "t": tuple, "s": set, "f": frozenset}[tag]
        return kind(decoded(each, find) for each in inner)
    if tag == "d":
        return {decoded(k, find): decoded(v, find) for k, v in inner}
    if tag == "b":
        return inner.encode("latin-1")
    if tag == "c":
        return complex(*inner)
    if tag == "o":
        return find(inner)
    raise ValueError("not a value")


def calls(code: str) -> None:
    """Answers {"of", "name", "args", "kwargs"}, one a line, on a descriptor of its own."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    names: dict[str, Any] = {"__name__": "solution", "__builtins__": builtins}
    failed: BaseException | None = None
    try:
        exec(compile(code, "solution.py", "exec"), names)
    except BaseException as error:
        failed = error
    kept: list[Any] = []

    def keep(value: Any) -> int:
        kept.append(value)
        return len(kept) - 1

    for line in requests:
        asked = json.loads(line)
        answer: dict[str, Any]
        try:
            if failed is not None:
                raise failed
            of = asked["of"]
            target = names[asked["name"]] if of is None else getattr(kept[of], asked["name"])
            if asked["args"] is None:
                value = keep(target) if callable(target) else None
                answer = {"callable": callable(target)}
                answer["value"] = ["o", value] if callable(target) else encoded(target, keep)
            else:
                args = decoded(asked["args"], kept.__getitem__)
                kwargs = decoded(asked["kwargs"], kept.__getitem__)
                value = encoded(target(*args, **kwargs), keep)
                answer = {"value": value, "args": encoded(args, keep)}
        except BaseException as error:
            answer = {"error": type(error).__name__, "text": str(error)[:200]}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


class Remote:
    """An object of the program's, or a name in it; equal to nothing but itself."""

    def __init__(self, ask: Ask, of: int | None, name: str, number: int | None = None) -> None:
        self._ask, self._of, self._name, self._number = ask, of, name, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        answer = self._ask(self._of, self._name, args, kwargs)
        for mine, theirs in zip(args, decoded(answer["args"], self._found), strict=False):
            # What the program did to its arguments.
            if isinstance(mine, list) and type(theirs) is list:
                mine[:] = theirs
            elif isinstance(mine, (dict, set)) and type(theirs) is type(mine):
                mine.clear()
                mine.update(theirs)
        return decoded(answer["value"], self._found)

    def _found(self, number: int) -> Remote:
        return Remote(self._ask, number, "__call__", number)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or self._number is None:
            raise AttributeError(name)
        answer = self._ask(self._number, name, None, None)
        if answer["callable"]:
            return Remote(self._ask, self._number, name)
        return decoded(answer["value"], self._found)


class Names(dict):  # type: ignore[type-arg]
    """What tests do not define themselves is the program's."""

    def __init__(self, ask: Ask) -> None:
        super().__init__(__name__="tests", __builtins__=builtins)
        self._ask = ask

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name):
            return getattr(builtins, name)
        return Remote(self._ask, None, name)


def asserts(code: str) -> None:
    """Runs a JSON list of tests; tells {"passed": true or false} of each, and asks for calls."""
    answers, requests = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)

    def tell(message: dict[str, Any]) -> None:
        requests.write(json.dumps(message).encode() + b"\n")
        requests.flush()

    def ask(of: int | None, name: str, args: Any, kwargs: Any) -> dict[str, Any]:
        whole = args is not None
        tell(
            {
                "of": of,
                "name": name,
                "args": encoded(list(args)) if whole else None,
                "kwargs": encoded(kwargs) if whole else None,
            }
        )
        answer = json.loads(answers.readline())
        if "error" in answer:
            kind: Any = getattr(builtins, str(answer["error"]), None)
            known = isinstance(kind, type) and issubclass(kind, Exception)
            # An assert of the program's own is not one of the tests'.
            raised: Any = kind if known else RuntimeError
            raise raised(str(answer.get("text")))
        return answer

    names = Names(ask)
    for test in json.loads(code):
        try:
            exec(compile(test, "tests.py", "exec"), names)
            passed = True
        except BaseException:
            passed = False
        tell({"passed": passed})


if __name__ == "__main__":
    mode, limits, ready, code = sys.argv[1:]
    limit(json.loads(limits))
    sys.set_int_max_str_digits(0)
    sys.setrecursionlimit(10_000)
    text = source(int(code))
    os.write(int(ready), b"r")
    os.close(int(ready))
    run: Callable[[str], None] = {"program": program, "calls": calls, "asserts": asserts}[mode]
    run(text)
