"""Validation of settings: a field's annotation declares type and range, and everything is checked here.

`temperature: Annotated[float, In(0, 100)]` is a finite number in that range, wherever it comes from: `settings` makes a
dataclass check its fields when it is built, and the configuration calls `fit` with the name a user knows a field by.
Containers, enums, nested dataclasses and parts (protocols) are checked against their declared types as well. What
needs more than one part is marked with `AtMost` and checked where a run is planned.
"""

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING
from difflib import get_close_matches
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from opd.errors import ConfigurationError
from opd.settings.meant import read_as
from opd.settings.ranges import AtMost, In, Length, Matches, Whole
from opd.settings.secret import HIDDEN, Secret, names_a_secret, without_logins

Class = TypeVar("Class")
MAY_LACK = "__may_lack__"
SHOWN = 60  # characters of a wrong value in a sentence


def settings(cls: type[Class]) -> type[Class]:
    """Class decorator, below `@dataclass`, that checks all fields of every instance before its `__post_init__`.

    Raises `ConfigurationError` that names class and field. What was given in another form of the declared type (an int
    for a float, a list for a tuple) is kept in the declared one.
    """
    own = getattr(cls, "__post_init__", None)

    def __post_init__(self: Any) -> None:
        hints = fields_of(type(self))
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            fitted = fit(hints[spec.name], value, f"{type(self).__name__}.{spec.name}", default_of(spec))
            if fitted is not value:
                object.__setattr__(self, spec.name, fitted)
        if own:
            own(self)

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    return cls


@cache
def fields_of(cls: type) -> Mapping[str, Any]:
    """The declared types of a dataclass's fields, with their ranges; a name that nothing resolves is `Any`."""
    specs = dataclasses.fields(cast(Any, cls))
    try:
        hints = get_type_hints(cls, include_extras=True)
    except (NameError, TypeError, AttributeError):  # a user's part that imports its types for checkers only
        hints = {spec.name: Any if isinstance(spec.type, str) else spec.type for spec in specs}
    return {spec.name: hints[spec.name] for spec in specs}


def default_of(spec: "dataclasses.Field[Any]") -> Any:
    """Default of a field; `MISSING` if it must be set."""
    return spec.default_factory() if spec.default_factory is not MISSING else spec.default


