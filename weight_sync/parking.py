"""Parking of tensors: their bytes wait in host memory or in a file, and come back bit for bit.

A tensor stays the object it is, and so does every view of it; only its memory is given back meanwhile. What reads a
parked tensor finds nothing of use, so its owner must refuse all work meanwhile.
"""

import ctypes
import gc
import mmap
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@dataclass(frozen=True, slots=True)
class _Pages:
    """Whole pages of a storage in the memory of this host."""

    storage: torch.UntypedStorage  # held, so that no other gets its memory
    start: int
    nbytes: int

    @classmethod
    def of(cls, storage: torch.UntypedStorage) -> "_Pages":
        start, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        return cls(storage, first, max(0, end // mmap.PAGESIZE * mmap.PAGESIZE - first))

    def view(self) -> memoryview:
        return memoryview((ctypes.c_char * self.nbytes).from_address(self.start)).cast("B")

    def release(self) -> None:
        """Give the pages back to the system: their addresses stay, and would read as zeros."""
        if self.nbytes and _LIBC.madvise(self.start, self.nbytes, mmap.MADV_DONTNEED):
            raise OSError(ctypes.get_errno(), f"the system does not take {self.nbytes} bytes of a parked tensor back")


@dataclass(slots=True)
class Parked:
    """Storages that are parked: those of a GPU in pinned host memory, the whole pages of others in a file."""

    nbytes: int
    _on_gpu: list[tuple[torch.UntypedStorage, Tensor]]
    _pages: list[_Pages]
    _file: IO[bytes]

    def unpark(self, *, again: bool = False) -> None:
        """Give every storage its memory and its bytes again; with `again` the copies are kept for `park_again`."""
        for storage, kept in self._on_gpu:
            storage.resize_(len(kept))
            _bytes(storage).copy_(kept)
        self._file.seek(0)
        for pages in self._pages:
            if self._file.readinto(pages.view()) != pages.nbytes:  # type: ignore[attr-defined]
                raise OSError(f"a file with {self.nbytes} bytes of parked tensors has lost some")
        if not again:
            self._file.close()

    def park_again(self) -> None:
        """Park what `unpark(again=True)` gave back, unchanged since: nothing is copied."""
        self._release()

    def _release(self) -> None:
        for pages in self._pages:
            pages.release()
        for storage, _ in self._on_gpu:
            storage.resize_(0)
        if self._on_gpu:
            torch.cuda.empty_cache()


def park(tensors: Iterable[Tensor]) -> Parked:
    """Park the storages of `tensors`, each once. All are copied before the first one gives its memory back."""
    storages = list(_storages(tensors))
    pages = [_Pages.of(storage) for storage in storages if storage.device.type == "cpu"]
    on_gpu = [(storage, _copied(storage)) for storage in storages if storage.device.type != "cpu"]
    file = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `unpark`, or with its owner)
    for one in pages:
        file.write(one.view())
    file.flush()
    parked = Parked(sum(one.nbytes for one in pages) + sum(len(kept) for _, kept in on_gpu), on_gpu, pages, file)
    parked._release()
    return parked


def discard(tensors: Iterable[Tensor]) -> None:
    """Give the memory of `tensors` on this host back without their bytes: it is there again, as zeros, when it is used.

    What they share a storage with is lost, too.
    """
    for storage in _storages(tensors):
        if storage.device.type == "cpu":
            _Pages.of(storage).release()


def trim() -> None:
    """Give memory back to the system that was freed here and is kept for later."""
    gc.collect()
    _LIBC.malloc_trim(0)


def tensors_in(part: Any, seen: dict[int, Any] | None = None) -> Iterator[Tensor]:
    """Every tensor that a part holds in its attributes, sequences and mappings, at any depth, and its gradient.

    Attributes are followed in objects of torch and DeepSpeed alone.
    """
    seen = {} if seen is None else seen
    if id(part) in seen:
        return
    seen[id(part)] = part  # kept, so that no other gets its id
    if isinstance(part, Tensor):
        yield part.data
        if part.is_leaf and part.grad is not None:
            yield part.grad.data
    elif isinstance(part, Mapping):
        for value in list(part.values()):
            yield from tensors_in(value, seen)
    elif isinstance(part, Sequence) and not isinstance(part, str | bytes | range):
        for value in part:
            yield from tensors_in(value, seen)
    elif type(part).__module__.partition(".")[0] in ("torch", "deepspeed") and hasattr(part, "__dict__"):
        yield from tensors_in(vars(part), seen)


def _storages(tensors: Iterable[Tensor]) -> Iterator[torch.UntypedStorage]:
    seen = set[tuple[str, int]]()
    for tensor in tensors:
        storage = tensor.untyped_storage()
        where = str(storage.device), storage.data_ptr()
        if storage.nbytes() and storage.device.type in ("cpu", "cuda") and where not in seen:
            seen.add(where)
            yield storage


def _copied(storage: torch.UntypedStorage) -> Tensor:
    kept = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=True)
    return kept.copy_(_bytes(storage))


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))
