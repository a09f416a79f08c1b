"""Errors with a sentence for the user: which part, what it needs, what it got, what to do."""

import unicodedata

_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format, half a pair, line and paragraph separators

_HEAD, _TAIL = 1000, 400  # characters of a longer message that are kept


class OpdError(Exception):
    """Base of all errors that stop a run; the message is one sentence for its user.

    It stays one line that can be read, and leaves a terminal as it is, whatever it repeats of a file or a command
    line: characters that are not seen are escaped (`x\\ny`), and a middle too long to be read is left out.
    """

    def __str__(self) -> str:
        text = super().__str__()
        text = text if text.isprintable() else "".join(map(_escaped, text))
        left_out = len(text) - _HEAD - _TAIL
        return text if left_out <= 0 else f"{text[:_HEAD]} [{left_out} characters left out] {text[-_TAIL:]}"


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in _INVISIBLE:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


class ConfigurationError(OpdError):
    """Invalid configuration, found before anything was started."""


class DataError(OpdError):
    """Invalid data: a prompt, completion, score, checkpoint or file is not what it claims to be."""


class ServiceLost(OpdError):
    """A service that is lost; the request was not at fault, and another replica may take it."""


class ServiceVanished(ServiceLost):
    """A service that is lost for an unknown reason: another replica need not fare alike."""


class ServiceHung(ServiceLost):
    """A service that reports itself that it hangs."""
