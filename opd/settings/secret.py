"""A secret as a type: it can be used and compared, and neither shown nor stored nor sent by accident."""

import hashlib
import hmac
import re
from typing import NoReturn, SupportsIndex, final

HIDDEN = "<redacted>"
_SECRET_KEY = re.compile(r"passw(or)?d|passphrase|secret|api_?key|access_?key|private_?key|credential", re.IGNORECASE)
_TOKEN_KEY = re.compile(r"token(?!iz)|bearer|authorization", re.IGNORECASE)
# What stands before the last @ of a URL's authority; with a slash in it only where no port can be meant.
_LOGIN = re.compile(
    r"(?<=://)(?:[^/?#\s'\"@]*(?:@[^/?#\s'\"@]+)*(?=@)|[^/?#\s'\"@\[]*:(?!\d+(?:[/?#]|$))[^\s'\"@]*(?=@))"
)


@final
class Secret:
    """Text that prints as `<redacted>`, and that pickle, JSON and YAML refuse.

    A part with a key of its own declares it so: `api_key: Secret`. A reader of the text calls `reveal()`, and that
    word is what to search for when one asks where secrets go. Example: `f"{Secret('hf_abc')}"` is `<redacted>`.
    """

    __slots__ = ("__text",)

    def __init__(self, text: str) -> None:
        self.__text = text

    def reveal(self) -> str:
        """The text itself."""
        return self.__text

    def matches(self, given: bytes) -> bool:
        """Whether `given` is the text in UTF-8; takes as long for a near miss, or another length, as for any other."""
        return hmac.compare_digest(_digest(given), _digest(self.__text.encode()))

    def __bool__(self) -> bool:
        return bool(self.__text)

    def __len__(self) -> int:
        return len(self.__text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self.matches(other.reveal().encode())

    def __hash__(self) -> int:
        return hash(_digest(self.__text.encode()))

    def __repr__(self) -> str:
        return HIDDEN

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError("a secret is neither stored nor sent; read it from the environment where it is needed")


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


def names_a_secret(key: str) -> bool:
    """Whether the value under this key is a secret, whatever its type. Example: `hf_api_key`."""
    return _SECRET_KEY.search(key) is not None


def names_a_token(key: str) -> bool:
    """Whether a *text* under this key is a secret: `hf_token` is; `max_tokens` is a number, `tokenizer` no token."""
    return _TOKEN_KEY.search(key) is not None


def logins(text: str) -> list[str]:
    """The logins of URLs in a text. Example: `logins("see http://user:word@host/")` is `["user:word"]`."""
    return [found for found in _LOGIN.findall(text) if found]


def without_logins(text: str) -> str:
    """`text` with the login of every URL replaced."""
    return _LOGIN.sub(lambda match: HIDDEN if match[0] else "", text)
