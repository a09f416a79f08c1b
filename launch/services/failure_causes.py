"""Cause of an actor's failure in one line: the class and the text of the innermost error.

Ray wraps what an actor raises in errors of its own, whose text is a colored header with the actor's repr and a whole
traceback; groups of tasks wrap it once more.
"""

import re
from collections.abc import Iterator

from opd.errors import OpdError, ServiceVanished

_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_HEADER = re.compile(r"ray::\S+?\(\)\s*\(pid=\d+.*")  # to the end of its line: the repr may hold anything
_TRACEBACK = re.compile(r"Traceback \(most recent call last\):")
_RAISED = re.compile(r"[A-Za-z_][\w.]*(?:\([\w.]+\))?(?:: .*)?")  # the last line of a traceback
_ERROR = re.compile(r"(?:Error|Exception|Interrupt|Exit|Warning|Iteration|Stopped|Lost|Hung|Died)\b")
_NOTICE = re.compile(
    r"(?:The actor .*)?The actor died because of an error raised in its creation task|.* isn't serializable: "
)
_WRAPPER = re.compile(r"^(?:[\w.]*\.)?RayTaskError(?:\([\w.]+\))?: ")


class ProcessFailed(OpdError):
    """An actor raised what is no sentence of ours."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """`error` and what it stands for, outermost first: what an actor raised, and the members of groups."""
    seen, waiting = set[int](), [error]
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        inner = getattr(one, "cause", None)  # ray.exceptions.RayTaskError
        waiting += [inner] if isinstance(inner, BaseException) else []
        waiting += one.exceptions if isinstance(one, BaseExceptionGroup) else []


def find_own(error: BaseException) -> OpdError | None:
    """Our error inside groups and Ray's wrappers; one of ours for what else Ray hands on; None if there is neither."""
    known = list(causes(error))
    own = next((one for one in known if isinstance(one, OpdError) and not _is_rays(one)), None)
    if own is None and any(_is_rays(one) for one in known):
        return ProcessFailed(f"a process of this run failed: {brief(error)}")
    return own


def _is_rays(error: BaseException) -> bool:
    return any(kind.__module__.startswith("ray.") for kind in type(error).__mro__)


def brief(error: BaseException) -> str:
    """Class and first line of the innermost cause."""
    *_, inmost = _line(error)
    text, name = str(inmost), type(inmost).__name__
    line = one_line(text)
    if _quotes_cause(text, line):
        return line
    return f"{name}: {line}" if line else name


def vanished(error: BaseException) -> bool:
    """Whether it is only known that a process or an object is gone; otherwise `brief` has what was raised there."""
    *_, inmost = _line(error)
    if isinstance(inmost, ServiceVanished):
        return True
    return _is_rays(inmost) and not _quotes_cause(str(inmost), one_line(str(inmost)))


def _quotes_cause(text: str, line: str) -> bool:
    """Whether `line` names the error that `text` (Ray's own) only quotes."""
    quotes = _HEADER.search(without_colors(text)) or _TRACEBACK.search(text)
    return bool(quotes and _RAISED.fullmatch(line) and _ERROR.search(line.partition(": ")[0]))


def _line(error: BaseException) -> Iterator[BaseException]:
    """From `error` to its cause, always the first member of a group."""
    seen = set[int]()
    while id(error) not in seen:
        seen.add(id(error))
        yield error
        inner = getattr(error, "cause", None)
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        elif isinstance(inner, BaseException):
            error = inner


def without_colors(text: str) -> str:
    """`text` as a file should have it."""
    return _ANSI.sub("", text)


def one_line(text: str) -> str:
    """The first line of `text`, without colors; where Ray's header or a traceback follows, with what was raised."""
    plain = without_colors(text)
    found = [m.start() for m in (_HEADER.search(plain), _TRACEBACK.search(plain)) if m]
    if not found:
        return _first(plain)
    before, after = plain[: min(found)].strip().removesuffix(","), plain[min(found) :].splitlines()
    raised = [line.strip() for line in after if _RAISED.fullmatch(line.rstrip()) and _ERROR.search(line)]
    reason = _WRAPPER.sub("", raised[-1]) if raised else ""
    reason = re.sub(r"^(?:\w+\.)+(?=\w+: )", "", reason)
    prefix = "" if _boilerplate(before) else _first(before)
    return f"{prefix} {reason}".strip() if reason else prefix or _first(before)


def _first(text: str) -> str:
    return " ".join(next((line for line in text.splitlines() if line.strip()), "").split())


def _boilerplate(before: str) -> bool:
    """Whether `before` is Ray's preamble of a constructor's error, or of one that cannot be pickled."""
    return not before or bool(_NOTICE.match(before))
