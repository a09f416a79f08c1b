"""Methods fitted into a world: supports no larger than its vocabulary, token and teacher names that it has."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from typing import Any
from zlib import crc32

from opd.certify.worlds import MORE
from opd.errors import OpdError
from opd.method.method import Method
from opd.method.needs import named
from opd.ports import Role
from opd.token_weights.special_tokens import with_known_tokens

SUPPORT_FIELDS = ("k", "record_topk")
SUPPORT = 4  # the most ids a support has in a small world


@dataclass(frozen=True, slots=True)
class _AnyToken(Mapping[str, int]):
    """Vocabulary that has every token, under one of a few ids, and lists none."""

    size: int

    def __getitem__(self, token: str) -> int:
        return crc32(token.encode()) % self.size

    def __contains__(self, token: object) -> bool:
        return isinstance(token, str)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def fitted(method: Method, vocabulary: int, largest: int = SUPPORT) -> Method:
    """Method with supports of at most `largest` ids, and with ids for all tokens that its weights name."""
    small = with_supports(method, lambda k: min(k, largest))
    return with_known_tokens(small, _AnyToken(vocabulary))


def with_supports(part: Any, size: Callable[[int], int]) -> Any:
    """The part with every support's number of ids changed."""
    return _changed(part, lambda name, value: size(value) if name in SUPPORT_FIELDS and value else value)


def with_temperature(part: Any, temperature: float) -> Any:
    """The part with another temperature, unless it is greedy."""
    return _changed(part, lambda name, value: temperature if name == "temperature" and value else value)


def teacher_names(method: Method) -> tuple[str, ...]:
    """Names of teachers in the shares of a method, or the default and those that parts read too, and of its blends."""
    found: dict[str, None] = {}
    _changed(method, lambda name, value: found.update(dict.fromkeys(value)) or value if _shares(name, value) else value)
    scored = found or ("default", *sorted(named(method, Role.READER)))
    return tuple(dict.fromkeys([*scored, *sorted(named(method, Role.BLENDED))]))


def with_more_teachers(method: Method) -> Method:
    """The method with shares for more teachers wherever teachers have shares."""
    more = {name: 2.0 + number for number, name in enumerate(MORE)}
    return _changed(method, lambda name, value: {**value, **more} if _shares(name, value) else value)


def _shares(name: str, value: Any) -> bool:
    return name == "shares" and isinstance(value, Mapping) and bool(value)


def _changed(part: Any, change: Callable[[str, Any], Any]) -> Any:
    """A part with its fields, and those of the parts within it, passed through `change`."""
    if isinstance(part, Mapping):
        inside = {key: _changed(value, change) for key, value in part.items()}
        return part if inside == dict(part) else inside
    if not is_dataclass(part) or isinstance(part, type):
        return part
    values = {f.name: getattr(part, f.name) for f in fields(part) if f.init}
    new = {name: _changed(change(name, value), change) for name, value in values.items()}
    different = {name: value for name, value in new.items() if value is not values[name] and value != values[name]}
    return replace(part, **different) if different else part


def other_settings(part: Any) -> Iterator[Any]:
    """Variants of a part with one field at another legal value, for each field, also of parts within."""
    if not is_dataclass(part) or isinstance(part, type):
        return
    for f in fields(part):
        value = getattr(part, f.name)
        for new in [*_others(value), *other_settings(value)]:
            try:
                yield replace(part, **{f.name: new})
            except OpdError:
                continue  # not a legal value


def _others(value: Any) -> list[Any]:
    match value:
        case bool():
            return [not value]
        case Enum():
            return [member for member in type(value) if member is not value]
        case int():
            return [value - 1, value + 1]
        case float():
            return [0.5 * value, 1.5 * value] if value else [0.5]
    return []
