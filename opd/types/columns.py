"""Columns: the per-token arrays of a frozen dataclass, as its annotations describe them."""

from dataclasses import dataclass, fields
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np

from opd.errors import ConfigurationError
from opd.types.remote_rows import RemoteRows

TOKENS = "T"  # the name of the first axis of every array that travels


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """An array with one row per token: field `name`, float32 or int32 where it travels.

    `axes` names what follows the token axis (`("K",)` of `"T K"`). Of a `remote` column the rows may be held elsewhere
    (`RemoteRows`). Example: `columns(TopKScores)[1] == Column(name="topk_ids", dtype=np.dtype("<i4"), axes=("K",))`.
    """

    name: str
    dtype: np.dtype
    axes: tuple[str, ...] = ()
    remote: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Scalar:
    """A single number: field `name`, an int64 or a float64 where it travels."""

    name: str
    kind: type[int] | type[float]


@cache
def columns(cls: type) -> tuple[Column, ...]:
    """The columns of a dataclass of arrays (`opd.types.Scores`), in the order of its fields.

    Raises:
        ConfigurationError: a field is no array over tokens.
    """
    found = fields_that_travel(cls)
    wrong = next((field for field in found if not isinstance(field, Column)), None)
    if wrong is not None:
        raise _strange(cls, wrong.name, "a number, but every field of scores is an array")
    return tuple(field for field in found if isinstance(field, Column))


@cache
def fields_that_travel(cls: type) -> tuple[Column | Scalar, ...]:
    """All fields of a dataclass, each as a column or as a number.

    Raises:
        ConfigurationError: a field is neither.
    """
    hints = get_type_hints(cls)
    return tuple(_field(cls, spec.name, hints[spec.name]) for spec in fields(cls))


def _field(cls: type, name: str, hint: Any) -> Column | Scalar:
    if hint is int or hint is float:
        return Scalar(name=name, kind=hint)
    choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    arrays = [choice for choice in choices if choice is not RemoteRows]
    dims, dtypes = (getattr(arrays[0] if arrays else hint, what, None) for what in ("dim_str", "dtypes"))
    if dims is None or dtypes is None:
        raise _strange(cls, name, f"of type {hint}")
    first, *axes = dims.split()
    if first != TOKENS or not all(axis.isidentifier() for axis in axes):
        raise _strange(cls, name, f"an array over {dims!r}")
    if "float32" not in dtypes and "int32" not in dtypes:
        raise _strange(cls, name, f"an array of {dtypes}")
    dtype = np.dtype("<f4" if "float32" in dtypes else "<i4")
    return Column(name=name, dtype=dtype, axes=tuple(axes), remote=len(arrays) < len(choices))


def _strange(cls: type, name: str, found: str) -> ConfigurationError:
    return ConfigurationError(
        f"{cls.__module__}.{cls.__qualname__}.{name} is {found}, which cannot travel to or from a teacher; declare a "
        'float32 or int32 array over tokens such as Float[np.ndarray, "T K"] (or, in a score kind, an int or a float)'
    )
