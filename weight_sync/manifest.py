"""Layout of a model's parameters as bytes: sizes, chunk boundaries, contents of a chunk, and digests."""

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import xxhash
from jaxtyping import UInt8
from torch import Tensor

from opd.errors import DataError
from opd.ports import Manifest
from weight_sync.checksum import checksum


def sizes(manifest: Manifest) -> list[int]:
    """Bytes of every parameter, in order.

    Raises:
        DataError: its lists differ in length, it names a dtype that torch does not have, or the sum is not `nbytes`.
    """
    if not len(manifest.names) == len(manifest.dtypes) == len(manifest.shapes):
        raise DataError(
            f"a weights manifest lists {len(manifest.names)} names, {len(manifest.dtypes)} dtypes and "
            f"{len(manifest.shapes)} shapes; check how the learner packs its parameters"
        )
    each = [nbytes(*entry) for entry in zip(manifest.dtypes, manifest.shapes, strict=True)]
    if sum(each) != manifest.nbytes:
        raise DataError(
            f"a weights manifest lists {len(each)} tensors of {sum(each)} bytes but says {manifest.nbytes}; check how "
            "the learner packs its parameters"
        )
    return each


def cut(manifest: Manifest, most: int) -> list[tuple[int, int]]:
    """Runs `(first, last)` of parameters, each of at most `most` bytes; a larger parameter is a run of its own."""
    return runs(sizes(manifest), most)


def runs(sizes: Iterable[int], most: int) -> list[tuple[int, int]]:
    """Runs `(first, last)` of neighbors whose sizes add up to at most `most`; a larger one is a run of its own."""
    found: list[tuple[int, int]] = []
    start = held = i = 0
    for i, size in enumerate(sizes, 1):
        if i - 1 > start and held + size > most:
            found.append((start, i - 1))
            start, held = i - 1, 0
        held += size
    return [*found, (start, i)]


def unpack(manifest: Manifest, first: int, last: int, buffer: Tensor | np.ndarray) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the parameters `first` .. `last - 1`, as views into their bytes.

    Raises:
        DataError: the buffer has another size than the manifest says.
    """
    flat = torch.from_numpy(buffer) if isinstance(buffer, np.ndarray) else buffer
    each = [nbytes(*e) for e in zip(manifest.dtypes[first:last], manifest.shapes[first:last], strict=True)]
    if len(flat) != sum(each):
        raise DataError(
            f"parameters {first} to {last - 1} need the {sum(each)} bytes of their manifest, but there are "
            f"{len(flat)}; publish again"
        )
    start = 0
    for i, size in zip(range(first, last), each, strict=True):
        kind = _kind(manifest.dtypes[i])
        part = flat[start : start + size]
        if start % kind.itemsize:  # mixed dtypes: this one does not begin where its words could
            part = part.clone()
        yield manifest.names[i], part.view(kind).view(manifest.shapes[i])
        start += size


def flat_bytes(array: np.ndarray) -> UInt8[np.ndarray, " nbytes"]:
    """The array's bytes, without a copy where they lie together."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def digest(data: np.ndarray | Tensor) -> str:
    """Digest of bytes: xxh3_64 (hexadecimal) of an array in host memory, `checksum` of a tensor on its device."""
    return checksum(data) if isinstance(data, Tensor) else xxhash.xxh3_64_hexdigest(flat_bytes(data).data)


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor. Raises `DataError` for a dtype that torch does not have."""
    return math.prod(shape) * _kind(dtype).itemsize


def _kind(name: str) -> torch.dtype:
    kind = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(kind, torch.dtype):
        raise DataError(f"a weights manifest names the dtype {name!r}, which torch does not have; check the learner")
    return kind
