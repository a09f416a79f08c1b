"""Points of a sweep: what Hydra's multirun makes of overrides with several values, each as the overrides of one run."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, ValueType
from hydra.errors import HydraException
from xxhash import xxh32_hexdigest

from launch.cli.stages import override_key
from launch.config.composition.compose import compose, first_line, own_folder
from launch.config.composition.keys import holds_text, keys
from launch.config.shipped_files import groups
from opd.errors import ConfigurationError
from opd.settings.validation import shown

OF_THE_SWEEP = ("run_name", "output_dir", "resume", "resume_changes", "dry_run", "conf")
MOST = 1000  # runs of one sweep: more are a mistake in a range
_LONGEST = 120  # characters of a point's name


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One run of a sweep: the values that it has of the settings that vary, and the overrides that lead to it.

    Example: `Point(values={"learner.lr": "0.0001", "seed": "1"}, overrides=("steps=9", "learner.lr=0.0001", "seed=1"))`
    has the name `learner.lr=0.0001,seed=1`.
    """

    values: Mapping[str, str]
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of its run, with a digest where letters had to be left out."""
        whole = ",".join(f"{key}={value}" for key, value in self.values.items())
        plain = re.sub(r"[^A-Za-z0-9._=,+-]+", "-", whole).strip("-")[:_LONGEST]
        return plain if plain == whole else f"{plain}.{xxh32_hexdigest(whole.encode(errors='surrogatepass'))}"


@dataclass(frozen=True, slots=True)
class _Axis:
    """An override as Hydra's multirun reads it: `choices` are overrides of one value each; `key` is without `+`."""

    key: str
    choices: Sequence[str]
    varies: bool


def points_of(overrides: Sequence[str]) -> tuple[Point, ...]:
    """Points of the sweep that `overrides` describe, in the order in which Hydra's multirun would run them.

    The last override varies fastest; of two that set the same key the later one counts, in the place of the first.

    Raises:
        ConfigurationError: no override has several values, or one has that cannot be counted or swept.
    """
    axes: dict[str, _Axis] = {}
    for override in overrides:
        key, axis = _axis(override, overrides)
        axes[key] = axis
    if not any(axis.varies for axis in axes.values()):
        raise ConfigurationError(
            "-m trains a run for each of several values, but no override has several; write e.g. "
            "learner.lr=1e-4,3e-4 seed=0,1, or leave -m out"
        )
    if (count := math.prod(len(axis.choices) for axis in axes.values())) > MOST:
        raise ConfigurationError(f"this sweep has {count} runs, and {MOST} are the most; name fewer values")
    points = tuple(_point(list(axes.values()), chosen) for chosen in itertools.product(*_choices(axes)))
    names = [point.name for point in points]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise ConfigurationError(f"two runs of this sweep would be the same, {twice}; name each value once")
    return points


def _choices(axes: Mapping[str, _Axis]) -> list[Sequence[str]]:
    return [axis.choices for axis in axes.values()]


def _point(axes: Sequence[_Axis], chosen: Sequence[str]) -> Point:
    values = {
        axis.key: _unquoted(override.partition("=")[2])
        for axis, override in zip(axes, chosen, strict=True)
        if axis.varies
    }
    return Point(values=values, overrides=tuple(chosen))


def _unquoted(value: str) -> str:
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1].replace(f"\\{value[0]}", value[0]) if quoted else value


def _axis(override: str, overrides: Sequence[str]) -> tuple[str, _Axis]:
    """Key of the override in multirun (with its `+`), and its choices."""
    written, _, value = override.partition("=")
    key = override_key(override)
    if re.match(r"hydra[./]", key):
        raise ConfigurationError(
            f"{override} is about how Hydra starts jobs, and a sweep starts its runs itself, in output_dir/run_name; "
            "leave it out (several processes share a sweep: docs/sweeps.md)"
        )
    if key.startswith("stages."):
        raise ConfigurationError(f"{override} sets a stage, and a run with stages cannot be swept; leave -m out")
    fixed = _Axis(key, [override], varies=False)
    try:
        parsed = OverridesParser.create().parse_override(override)
    except (HydraException, ValueError, RecursionError):
        return written, fixed  # a text: composing reads it, or refuses it
    if not parsed.is_sweep_override():
        return parsed.get_key_element(), fixed
    if key in OF_THE_SWEEP:
        raise ConfigurationError(f"{override}: {key} is the whole sweep's and has one value; write {key}=VALUE")
    if parsed.value_type is ValueType.SIMPLE_CHOICE_SWEEP and re.search(r",\s", value) and _is_text(key, overrides):
        raise ConfigurationError(
            f"{shown(override)} may be one text or several: under -m write {key}=choice(...) for a run with each, or "
            f"quote it for one text ({key}=\"'...'\")"
        )
    element = parsed.get_key_element()
    return element, _Axis(key, [f"{element}={one}" for one in _values(parsed, override, overrides)], varies=True)


def _is_text(key: str, overrides: Sequence[str]) -> bool:
    """Whether the setting holds text, in which a comma is a comma; known from the overrides of one value."""
    single = [o for o in overrides if override_key(o) != key and "," not in o and "(" not in o]
    return any(one.name == key and holds_text(one.kind) for one in keys(compose(single)))


def _values(parsed: Override, override: str, overrides: Sequence[str]) -> list[str]:
    """The values that an override has, as Hydra writes them."""
    if parsed.is_interval_sweep():
        raise ConfigurationError(
            f"{override} has no values that can be counted; write them out (A,B,C), or range(START,STOP,STEP)"
        )
    found = parsed.value()
    if isinstance(found, Glob):
        return _matching(parsed, found, override, overrides)
    try:
        values = list(itertools.islice(parsed.sweep_string_iterator(), MOST + 1))
    except (HydraException, ValueError, TypeError, ArithmeticError) as error:
        raise ConfigurationError(f"{override} cannot be counted ({first_line(error)}); write its values out") from error
    if not values:
        raise ConfigurationError(
            f"{override} has no value; a range ends before its second number: write e.g. range(0,3)"
        )
    if len(values) > MOST:
        raise ConfigurationError(f"{override} has more than {MOST} values; name fewer")
    return values


def _matching(parsed: Override, wanted: Glob, override: str, overrides: Sequence[str]) -> list[str]:
    """Options of a group whose names match."""
    known = groups(own_folder(overrides))
    if parsed.key_or_group not in known:
        raise ConfigurationError(
            f"{override}: glob() chooses among the options of a group, and {parsed.key_or_group} is none; groups are "
            f"{', '.join(known)}"
        )
    names = wanted.filter(known[parsed.key_or_group])
    if not names:
        raise ConfigurationError(
            f"{override} matches no option; {parsed.key_or_group} has {', '.join(known[parsed.key_or_group])}"
        )
    return names
