"""Kinds of scores that a process reads from the wire: the project's own, and classes that its configuration names."""

from collections.abc import Mapping, Sequence
from functools import cache

import xxhash

from opd.errors import ConfigurationError
from opd.ports import ScoreKind
from opd.ports.score_kinds import BUILT_IN
from opd.settings.own_modules import own_module
from opd.types import Scores
from opd.types.columns import fields_that_travel

KindClass = type[ScoreKind[Scores]]
KnownKinds = Mapping[int, KindClass]
"""Kinds by `wire_code`."""


@cache
def wire_code(kind: KindClass) -> int:
    """The number of a kind in a frame: the low 32 bits of xxh3-64 of its name."""
    return xxhash.xxh3_64_intdigest(kind.wire_name().encode()) & 0xFFFFFFFF


def known_kinds(paths: Sequence[str] = ()) -> KnownKinds:
    """The project's kinds and those at `paths` (`module.Class`), which are imported.

    Raises:
        ConfigurationError: a path names no kind of scores that can travel, or two have one name or number.
    """
    found: dict[int, KindClass] = {}
    for kind in dict.fromkeys([*BUILT_IN, *map(_imported, paths)]):
        fields_that_travel(kind)
        kind.columns()
        other = found.setdefault(wire_code(kind), kind)
        if other is not kind:
            raise ConfigurationError(
                f"teacher.score_kinds: {kind.__qualname__} and {other.__qualname__} are both called "
                f"{kind.wire_name()!r} on the wire, or have one number there; give one of them another `wire`"
            )
    return found


def _imported(path: str) -> KindClass:
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(own_module(module), name)
    except Exception as error:  # a user's module may raise anything
        raise ConfigurationError(
            f"teacher.score_kinds names {path!r}, which cannot be imported ({type(error).__name__}: {error}); "
            "correct the path, or add its folder to PYTHONPATH"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, ScoreKind)):
        raise ConfigurationError(
            f"teacher.score_kinds names {path!r}, which is no kind of scores; name a frozen dataclass that derives "
            "from opd.ports.ScoreKind"
        )
    return kind


OWN_KINDS: KnownKinds = known_kinds()
"""The kinds of the project."""
