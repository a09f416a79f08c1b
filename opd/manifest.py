"""A model's parameters in a flat byte buffer: is it what the learner sent, and what lies in it?"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import xxhash
from torch import Tensor

from opd.errors import DataError
from opd.ports import Manifest, Weights


def checked(weights: Weights, array: np.ndarray, who: str) -> Tensor:
    """The buffer as a uint8 tensor `[nbytes]`, once it is certain to be what the learner sent.

    Raises:
        DataError: before anything is loaded, in the name of `who`: wrong length, wrong digest, or a manifest that does
            not add up.
    """
    who = f"{who} refuses weights version {weights.version} and keeps its own"
    buffer = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    manifest = weights.manifest
    if buffer.nbytes != manifest.nbytes:
        raise DataError(f"{who}: the manifest says {manifest.nbytes} bytes, but {buffer.nbytes} came; publish again")
    expected = sum(nbytes(*entry) for entry in zip(manifest.dtypes, manifest.shapes, strict=True))
    if expected != manifest.nbytes or len(manifest.names) != len(manifest.shapes):
        raise DataError(
            f"{who}: its manifest lists {len(manifest.names)} tensors of {expected} bytes but says {manifest.nbytes}; "
            "check how the learner packs its parameters"
        )
    digest = xxhash.xxh3_64_hexdigest(buffer.data)
    if digest != weights.digest:
        raise DataError(
            f"{who}: the buffer's xxh3_64 is {digest}, not {weights.digest} as sent; it was damaged on the way, "
            "publish again"
        )
    return torch.from_numpy(buffer)


def unpack(manifest: Manifest, buffer: Tensor | np.ndarray) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors, as views into the buffer of bytes.

    Raises:
        DataError: the buffer has another size than the manifest says.
    """
    flat = torch.from_numpy(buffer) if isinstance(buffer, np.ndarray) else buffer
    if len(flat) != manifest.nbytes:
        raise DataError(
            f"weights need the {manifest.nbytes} bytes of their manifest, but there are {len(flat)}; publish again"
        )
    start = 0
    for name, dtype, shape in zip(manifest.names, manifest.dtypes, manifest.shapes, strict=True):
        kind = _kind(dtype)
        stop = start + nbytes(dtype, shape)
        part = flat[start:stop]
        if start % kind.itemsize:  # mixed dtypes: this one does not begin where its words could
            part = part.clone()
        yield name, part.view(kind).view(*shape)
        start = stop


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor. Raises `DataError` for a dtype that torch does not have."""
    return math.prod(shape) * _kind(dtype).itemsize


def _kind(name: str) -> torch.dtype:
    kind = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(kind, torch.dtype):
        raise DataError(f"a weights manifest names the dtype {name!r}, which torch does not have; check the learner")
    return kind
