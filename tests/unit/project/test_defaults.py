"""Defaults and constants are promises: each is compared with `defaults.json`, which people read and change on purpose.

Recorded are the defaults and ranges of the fields of public dataclasses, class constants, defaults of the parameters of
public functions and methods, and public constants that are numbers, as a run has them: `4 << 30` is 4294967296.
"""

import ast
import importlib
import inspect
import json
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import pytest

from opd.settings.ranges import In, Length, Matches
from opd.settings.validation import default_of, fields_of, parts_of

PACKAGES = ("opd", "weight_sync", "teacher_service", "learner", "launch.config")
RECORDED = Path(__file__).with_name("defaults.json")
HOW = "python -m tests.records"


def shown(value: Any) -> str:
    """A value as text that is the same in every process; "" for what is no plain value (a tensor, a lock)."""
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return repr(value)
    if isinstance(value, type) or inspect.isroutine(value):
        return value.__qualname__.replace("<lambda>", "a lambda")
    if is_dataclass(value):
        said = {spec.name: shown(getattr(value, spec.name)) for spec in fields(value)}
        return f"{type(value).__name__}({', '.join(f'{name}={text}' for name, text in said.items() if text)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{shown(key)}: {shown(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(map(shown, value))) + "}" if value else "an empty set"
    if isinstance(value, tuple | list):
        return ("({})" if isinstance(value, tuple) else "[{}]").format(", ".join(map(shown, value)))
    return ""


def _is_number(value: Any) -> bool:
    """Is it a number, or made of numbers? Texts are found by whoever reads them."""
    if isinstance(value, Mapping):
        return bool(value) and all(map(_is_number, value.values()))
    if isinstance(value, tuple | list):
        return bool(value) and all(map(_is_number, value))
    if is_dataclass(value) and not isinstance(value, type):
        return all(_is_number(getattr(value, spec.name)) for spec in fields(value))
    return isinstance(value, bool | int | float)


def facts_of(name: str) -> dict[str, str]:
    """What the module `name` promises: dotted name -> value."""
    module = importlib.import_module(name)
    assert module.__file__ is not None
    found = dict(_constants(module, Path(module.__file__).read_text()))
    for key, value in vars(module).items():
        if key.startswith("_") or getattr(value, "__module__", "") != name:
            continue
        if inspect.isclass(value):
            found |= {f"{key}.{of}": text for of, text in _of_class(value)}
        elif inspect.isfunction(value):
            found |= {f"{key}({of})": text for of, text in _of_function(value)}
    return {f"{name}.{key}": text for key, text in found.items() if text}


def _constants(module: Any, source: str) -> Iterator[tuple[str, str]]:
    """Public numbers that the file itself assigns."""
    for statement in ast.parse(source).body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        for target in targets:
            for part in getattr(target, "elts", [target]):
                if isinstance(part, ast.Name) and part.id.isupper() and part.id[0] != "_":
                    value = getattr(module, part.id, None)
                    yield part.id, shown(value) if _is_number(value) else ""


def _of_class(cls: type) -> Iterator[tuple[str, str]]:
    specs = {spec.name: spec for spec in fields(cls)} if is_dataclass(cls) else {}
    for name, spec in specs.items():
        default = default_of(spec)
        marks = " ".join(_mark(mark) for mark in parts_of(fields_of(cls)[name])[1])
        if default is not MISSING or marks:
            yield name, f"{'required' if default is MISSING else shown(default)} {marks}".strip()
    for name, value in getattr(cls, "_field_defaults", {}).items():
        yield name, shown(value)
    for base in cls.__mro__[:-1]:
        if base.__module__.split(".")[0] not in ("opd", cls.__module__.split(".")[0]):
            continue  # a class of somebody else's
        for name in inspect.get_annotations(base):
            value = inspect.getattr_static(cls, name, MISSING)
            if (
                name not in specs
                and value is not MISSING
                and (isinstance(value, type) or not hasattr(value, "__get__"))
            ):
                yield name, shown(value)
    for name, value in vars(cls).items():
        function = inspect.unwrap(getattr(value, "__func__", value))
        public = not name.startswith("_") or name in ("__init__", "__call__")
        if public and inspect.isfunction(function) and not (specs and name == "__init__"):
            yield from ((f"{name}({of})", text) for of, text in _of_function(function))


