"""What every key of a configuration means, its default and what else it may be.

    rlsd settings [KEY ...]
    rlsd settings --schema > rlsd.schema.json

KEY is a key or the beginning of one, such as teacher or algorithm.lambda. With --schema: the same
as a JSON schema. An editor that knows YAML schemas completes and checks a file that begins with

    # yaml-language-server: $schema=rlsd.schema.json
"""

from __future__ import annotations

import argparse
import difflib
import json
import textwrap

from megatron_rlsd.config.listing import json_schema, sections, settings
from megatron_rlsd.runtime.errors import UserError, tell

WIDTH = 100


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="rlsd settings",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("keys", nargs="*", metavar="KEY")
    parser.add_argument("--schema", action="store_true", help="JSON schema of the whole file")
    arguments = parser.parse_args(argv)
    if arguments.schema:
        print(json.dumps(json_schema(), indent=1))
        return 0
    listed = list(settings())
    texts = dict(sections())
    for wanted in arguments.keys:
        if not any(each.key.startswith(wanted) for each in listed):
            near = difflib.get_close_matches(wanted, [each.key for each in listed], n=3)
            meant = f"; similar: {', '.join(near)}" if near else ""
            return tell(UserError(f"no key begins with {wanted!r}{meant}"))
    section = ""
    for each in listed:
        if arguments.keys and not each.key.startswith(tuple(arguments.keys)):
            continue
        if (above := each.key.rpartition(".")[0]) != section:
            section = above
            if texts.get(section):
                print(f"\n{section}: {' '.join(texts[section].split())}\n")
        print(f"{each.key} = {each.default}   ({each.kind})")
        if each.text:
            print(textwrap.indent(textwrap.fill(" ".join(each.text.split()), WIDTH - 4), "    "))
    return 0
