"""A run's checkpoints as values: names, order, retention, and the settings a resumed run may change. Pure."""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from launch.artifacts.old_names import renamed, todays_parts, todays_setting
from launch.artifacts.redaction import redacted
from opd.errors import DataError
from opd.settings.validation import default_of, fields_of, parts_of

FORMAT = "opd run checkpoint 1"
MANIFEST, STATE, LEARNER = "manifest.json", "state.json", "learner"

GRADERS: Mapping[str, Any] = {
    "graders.shop": "launch.inputs.graders.ShopGrader",
    "graders.peak": "launch.inputs.graders.PeakGrader",
    "graders.math": "launch.inputs.graders.MathGrader",
    "graders.math.deadline_s": 5.0,
}
"""What every run had before graders were settings."""

_NAME = re.compile(r"step_(\d+)")
_STRAY = re.compile(r"\.(step_\d+)\.(partial|old)")


def name_of(step: int) -> str:
    """Folder name of a checkpoint. Example: `step_40`."""
    return f"step_{step}"


def newest_first(names: Iterable[str]) -> list[int]:
    """Steps of the names that are checkpoints, newest first; leftovers of a crash and other files are none."""
    return sorted((int(found[1]) for name in names if (found := _NAME.fullmatch(name))), reverse=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftovers:
    """Leftovers of a crash in the folder: `remove` these, and rename these `back` (name now, name then)."""

    remove: Sequence[str]
    back: Sequence[tuple[str, str]]


def leftovers(names: Iterable[str]) -> Leftovers:
    """Cleanup after a crash. A `.partial` was never a checkpoint; an `.old` is a whole one that was about to be
    replaced: if the new one did not get its name, the old one gets it back.
    """
    present = set(names)
    strays = {name: found for name in sorted(present) if (found := _STRAY.fullmatch(name))}
    back = [(name, found[1]) for name, found in strays.items() if found[2] == "old" and found[1] not in present]
    return Leftovers(remove=[name for name in strays if name not in dict(back)], back=back)


def expired(steps: Iterable[int], keep: int, keep_every: int, best: Collection[int] = ()) -> list[int]:
    """Steps whose checkpoints are removed: all but the newest `keep`, multiples of `keep_every` (0: none), `best`."""
    newest = sorted(steps, reverse=True)
    return [step for step in newest[keep:] if not (keep_every and step % keep_every == 0) and step not in best]


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverState:
    """State of the driver after `step`, beside the weights.

    `ledger` is what `Ledger.to_json` wrote, `totals` the last line of metrics that a `Meter` goes on from,
    `wall_s` the seconds up to here, `teachers` the digests of what it reads (teachers' weights by their names,
    other inputs by their settings), `config` the resolved settings as `described` gives them, `followers` the files of
    teachers that follow the student, by name.
    """

    run_name: str
    step: int
    ledger: str
    totals: Mapping[str, float]
    wall_s: float
    teachers: Mapping[str, str]
    config: Mapping[str, Any]
    followers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The state as a plain mapping."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "DriverState":
        """Inverse of `as_json`. Raises `DataError` for anything else."""
        try:
            state = cls(**values)
        except TypeError as error:
            raise DataError(
                f"{STATE} is of another version of this program ({error}); take another checkpoint"
            ) from error
        wrong = [name for name, fits in state._fit().items() if not fits]
        if wrong:
            raise DataError(f"{STATE} has a {wrong[0]} of another kind than a run writes; take another checkpoint")
        return state

    def _fit(self) -> dict[str, bool]:
        """Whether each field has its declared type."""
        return {
            "run_name": isinstance(self.run_name, str),
            "step": type(self.step) is int and self.step >= 0,
            "ledger": isinstance(self.ledger, str),
            "totals": _maps(self.totals, int | float) and all(map(_finite, self.totals.values())),
            "wall_s": isinstance(self.wall_s, int | float) and _finite(self.wall_s) and self.wall_s >= 0,
            "teachers": _maps(self.teachers, str),
            "config": _maps(self.config, object),
            "followers": _maps(self.followers, str),
        }


def _finite(value: float) -> bool:
    return -1e300 < value < 1e300  # whole numbers may be too large for a float


def _maps(value: Any, kind: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) and isinstance(v, kind) for k, v in value.items())


def described(value: Any, where: str = "") -> dict[str, Any]:
    """A configuration object with all its defaults as dotted names and plain values, secrets replaced.

    Example: `described(LearnerConfig(), "learner")["learner.dtype"] == "BFLOAT16"`.
    """
    flat: dict[str, Any] = {}
    _describe(redacted(_plain(value)), where, flat)
    return flat


def _plain(value: Any) -> Any:
    """Dataclasses as mappings that also name their class."""
    match value:
        case Enum():
            return value.name
        case None | bool() | int() | float() | str():
            return value
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init and f.repr}
        return {"": f"{type(value).__module__}.{type(value).__qualname__}"} | own
    return repr(value)


def _describe(value: Any, where: str, flat: dict[str, Any]) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _describe(item, f"{where}.{key}".strip("."), flat)
    elif isinstance(value, list):
        flat[f"{where}.length".strip(".")] = len(value)
        for i, item in enumerate(value):
            _describe(item, f"{where}.{i}".strip("."), flat)
    else:
        flat[where] = value


def at_defaults(value: Any, where: str = "") -> frozenset[str]:
    """Names of `described` whose settings have their declared defaults.

    A checkpoint made before a setting existed lacks its name, and was trained as the default trains: a new setting's
    default means what was done before there was a choice. The class of a group or part counts like a setting.
    """
    if isinstance(value, Mapping):
        inner = [(key, item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        inner = list(enumerate(value))
    elif not dataclasses.is_dataclass(value) or isinstance(value, type):
        return frozenset()
    else:
        return _fields_at_defaults(value, where)
    return frozenset().union(*(at_defaults(item, f"{where}.{key}".strip(".")) for key, item in inner))


def _fields_at_defaults(value: Any, where: str) -> frozenset[str]:
    names, declared = set[str](), fields_of(type(value))
    for spec in dataclasses.fields(value):
        if spec.init and spec.repr:
            name, inner, default = f"{where}.{spec.name}".strip("."), getattr(value, spec.name), default_of(spec)
            names |= described(inner, name).keys() if inner == default else at_defaults(inner, name)
            if type(inner) in (parts_of(declared[spec.name])[0], type(default)) and dataclasses.is_dataclass(inner):
                names.add(name)  # a group that can have, or has, no other class
    return frozenset(names)


def in_todays_names(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `described` settings of a checkpoint under current names: settings, classes, and an old schedule's shape.

    What had no `learner.decay_steps` fell through the warm-up: LINEAR was WARMUP_TIMES_LINEAR, CONSTANT the same with
    a floor of 1. The old COSINE has no name. What had no `graders` had those of the program.
    """
    config = {todays_setting(name): renamed(v) if isinstance(v, str) else v for name, v in config.items()}
    config = todays_parts(config)
    if "method.name" in config and not any(name.startswith("graders.") for name in config):
        config = {**config, **GRADERS}
    if "learner.decay_steps" in config or "learner.schedule" not in config:
        return config
    flat = {"learner.final_lr_fraction": 1.0} if config["learner.schedule"] == "CONSTANT" else {}
    old = {"CONSTANT": "WARMUP_TIMES_LINEAR", "LINEAR": "WARMUP_TIMES_LINEAR", "COSINE": "an older COSINE"}
    name = old.get(config["learner.schedule"], config["learner.schedule"])
    return {**config, "learner.schedule": name, "learner.decay_steps": 0, **flat}
