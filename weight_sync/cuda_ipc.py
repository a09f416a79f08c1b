"""Chunks of weights in a GPU's memory, read in place by other processes on the same GPU (CUDA IPC).

The handle of a piece of device memory is what torch's own reductions make of it, but as plain values in a dataclass:
nothing is pickled that could run code when it is read. Not run on a GPU by this project so far (docs/publishing.md).
"""

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from opd.errors import ConfigurationError, DataError
from opd.ports import Fill
from weight_sync.shared_memory import place


@dataclass(slots=True)
class DeviceBuffers:
    """Double-buffered memory on `device` for chunks, as in `weight_sync.shared_memory`."""

    device: torch.device
    _rooms: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def room(self, turn: int, number: int, nbytes: int) -> UInt8[Tensor, " nbytes"]:
        """Memory of chunk `number` of turn `turn`; the same memory again two turns later, if the size is the same."""
        key = (turn % 2, number)
        found = self._rooms.get(key)
        if found is None or len(found) != nbytes:
            found = self._rooms[key] = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaIpcSegment:
    """`nbytes` bytes on the GPU with the id `gpu`, made by process `pid` on the machine `place`.

    The rest names the memory to CUDA and torch: an allocation's IPC handle, the storage within it, torch's counter of
    readers, and the event after which the storage may be read.
    """

    place: str
    pid: int
    gpu: str
    nbytes: int
    handle: bytes
    storage_nbytes: int
    storage_offset: int
    counter: bytes
    counter_offset: int
    event: bytes
    event_needed: bool


class CudaIpcSender:
    """An `opd.ports.WeightSender` whose chunks are read where they were written, on the learner's own GPU."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ConfigurationError(
                "learner.transport=CUDA_IPC needs a GPU that learner and engine share, but the learner sees none; set "
                "cluster.gpus_per_learner, or learner.transport=SHARED_MEMORY"
            )
        self._rooms = DeviceBuffers(torch.device("cuda", torch.cuda.current_device()))
        self._segments: dict[int, CudaIpcSegment] = {}  # by address: rooms are used again, and so are their handles

    def put(self, turn: int, number: int, nbytes: int, fill: Fill) -> CudaIpcSegment:
        """See `opd.ports.WeightSender`; the filled chunk is complete when this returns."""
        room = self._rooms.room(turn, number, nbytes)
        fill(room)
        torch.cuda.synchronize(room.device)
        known = self._segments.get(room.data_ptr())
        if known is None or known.nbytes != nbytes:
            known = self._segments[room.data_ptr()] = _exported(room)
        return known


def _exported(room: UInt8[Tensor, " nbytes"]) -> CudaIpcSegment:
    _, handle, nbytes, offset, counter, counter_offset, event, needed = room.untyped_storage()._share_cuda_()
    return CudaIpcSegment(
        place=place(),
        pid=os.getpid(),
        gpu=_gpu(),
        nbytes=len(room),
        handle=handle,
        storage_nbytes=nbytes,
        storage_offset=offset,
        counter=counter,
        counter_offset=counter_offset,
        event=event,
        event_needed=needed,
    )


def _gpu() -> str:
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def read_device(segment: CudaIpcSegment) -> UInt8[Tensor, " nbytes"]:
    """Bytes of a segment, as a view of the learner's memory that must not be written.

    Raises:
        DataError: this process is on another machine or GPU, or the one that wrote has ended.
    """
    if segment.place != place():
        raise DataError(
            "CUDA IPC needs learner and receiver on one machine, but they are on different ones (or in different "
            "containers); set learner.transport=NCCL or OBJECT_STORE"
        )
    if not torch.cuda.is_available() or _gpu() != segment.gpu:
        have = _gpu() if torch.cuda.is_available() else "none"
        raise DataError(
            f"CUDA IPC needs learner and receiver on one GPU, but the learner's is {segment.gpu} and the receiver's "
            f"{have}; set learner.transport=NCCL or OBJECT_STORE"
        )
    with _opening:  # chunks are read by several threads
        for other in [s for s in _opened if not _alive(s)]:
            del _opened[other]
        if not _alive(segment):
            raise DataError(f"the GPU memory of process {segment.pid} is gone: the learner has ended; publish again")
        if segment not in _opened:
            _opened[segment] = _open(segment)
        return _opened[segment]


_opening = threading.Lock()
# torch counts one reader per opening, and opening costs a call into the driver: once per segment, not once per turn.
_opened: dict[CudaIpcSegment, UInt8[Tensor, " _nbytes"]] = {}


def _alive(segment: CudaIpcSegment) -> bool:
    return Path(f"/proc/{segment.pid}").exists()


def _open(segment: CudaIpcSegment) -> UInt8[Tensor, " nbytes"]:
    torch.cuda.init()
    storage = torch.UntypedStorage._new_shared_cuda(
        torch.cuda.current_device(),
        segment.handle,
        segment.storage_nbytes,
        segment.storage_offset,
        segment.counter,
        segment.counter_offset,
        segment.event,
        segment.event_needed,
    )
    device = torch.device("cuda", torch.cuda.current_device())
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)[: segment.nbytes]  # type: ignore[call-overload]
