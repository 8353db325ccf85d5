"""The site has the guides alone: a link to another file of the repository becomes its path."""

from __future__ import annotations

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)+([^)#]*)[^)]*\)", _named, markdown)


def _named(link: re.Match[str]) -> str:
    text, path = link.groups()
    return f"{text} (`{path}`)" if path.rpartition("/")[2] not in text else text