def walk(value: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    """`(name, declared type, value)` of every field below a dataclass, parts inside parts included."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = fields_of(type(value))
        for spec in dataclasses.fields(value):
            name, inner = f"{where}.{spec.name}" if where else spec.name, getattr(value, spec.name)
            yield name, hints[spec.name], inner
            yield from walk(inner, name)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from walk(inner, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from walk(inner, f"{where}[{i}]")


# Whether a value is what a field declares.


def fit(hint: Any, value: Any, where: str, default: Any = MISSING) -> Any:
    """`value` as the declared type. Raises `ConfigurationError`: what `where` needs, what it got, what to set."""
    try:
        return _checked(hint, value, where)
    except _Misfit as misfit:
        raise ConfigurationError(_sentence(hint, value, where, default, misfit.reason)) from None


def _checked(hint: Any, value: Any, where: str) -> Any:
    base, marks = parts_of(hint)
    fitted = _typed(base, value, where)
    for mark in marks:
        if not isinstance(mark, AtMost) and not mark.allows(fitted):
            raise _Misfit(mark.because)
    return fitted


class _Misfit(Exception):
    """Error about a value that is not of its type; `reason` is added to the sentence."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason


def parts_of(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A declared type without its annotation marks, and the marks."""
    if get_origin(hint) is not Annotated:
        return hint, ()
    base, *marks = get_args(hint)
    return base, tuple(m for m in marks if isinstance(m, In | Matches | Length | Whole | AtMost))


def _typed(base: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(base), get_args(base)
    if origin in (Union, UnionType):
        return _either(arguments, value, where)
    if origin is Literal:
        return _must(value, any(value == one and type(value) is type(one) for one in arguments))
    if origin is tuple or (isinstance(origin, type) and issubclass(origin, Sequence)):
        _must(value, isinstance(value, list | tuple))
        members = [fit(arguments[0], member, f"{where}[{i}]") for i, member in enumerate(value)]
        return tuple(members) if origin is tuple or isinstance(value, tuple) else members
    if isinstance(origin, type) and issubclass(origin, Mapping):
        _must(value, isinstance(value, Mapping) and all(isinstance(key, str) for key in value))
        return {key: fit(arguments[1], member, f"{where}.{key}") for key, member in value.items()}
    if origin is type:
        fine = isinstance(value, type) and isinstance(arguments[0], type) and issubclass(value, arguments[0])
        return _must(value, fine)
    if base is Any or not isinstance(origin or base, type):
        return value
    return _simple(origin or base, value)


def _simple(kind: type, value: Any) -> Any:
    if kind is Secret and isinstance(value, str):
        return Secret(value)
    if kind is float:
        _must(value, isinstance(value, int | float) and not isinstance(value, bool))
        try:
            return _must(float(value), math.isfinite(value))
        except OverflowError:
            raise _Misfit from None
    if kind is int:
        return _must(value, isinstance(value, int) and not isinstance(value, bool))
    if issubclass(kind, Enum) and isinstance(value, str):
        return kind.__members__.get(value.upper()) or kind._missing_(value.lower()) or _must(value, False)
    if getattr(kind, "_is_protocol", False):
        if reason := misfit(kind, value):
            raise _Misfit(reason)
        return value
    return _must(value, isinstance(value, kind))


def _must(value: Any, fine: bool) -> Any:
    if not fine:
        raise _Misfit
    return value


def _either(kinds: Sequence[Any], value: Any, where: str) -> Any:
    for kind in kinds:
        with suppress(ConfigurationError):
            return fit(kind, value, where)
    raise _Misfit


# Parts: whether an object has what its slot's protocol asks for.


@cache
def members_of(protocol: type) -> Mapping[str, Any]:
    """Members of a protocol: its attributes, each with its declared type (`Any` for methods)."""
    found: dict[str, Any] = {}
    for base in reversed(protocol.__mro__):
        if not getattr(base, "_is_protocol", False):
            continue
        found |= {name: hint for name, hint in get_type_hints(base, include_extras=True).items() if name[0] != "_"}
        for name, member in vars(base).items():
            if isinstance(member, property):
                found[name] = get_type_hints(cast(Any, member.fget), include_extras=True).get("return", Any)
            elif callable(member) and (name[0] != "_" or name == "__call__") and not isinstance(member, type):
                found[name] = Any
    return found


def may_lack(*names: str) -> Callable[[type[Class]], type[Class]]:
    """Class decorator of a protocol that makes members optional: a part may lack them, and readers handle that."""

    def mark(protocol: type[Class]) -> type[Class]:
        setattr(protocol, MAY_LACK, names)
        return protocol

    return mark


def misfit(protocol: type, part: Any) -> str:
    """Reason why `part` cannot fill a slot of this protocol; "" if it can."""
    name = type(part).__name__
    if not dataclasses.is_dataclass(part) and isinstance(part, str | int | float | list | tuple | Mapping | NoneType):
        return "no part is named"
    if isinstance(part, type):
        return f"{part.__name__} is a class, build one"
    required = members_of(protocol)
    if lacking := missing(protocol, type(part)):
        return lacking
    for member, hint in required.items():
        if hint is Any or not _has(part, member):
            continue
        try:
            fit(hint, getattr(part, member), member)
        except Exception as error:  # noqa: BLE001  # a user's property may raise anything
            return f"its {member} is not what it should be: {error}"
    return _other_call(getattr(protocol, "__call__"), type(part).__call__, name) if "__call__" in required else ""  # noqa: B004, B009


def missing(protocol: type, cls: type) -> str:
    """Members that a class lacks for a slot of this protocol; "" if none."""
    fields = {spec.name for spec in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    required = members_of(protocol).keys() - {*getattr(protocol, MAY_LACK, ()), *fields}
    lacking = sorted(name for name in required if not hasattr(cls, name))
    return f"{cls.__name__} lacks {', '.join(lacking)}" if lacking else ""


def _has(part: Any, name: str) -> bool:
    try:
        return hasattr(part, name)
    except Exception:  # noqa: BLE001  # a user's property may raise anything
        return False


@cache  # every change of a method checks its parts again
def _other_call(declared: Callable[..., Any], given: Callable[..., Any], name: str) -> str:
    if inspect.iscoroutinefunction(declared) != inspect.iscoroutinefunction(given):
        return f"{name} is called {'without' if inspect.iscoroutinefunction(declared) else 'with'} await"
    wants = list(inspect.signature(declared).parameters)[1:]
    try:
        inspect.signature(given).bind(*[None] * (len(wants) + 1))
    except TypeError:
        return f"{name} is not called with ({', '.join(wants)})"
    theirs, ours = _returns(given), _returns(declared)
    if theirs and ours and not issubclass(theirs, ours) and not issubclass(ours, theirs):
        return f"{name} gives {theirs.__name__} and not {ours.__name__}"
    return ""


def _returns(function: Callable[..., Any]) -> type | None:
    """Return type of a call, where it is declared and a plain class."""
    try:
        hint = get_type_hints(function).get("return")
    except Exception:  # noqa: BLE001  # names that only a type checker can resolve
        return None
    hint = getattr(hint, "array_type", get_origin(hint) or hint)
    return hint if isinstance(hint, type) else None


# Error sentences.


def _sentence(hint: Any, value: Any, where: str, default: Any, because: str) -> str:
    reason = f" ({because})" if because else ""
    got = HIDDEN if names_a_secret(where) or parts_of(hint)[0] is Secret else without_logins(shown(value))
    return f"{where} needs {wanted(hint)}, got {got}{reason}; {_advice(hint, value, where, default)}"


def wanted(hint: Any) -> str:
    """Type and range of a setting as a sentence's object. Example: `"a whole number from 1 to 9"`."""
    base, marks = parts_of(hint)
    described = _kind(base)
    for mark in marks:
        described = described if isinstance(mark, AtMost) else mark.says(described)
    return described


def _kind(base: Any) -> str:
    origin, arguments = get_origin(base), get_args(base)
    if origin in (Union, UnionType):
        return " or ".join(wanted(kind) for kind in arguments)
    if origin is Literal:
        return f"one of {', '.join(spelled(one) for one in arguments)}"
    if origin is tuple or (isinstance(origin, type) and issubclass(origin, Sequence)):
        return f"a list [...], each member {wanted(arguments[0])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping of names" + ("" if arguments[1] is Any else f", each with {wanted(arguments[1])}")
    if isinstance(base, type) and issubclass(base, Enum):
        return f"one of {', '.join(base.__members__)}"
    simple = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        Secret: "text",
        NoneType: "null",
    }
    return simple.get(base) or f"a part for the slot {getattr(base, '__name__', base)}"


def _advice(hint: Any, value: Any, where: str, default: Any) -> str:
    base, marks = parts_of(hint)
    candidates = [default]
    if isinstance(value, str):
        kinds = get_args(base) if get_origin(base) in (Union, UnionType) else (base,)
        meant = [read_as(kind, value) for kind in (parts_of(one)[0] for one in kinds) if kind in (int, float, bool)]
        candidates[:0] = [one for one in meant if one is not None]
    if base is int and isinstance(value, float) and value.is_integer():
        candidates.insert(0, int(value))
    if base is bool and value in (0, 1) and not isinstance(value, bool):
        candidates.insert(0, bool(value))
    if base is str and isinstance(value, int | float) and not isinstance(value, bool):
        candidates.insert(0, str(value))
    if get_origin(base) in (tuple, Sequence) and isinstance(value, str | int | float):
        candidates.insert(0, [value])
    ends = [m for m in marks if isinstance(m, In)]
    if isinstance(base, type) and issubclass(base, Enum) and isinstance(value, str):
        candidates[:0] = _members_like(value.upper(), list(base.__members__))
    if ends and isinstance(value, int | float) and not isinstance(value, bool):
        candidates += [(int if base is int else float)(ends[0].high if value > ends[0].high else ends[0].low)]
    candidates += [(int if base is int else float)(m.low) for m in ends]
    if where.endswith("]"):
        return f"correct that member of {where.partition('[')[0]}=[...]"
    for candidate in candidates:
        if _legal(hint, candidate) and len(written := spelled(candidate)) <= SHOWN and written.isprintable():
            return f"set {where}={written}"
    return f"name one with {where}._target_=PACKAGE.CLASS" if _is_part(base) else f"set another {where}=..."


_SHORT = re.compile(r"(?<=F)(LOAT|P)")  # of FLOAT32 and FP32: F32


def _members_like(name: str, members: Sequence[str]) -> list[str]:
    """Members that are nearly `name`, or else those that contain it or that it contains."""
    within = sorted((member for member in members if member in name or name in member), key=len, reverse=True)
    short = [member for member in members if _SHORT.sub("", member) == _SHORT.sub("", name)]
    return short or get_close_matches(name, members, n=1, cutoff=0.75) or within


def _is_part(base: Any) -> bool:
    return isinstance(base, type) and (getattr(base, "_is_protocol", False) or dataclasses.is_dataclass(base))


def _legal(hint: Any, value: Any) -> bool:
    if value is MISSING or (dataclasses.is_dataclass(value) or isinstance(value, Mapping)):
        return False
    try:
        _checked(hint, value, "")
    except (_Misfit, ConfigurationError):
        return False
    return True


def spelled(value: Any) -> str:
    """A value as an override on the command line. Example: `spelled([1, "a b"])` is `[1,'a b']`."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list | tuple):
        return f"[{','.join(spelled(member) for member in value)}]"
    if not isinstance(value, str):
        return repr(value)
    plain = re.fullmatch(r"[A-Za-z_./][A-Za-z0-9_./:@%+-]*", value) and value.lower() not in (
        "null",
        "true",
        "false",
        "nan",
        "inf",
        "infinity",
    )
    return value if plain else "'" + re.sub(r"(\\*)('|$)", _escaped, value) + "'"


def _escaped(match: re.Match[str]) -> str:
    """Text with backslashes doubled before a quote, or before the closing one."""
    return match[1] * 2 + ("\\'" if match[2] else "")


def shown(value: Any) -> str:
    """A value as in an error sentence, cut where it is long."""
    if isinstance(value, int) and abs(value) >= 10**SHOWN:
        return f"a number of more than {SHOWN} digits"
    text = spelled(value) if isinstance(value, bool | Enum | NoneType) else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"
