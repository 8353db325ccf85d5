"""Values that are used and never shown: in files, reports, trackers and messages a mask stands."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import PlainSerializer, SecretStr

MASK = "**********"
REFERENCE = "env:"
"""``env:NAME`` stands for the value of a variable, and is itself no secret."""
_NAME = (
    r"api[_-]?key|access[_-]?key|private[_-]?key|secret(?:[_-]?key)?|password|passwd|passphrase|"
    r"credentials?|authorization|(?:hf|hub|api|auth|access|bearer|refresh|wandb)[_-]token"
)
_SECRET_NAME = re.compile(rf"(?i)(?:.*[_-])?(?:{_NAME})|token")
_ASSIGNED = re.compile(rf"(?i)((?:{_NAME})[\"']?\s*[:=]\s*)(?![\s\"']*{REFERENCE})[^\s,}}]+")
_URL_PASSWORD = re.compile(r"(?<=://)([^/\s:@]*):[^/\s@]+@")
_URL_KEY = re.compile(rf"(?i)(://\S*[?&](?:{_NAME}|token)=)[^&\s]+")


def is_secret(name: str) -> bool:
    """Is a value of this name, where anything may be named, taken for a secret?

    ``api_key``, ``HF_TOKEN`` and ``ssl_keyfile_password`` are; ``max_tokens`` and ``end_token`` are
    not.
    """
    return _SECRET_NAME.fullmatch(name) is not None


def masked(value: Any, name: str = "") -> Any:
    """Plain data as it may be shown: masks for secrets by name, and for passwords in URLs."""
    if isinstance(value, Mapping):
        return {key: masked(each, str(key)) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [masked(each, name) for each in value]
    if isinstance(value, str):
        if is_secret(name):
            return _shown_text(value)
        return _URL_KEY.sub(rf"\1{MASK}", _URL_PASSWORD.sub(rf"\1:{MASK}@", value))
    return MASK if is_secret(name) and isinstance(value, int | float) else value


def masked_text(text: str) -> str:
    """Text such as ``section.api_key=value`` or ``{api_key: value}``, as it may be shown."""
    key, separator, value = text.partition("=")
    if separator and is_secret(key.rpartition(".")[2]):
        return f"{key}={_shown_text(value)}"
    return str(masked(_ASSIGNED.sub(rf"\1{MASK}", text)))


def without(secret: str | None, text: str) -> str:
    """``text`` from elsewhere, which may repeat ``secret``."""
    return text.replace(secret, MASK) if secret else text


def key_of(configured: SecretStr | None, place: str) -> str | None:
    """What the api_key at ``place`` of the configuration stands for; None: there is none.

    Raises ValueError for a variable that is not set, and for a text that no HTTP header carries.
    """
    if configured is None:
        return None
    secret = configured.get_secret_value()
    if secret.startswith(REFERENCE):
        name = secret.removeprefix(REFERENCE)
        place = f"{place}={secret}"
        if not (secret := os.environ.get(name, "")):
            raise ValueError(f"{place}: {name} is not set")
    if secret == MASK:
        raise ValueError(f"{place} is only a mask; give the key again")
    if not (secret.isascii() and secret.isprintable() and secret == secret.strip()):
        raise ValueError(
            f"{place}: the key begins or ends with white space (a line's end?), or has characters "
            "other than printable ASCII"
        )
    return secret


def masks_in(value: Any, key: str = "") -> Iterator[str]:
    """The dotted keys of a configuration (plain data, or SecretStr) that hold only a mask."""
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if isinstance(value, str) and (value == MASK or f":{MASK}@" in value):
        yield key
    elif isinstance(value, Mapping | list | tuple):
        inner = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, each in inner:
            yield from masks_in(each, f"{key}.{name}" if key else str(name))


def without_login(url: str) -> str:
    """``url`` itself. ValueError where it holds a user name or a password: it is shown often."""
    if "@" in urlsplit(url).netloc:
        raise ValueError("an address holds no user name or password; servers are given api_key")
    return url


def _shown_text(value: str) -> str:
    return value if not value or value.startswith(REFERENCE) else MASK


def _shown(secret: SecretStr) -> str:
    return _shown_text(secret.get_secret_value())


def _shown_url(secret: SecretStr) -> str:
    return str(masked(secret.get_secret_value()))


Secret = Annotated[
    SecretStr, PlainSerializer(_shown, return_type=str, when_used="json-unless-none")
]
"""A text that is dumped as its ``env:NAME``, or as a mask."""
SecretUrl = Annotated[
    SecretStr, PlainSerializer(_shown_url, return_type=str, when_used="json-unless-none")
]
"""An address that is dumped without its password."""
Named = Annotated[dict[str, Any], PlainSerializer(masked, when_used="json")]
"""Values under names of the user's; those with a secret's name are dumped as masks."""
NamedTexts = Annotated[dict[str, str], PlainSerializer(masked, when_used="json")]
