"""Settings and inputs that differ between a checkpoint and the run that goes on from it, and which of them may."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, cast, get_args, get_origin

from launch.config.run_config import RunConfig
from opd.errors import ConfigurationError
from opd.settings.ranges import HARMLESS
from opd.settings.validation import fields_of, parts_of


def harmless(cls: type, where: str = "") -> Iterator[str]:
    """Patterns (`fnmatch`) of the settings below `cls` that are marked `HARMLESS`, by the names of `described`.

    Example: `{*harmless(StudentConfig, "student.")}` has `student.replicas`, and a group that is marked is `cluster.*`.
    """
    for name, hint in fields_of(cls).items():
        base, dotted = parts_of(hint)[0], f"{where}{name}"
        origin, arguments = get_origin(base) or base, get_args(base)
        kind: Any = origin if isinstance(origin, type) else object  # a union is one value
        group = dataclasses.is_dataclass(kind)
        if HARMLESS in get_args(hint):
            many = group or (issubclass(kind, Sequence | Mapping) and kind is not str)
            yield f"{dotted}.*" if many else dotted
        elif group:
            yield from harmless(cast(type, kind), f"{dotted}.")
        elif issubclass(kind, Mapping) and dataclasses.is_dataclass(arguments[-1]):
            yield from harmless(cast(type, arguments[-1]), f"{dotted}.*.")


@cache
def _of_a_run() -> tuple[str, ...]:
    return tuple(harmless(RunConfig))


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A setting that is not what it was; None = it was, or is, not there."""

    name: str
    before: Any
    now: Any

    @property
    def harmless(self) -> bool:
        """The same training comes out."""
        return any(fnmatchcase(self.name, pattern) for pattern in _of_a_run())


def changes(before: Mapping[str, Any], now: Mapping[str, Any], at_default: Set[str] = frozenset()) -> list[Change]:
    """Every setting that differs between two `described` configurations.

    A name that `before` does not know is a change unless it is `at_default` now (`checkpoint_state.at_defaults`).
    """
    names = [*before, *(name for name in now if name not in before and name not in at_default)]
    return [
        Change(name=name, before=before.get(name), now=now.get(name))
        for name in names
        if before.get(name) != now.get(name)
    ]


_SHAPES = ("student.path", "student.dtype", "learner.dtype", "learner.lora.*")
"""Settings that say what a checkpoint holds: with others it cannot be loaded."""


def check_changes(place: str, found: Sequence[Change], meant: Sequence[str] = ()) -> list[Change]:
    """Changes that are `meant` (names or patterns) although they train something else; refuses any other of that kind.

    Raises:
        ConfigurationError: a change is not meant, or would not fit the checkpoint, or what is meant has not changed.
    """
    telling = [change for change in found if not change.harmless]
    for pattern in meant:
        if not any(fnmatchcase(change.name, pattern) for change in telling):
            others = ", ".join(change.name for change in telling[:_SHOWN]) or "no setting that needs it"
            raise ConfigurationError(
                f"resume_changes names {pattern}, but nothing of that name is other than in {place} (changed: "
                f"{others}); correct it or leave it out"
            )
    wrong = [change for change in telling if not any(fnmatchcase(change.name, pattern) for pattern in meant)]
    if wrong:
        first, more = wrong[0], f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ConfigurationError(
            f"the checkpoint {place} was made with {first.name}={first.before}, but this run has "
            f"{first.name}={first.now}{more}, which would train something else; set it back, say that it is meant "
            f"(resume_changes=[{first.name}]), or start a new run from the export"
        )
    if lost := next((c for c in telling if any(fnmatchcase(c.name, pattern) for pattern in _SHAPES)), None):
        raise ConfigurationError(
            f"the checkpoint {place} holds what {lost.name}={lost.before} makes, so it cannot go on with "
            f"{lost.name}={lost.now}, meant or not; set it back, or start a new run from the export"
        )
    return telling


_SHOWN = 8  # changed settings that an error names


def check_inputs(place: str, before: Mapping[str, str], now: Mapping[str, str], found: Sequence[Change]) -> None:
    """Refuse another teacher, student or prompt file, compared by digest ("" = it is not here) and not by path.

    Held-out prompts may be exchanged on purpose, by another path.
    """
    for name in sorted(before.keys() | now.keys()):
        was, is_now = before.get(name), now.get(name)
        if was == is_now:
            continue
        if "." not in name:
            raise ConfigurationError(
                f"the checkpoint {place} was made with teacher {name!r} of fingerprint {was or 'none'}, but this run's "
                f"has {is_now or 'none'}; give the teacher that taught until then, or start a new run from the export"
            )
        exchanged = any(change.name == name and change.harmless for change in found)
        if was and is_now and not exchanged:  # an older checkpoint knows none, and then the path must be the same
            raise ConfigurationError(
                f"the checkpoint {place} was made with another content of {name} (digest {was}) than this run's "
                f"({is_now}), which would train or measure something else; give what was read until then, or start a "
                "new run from the export"
            )


def check_steps(place: str, step: int, steps: int) -> None:
    """Refuse a run that would end before it begins."""
    if steps < step:
        raise ConfigurationError(
            f"the checkpoint {place} is of step {step}, but steps={steps}; raise steps, or resume from an earlier one"
        )