def _of_function(function: Callable[..., Any]) -> Iterator[tuple[str, str]]:
    for name, parameter in inspect.signature(function).parameters.items():
        # Ray adds a private one to the methods of a class that was made an actor in the same process.
        if parameter.default is not parameter.empty and not name.startswith("_"):
            yield name, shown(parameter.default)


def _mark(mark: Any) -> str:
    """A range, without what people are told: `In(low=0, high=1)`, `Matches([a-z]+)`."""
    if isinstance(mark, Matches):
        return f"Matches({mark.pattern})"
    given = {spec.name: getattr(mark, spec.name) for spec in fields(mark) if spec.name != "because"}
    told = {name: value for name, value in given.items() if value is not False}
    return f"{type(mark).__name__}({', '.join(f'{name}={value!r}' for name, value in told.items())})"


def modules(package: str) -> list[str]:
    """All of a package's modules."""
    path = importlib.import_module(package).__path__
    return sorted([package, *(found.name for found in pkgutil.walk_packages(path, f"{package}."))])


def facts(package: str) -> dict[str, str]:
    """What all modules of a package promise, sorted by name."""
    return dict(sorted(fact for name in modules(package) for fact in facts_of(name).items()))


def differences(recorded: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """What is recorded and not found, and the other way round: a line each."""
    return [
        f"{name}: recorded {recorded.get(name, 'nothing')}, found {found.get(name, 'nothing')}"
        for name in sorted(recorded.keys() | found.keys())
        if recorded.get(name) != found.get(name)
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_defaults_ranges_and_constants_are_the_recorded_ones(package: str) -> None:
    recorded = {name: text for name, text in json.loads(RECORDED.read_text()).items() if name.startswith(f"{package}.")}
    assert recorded
    changed = differences(recorded, facts(package))
    assert not changed, "\n".join(
        [
            *changed,
            f"If that is meant: record with `{HOW}`, and say in CHANGELOG.md which default or range has changed.",
        ]
    )


def test_the_record_is_sorted_and_of_these_packages() -> None:
    recorded = json.loads(RECORDED.read_text())
    assert list(recorded) == sorted(recorded) and RECORDED.read_text() == text_of(recorded)
    assert {name for name in recorded if not name.startswith(tuple(f"{p}." for p in PACKAGES))} == set()


class Color(Enum):
    """An enumeration."""

    RED = 1


class Pair(NamedTuple):
    """A tuple with names."""

    first: int
    second: int = 2


@dataclass(frozen=True)
class Base:
    """What a class constant is inherited from."""

    shared: ClassVar[bool] = False


@dataclass(frozen=True)
class Example(Base):
    """All kinds of promises."""

    reads: ClassVar[type] = int
    color: Color
    share: Annotated[float, In(0, 1, low_open=True, because="it is one")]
    most: int = 1 << 20
    names: Annotated[tuple[str, ...], Length(1)] = ("a",)
    made: dict[str, Color] = field(default_factory=lambda: {"x": Color.RED})
    inner: tuple[int, int] = (1, 2)

    def read(self, first: int, *, own: bool = False) -> None:
        """A method."""


def read(path: str, color: Color = Color.RED, most: float = 2.0) -> None:
    """A function."""


def test_every_kind_of_promise_is_seen() -> None:
    assert dict(_of_class(Example)) == {
        "reads": "int",
        "share": "required In(low=0, high=1, low_open=True)",
        "most": "1048576",
        "names": "('a') Length(least=1)",
        "made": "{'x': Color.RED}",
        "inner": "(1, 2)",
        "shared": "False",
        "read(own)": "False",
    }
    assert dict(_of_class(Pair)) == {"second": "2"}
    assert dict(_of_function(read)) == {"color": "Color.RED", "most": "2.0"}
    assert differences({"a": "1", "b": "2"}, {"b": "3", "c": "4"}) == [
        "a: recorded 1, found nothing",
        "b: recorded 2, found 3",
        "c: recorded nothing, found 4",
    ]


def text_of(found: Mapping[str, str]) -> str:
    """The record as it is written."""
    return json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def record() -> None:
    """Write the record anew, and print what has changed."""
    new = {name: text for package in PACKAGES for name, text in facts(package).items()}
    old = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    RECORDED.write_text(text_of(new))
    print("\n".join([*differences(old, new), f"{len(new)} promises in {RECORDED.name}"]), file=sys.stderr)
