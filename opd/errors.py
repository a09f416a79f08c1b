"""What a user can get wrong, said in one sentence: which part, what it needs, what it got, what to do."""

import unicodedata

_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format, half a pair, line and paragraph separators

_HEAD, _TAIL = 1000, 400  # characters of a longer message that are said


class OpdError(Exception):
    """The run cannot be right and stops; the message is one sentence for the person who started it.

    It stays one line that can be read, and leaves a terminal as it is, whatever it repeats of a file or a command
    line: characters that are not seen are escaped (`x\\ny`), and a middle too long to be read is left out.
    """

    def __str__(self) -> str:
        text = super().__str__()
        text = text if text.isprintable() else "".join(map(_seen, text))
        left_out = len(text) - _HEAD - _TAIL
        return text if left_out <= 0 else f"{text[:_HEAD]} [{left_out} characters left out] {text[-_TAIL:]}"


def _seen(character: str) -> str:
    if unicodedata.category(character) not in _UNSEEN:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


class ConfigurationError(OpdError):
    """The request itself is wrong; found before anything was started."""


class DataError(OpdError):
    """A prompt, a checkpoint or a testimony is not what it claims to be."""


class ServiceLost(OpdError):
    """Whoever should have answered is gone; the request was not at fault, and another may be asked."""


class ServiceVanished(ServiceLost):
    """A service that is gone, and nothing is known of why: another one need not fare alike."""


class ServiceHung(ServiceLost):
    """Whoever should have answered says himself that he is stuck."""
