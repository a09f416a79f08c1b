"""Keeps secrets out of everything that is stored or sent."""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "<redacted>"
_SECRET_KEY = re.compile(r"password|passwd|secret|api_?key|credential", re.IGNORECASE)
_TOKEN_KEY = re.compile(r"token(?!iz)", re.IGNORECASE)
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def redacted(node: Any) -> Any:
    """A configuration tree with secrets replaced.

    Secret is what stands under a key that contains `password`, `secret`, `api_key` or `credential`, and any
    *text* under a key that contains `token`: `hf_token` is one, `max_tokens: 77` and `tokenizer` are none.
    The login of a URL (`https://user:password@host`) is replaced too.
    """
    match node:
        case Mapping():
            return {key: _value(str(key), value) for key, value in node.items()}
        case list() | tuple():
            return [redacted(item) for item in node]
        case str():
            return _URL_LOGIN.sub(HIDDEN, node)
    return node


def without_secret(override: str) -> str:
    """A command's `key=value` with the value replaced if it is a secret."""
    key, equals, value = override.partition("=")
    return f"{key}{equals}{redacted({key: value})[key]}"


def _value(key: str, value: Any) -> Any:
    if value is None or value == "":
        return value  # nothing was given; hiding that would hide a mistake
    if _SECRET_KEY.search(key) or (_TOKEN_KEY.search(key) and _holds_text(value)):
        return HIDDEN
    return redacted(value)


def _holds_text(value: Any) -> bool:
    match value:
        case str():
            return True
        case list() | tuple():
            return any(_holds_text(item) for item in value)
        case Mapping():
            return any(_holds_text(item) for item in value.values())
    return False
