"""Fields of kinds and of their answers in a frame: sizes and numbers first, then the arrays back to back.

What a field is follows from its declaration (`opd.types.columns`) alone, so a new kind of scores needs no code here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from opd.errors import DataError
from opd.types import RemoteRows
from opd.types.columns import Column, Scalar

DIGEST_BYTES = 16
INT, FLOAT, NUMBER = (np.dtype(name) for name in ("<i4", "<f4", "<i8"))
LARGEST = 2**32 - 1  # of an axis
STATES = {2: np.dtype("<u2"), 4: np.dtype("<f4")}  # hidden states, by the bytes of a number: bfloat16 or float32


class FrameError(DataError):
    """Bytes that are no whole, undamaged frame."""


class TooDeep(DataError):
    """A request for more log-probabilities per token than the limit."""


class Body:
    """Reads arrays one after the other, and insists that nothing is missing and nothing is left."""

    def __init__(self, frame: bytes, start: int) -> None:
        self._frame, self._at, self._end = frame, start, len(frame) - DIGEST_BYTES

    def take(self, sizes: Sequence[int], dtype: np.dtype, *, own: bool = False) -> list[np.ndarray]:
        """Arrays of `sizes` elements, as read-only views; as copies that may be written with `own`."""
        bounds = list(accumulate(sizes, initial=0))
        stop = self._at + bounds[-1] * dtype.itemsize
        if stop > self._end:
            raise FrameError("the frame is shorter than its table says; send it again")
        flat = np.frombuffer(self._frame, dtype, bounds[-1], self._at)
        self._at = stop
        flat = flat.copy() if own else flat
        return [flat[a:b] for a, b in pairwise(bounds)]

    def end(self) -> None:
        """Raise `FrameError` if bytes are left."""
        if self._at != self._end:
            raise FrameError(f"the frame has {self._end - self._at} bytes more than its table says; send it again")


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldGroup:
    """The declared fields of one kind, or of one answer, about `tokens` tokens."""

    fields: Sequence[Column | Scalar]
    tokens: int

    @property
    def numbers(self) -> int:
        """Count of the sizes and numbers that describe the fields: axes of columns, of hidden states the bytes, too."""
        return sum(len(f.axes) + f.remote if isinstance(f, Column) else 1 for f in self.fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Field values as they stand in a frame."""

    numbers: Sequence[int]
    arrays: Sequence[np.ndarray]
    states: Sequence[np.ndarray]


def pack(fields: Sequence[Column | Scalar], value: Any) -> Packed:
    """The `fields` of a kind or of an answer; hidden states must be rows of arrays in this process."""
    numbers, arrays, states = list[int](), list[np.ndarray](), list[np.ndarray]()
    for field in fields:
        given = getattr(value, field.name)
        if isinstance(field, Scalar):
            numbers.append(given if field.kind is int else int(np.array(given, "<f8").view(NUMBER)))
        elif field.remote:
            assert isinstance(given, RemoteRows)
            rows = np.concatenate([array[rows] for array, rows in given.pieces])
            states.append(np.ascontiguousarray(rows, dtype=rows.dtype.newbyteorder("<")))
            numbers += [*rows.shape[1:], rows.dtype.itemsize]
        else:
            arrays.append(np.ascontiguousarray(given, dtype=field.dtype))
            numbers += arrays[-1].shape[1:]
    return Packed(numbers=numbers, arrays=arrays, states=states)


def laid_out(packed: Sequence[Packed]) -> Iterator[np.ndarray]:
    """All arrays in the order of a frame: int32, float32, hidden states."""
    for dtype in (INT, FLOAT):
        yield from (array for one in packed for array in one.arrays if array.dtype == dtype)
    yield from (array for one in packed for array in one.states)


def unpack(
    body: Body, numbers: np.ndarray, groups: Sequence[FieldGroup], *, deepest: int = LARGEST, own: bool = False
) -> list[dict[str, Any]]:
    """The values of all groups, by name of their fields. Raises `FrameError`, or `TooDeep` where a row is longer."""
    left = iter(numbers.tolist())
    values: list[dict[str, Any]] = [{} for _ in groups]
    shapes: list[tuple[dict[str, Any], str, tuple[int, ...], np.dtype, bool]] = []
    for group, found in zip(groups, values, strict=True):
        for field in group.fields:
            if isinstance(field, Scalar):
                number = next(left)
                found[field.name] = number if field.kind is int else float(np.array(number, NUMBER).view("<f8"))
                continue
            sizes = [_size(next(left), deepest) for _ in field.axes]
            dtype = _states(next(left)) if field.remote else field.dtype
            shapes.append((found, field.name, (group.tokens, *sizes), dtype, field.remote))
    for wanted in (INT, FLOAT):
        some = [shape for shape in shapes if shape[3] == wanted and not shape[4]]
        flat = body.take([_count(shape) for _, _, shape, _, _ in some], wanted, own=own)
        for (found, name, shape, _, _), array in zip(some, flat, strict=True):
            found[name] = array.reshape(shape)
    for found, name, shape, dtype, remote in shapes:
        if remote:
            (rows,) = body.take([_count(shape)], dtype)
            found[name] = RemoteRows(pieces=((rows.reshape(shape), np.arange(shape[0])),))
    return values


def field_bytes(fields: Sequence[Column], axes: Mapping[str, int], tokens: int, hidden_bytes: int) -> int:
    """Bytes of an answer's columns in a frame, where a hidden state has `hidden_bytes`."""
    numbers = FieldGroup(fields=fields, tokens=tokens).numbers * NUMBER.itemsize
    rows = [f.dtype.itemsize * _count([axes[axis] for axis in f.axes]) for f in fields if not f.remote]
    return numbers + tokens * (sum(rows) + hidden_bytes * sum(f.remote for f in fields))


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:  # of any size: a product of numpy's would wrap around
        count *= size
    return count


def _size(size: int, deepest: int) -> int:
    if not 1 <= size <= LARGEST:
        raise FrameError(f"the frame has {size} numbers per token; use client and server of one version")
    if size > deepest:
        raise TooDeep(f"a request asks for {size} log-probabilities per token, but {deepest} are allowed; lower k")
    return size


def _states(itemsize: int) -> np.dtype:
    if itemsize not in STATES:
        raise FrameError("the frame's hidden states are neither float32 nor bfloat16; use the server of this version")
    return STATES[itemsize]
