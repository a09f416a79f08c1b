"""A model's parameters as one flat byte buffer."""

from collections.abc import Sequence

import numpy as np
import torch
import xxhash
from jaxtyping import UInt8
from torch import Tensor

from opd.manifest import unpack
from opd.ports import Manifest


class Publisher:
    """Packs parameters into one buffer that is allocated once; whoever keeps its bytes must copy them.

    Wide dtypes lie first, so that every tensor starts at a multiple of its item size.
    """

    def __init__(
        self,
        names: Sequence[str],
        shapes: Sequence[Sequence[int]],
        dtypes: Sequence[torch.dtype],
        *,
        pin: bool,
    ) -> None:
        order = sorted(range(len(names)), key=lambda i: -dtypes[i].itemsize)
        sizes = {i: int(np.prod(shapes[i], dtype=np.int64)) * dtypes[i].itemsize for i in order}
        self.order = order
        self.manifest = Manifest(
            names=tuple(names[i] for i in order),
            dtypes=tuple(str(dtypes[i]).removeprefix("torch.") for i in order),
            shapes=tuple(tuple(shapes[i]) for i in order),
            nbytes=sum(sizes.values()),
        )
        self._bytes = torch.empty(self.manifest.nbytes, dtype=torch.uint8, pin_memory=pin)
        self._views = [tensor for _, tensor in unpack(self.manifest, self._bytes)]

    @property
    def buffer(self) -> UInt8[np.ndarray, " nbytes"]:
        """The bytes as they are now (no copy)."""
        return self._bytes.numpy()

    @property
    def state(self) -> dict[str, Tensor]:
        """Name -> tensor, as views into the buffer."""
        return dict(zip(self.manifest.names, self._views, strict=True))

    def write(self, start: int, tensors: Sequence[Tensor]) -> None:
        """Copy `tensors` to places `start, start + 1, ...` of the manifest's order."""
        views = self._views[start : start + len(tensors)]
        torch._foreach_copy_(views, list(tensors), non_blocking=True)  # pyright: ignore[reportPrivateImportUsage]

    def digest(self) -> str:
        """xxh3_64 of the buffer, hexadecimal. Waits for copies from a GPU first."""
        if self._bytes.is_pinned():
            torch.cuda.synchronize()
        return xxhash.xxh3_64_hexdigest(self.buffer.data)
