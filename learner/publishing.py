"""A model's parameters in chunks, each laid out by the rank that owns it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from learner.config import STREAMED
from opd.ports import Fill, Manifest, WeightChunk, WeightSender
from weight_sync.manifest import cut, digest, nbytes


class Publisher:
    """Layout of the chunks that rank `rank` of `ranks` owns into `sender`: every `ranks`-th of `chunk_bytes` or less.

    Wide dtypes lie first, so that every tensor starts at a multiple of its item size.
    """

    def __init__(
        self,
        names: Sequence[str],
        shapes: Sequence[Sequence[int]],
        dtypes: Sequence[torch.dtype],
        *,
        chunk_bytes: int,
        rank: int,
        ranks: int,
        sender: WeightSender,
        lora_scale: float = 0.0,
    ) -> None:
        self.order = sorted(range(len(names)), key=lambda i: -dtypes[i].itemsize)
        kinds = tuple(str(dtypes[i]).removeprefix("torch.") for i in self.order)
        sides = tuple(tuple(shapes[i]) for i in self.order)
        self.manifest = Manifest(
            names=tuple(names[i] for i in self.order),
            dtypes=kinds,
            shapes=sides,
            nbytes=sum(nbytes(kind, shape) for kind, shape in zip(kinds, sides, strict=True)),
            lora_scale=lora_scale,
        )
        self.runs = cut(self.manifest, chunk_bytes)
        self._rank, self._ranks, self._sender, self._turn = rank, ranks, sender, 0

    def chunks(self, whole: Callable[[int, int], Any]) -> tuple[WeightChunk, ...]:
        """This rank's chunks of the current weights; all ranks must call.

        `whole(first, last)` is a context in which those parameters (in the manifest's order) are complete on this
        rank; it is entered for every chunk, because making parameters whole may take all ranks.
        """
        self._turn += 1
        return tuple(self._own(whole))

    def _own(self, whole: Callable[[int, int], Any]) -> Iterator[WeightChunk]:
        for number, (first, last) in enumerate(self.runs):
            with whole(first, last) as tensors:
                if number % self._ranks == self._rank:
                    yield self._lay(number, first, last, tensors)

    def _lay(self, number: int, first: int, last: int, tensors: Sequence[Tensor]) -> WeightChunk:
        seal = ""

        def fill(room: np.ndarray | Tensor) -> None:
            nonlocal seal
            if isinstance(room, Tensor):
                seal = _copy_where_it_is(tensors, room)
                return
            copy = _copy_from_gpu if tensors[0].is_cuda else _copy
            seal = copy(tensors, torch.from_numpy(room))

        entries = zip(self.manifest.dtypes[first:last], self.manifest.shapes[first:last], strict=True)
        size = sum(nbytes(*entry) for entry in entries)
        handle = self._sender.put(self._turn, number, size, fill)
        return WeightChunk(first=first, last=last, nbytes=size, digest=seal, owner=self._rank, handle=handle)


def _copy(tensors: Sequence[Tensor], room: Tensor) -> str:
    """Lay the tensors' bytes one after the other; the digest of all.

    What is digested is the source, piece by piece just after it was copied, while the cache still has it; the copy was
    written past the caches (`learner.config.STREAMED`). A copy that went wrong is found by the receivers.
    """
    hasher, target, start = xxhash.xxh3_64(), room.numpy(), 0
    for tensor in tensors:
        flat = tensor.detach().reshape(-1).view(torch.uint8).numpy()
        for at in range(0, len(flat), STREAMED):
            piece = flat[at : at + STREAMED]
            np.copyto(target[start : start + len(piece)], piece)
            hasher.update(piece.data)
            start += len(piece)
    return hasher.hexdigest()


def _copy_from_gpu(tensors: Sequence[Tensor], room: Tensor) -> str:
    """The same, all copies under way at once."""
    start = 0
    for tensor in tensors:
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        room[start : start + len(flat)].copy_(flat, non_blocking=True)
        start += len(flat)
    torch.cuda.synchronize()  # the last byte must be there before it is counted
    return digest(room.numpy())


def _copy_where_it_is(tensors: Sequence[Tensor], room: Tensor) -> str:
    """The same, without a byte leaving the device; the digest is `weight_sync.checksum`."""
    flat = [tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors]
    torch.cat(flat, out=room)
    return digest(room)


class StagedSender:
    """Sender (`opd.ports.WeightSender`) with one buffer, whose bytes `store` must copy: it is used again."""

    def __init__(self, store: Callable[[np.ndarray], Any]) -> None:
        self._store = store
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def put(self, turn: int, number: int, nbytes: int, fill: Fill) -> Any:
        """See `opd.ports.WeightSender`."""
        if len(self._buffer) < nbytes:
            # Pinned where the weights come from a GPU, which copies from nowhere else at full speed.
            self._buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=torch.cuda.is_initialized())
        array = self._buffer[:nbytes].numpy()
        fill(array)
        return self._store(array)
