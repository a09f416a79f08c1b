"""Chunks of weights in memory that processes of one machine share, without a copy.

The memory is an anonymous file (`memfd_create`) that other processes open through `/proc`, so it has no name that a
crash could leave behind: the kernel frees it with the last process that holds it. It is not bounded by /dev/shm, which
containers make small. Readers must run as the same user and see the writer's process (one PID namespace).
"""

import mmap
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from opd.errors import DataError
from opd.ports import Fill


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedMemorySegment:
    """`nbytes` bytes in the file `descriptor` of process `pid` on the machine `place`; `inode` identifies it."""

    place: str
    pid: int
    descriptor: int
    inode: int
    nbytes: int


@cache
def place() -> str:
    """Identity of a place where processes can share memory: the machine since its start, and the PID namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


@dataclass(slots=True)
class _HostBuffer:
    descriptor: int
    array: UInt8[np.ndarray, " _nbytes"]
    segment: SharedMemorySegment


@dataclass(slots=True)
class SharedMemorySender:
    """An `opd.ports.WeightSender` whose chunks are read in place.

    Two turns take turns in the same memory, because fresh memory costs as much as the copy: a receiver that still
    reads the turn before last finds other bytes, which the digests show.
    """

    _rooms: dict[tuple[int, int], _HostBuffer] = field(default_factory=dict)

    def put(self, turn: int, number: int, nbytes: int, fill: Fill) -> SharedMemorySegment:
        """See `opd.ports.WeightSender`."""
        key = (turn % 2, number)
        room = self._rooms.get(key)
        if room is None or room.segment.nbytes != nbytes:
            self._drop(key)
            room = self._rooms[key] = _make(nbytes)
        fill(room.array)
        return room.segment

    def close(self) -> None:
        """Release all memory; receivers that have mapped it keep it until they are done."""
        for key in tuple(self._rooms):
            self._drop(key)

    def _drop(self, key: tuple[int, int]) -> None:
        room = self._rooms.pop(key, None)
        if room is not None:
            os.close(room.descriptor)


def _make(nbytes: int) -> _HostBuffer:
    descriptor = os.memfd_create("opd-weights", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, max(1, nbytes))
    array = np.frombuffer(mmap.mmap(descriptor, max(1, nbytes)), dtype=np.uint8)[:nbytes]
    inode = os.fstat(descriptor).st_ino
    segment = SharedMemorySegment(place=place(), pid=os.getpid(), descriptor=descriptor, inode=inode, nbytes=nbytes)
    return _HostBuffer(descriptor, array, segment)


def read(segment: SharedMemorySegment) -> UInt8[np.ndarray, " nbytes"]:
    """The bytes behind a segment, as a read-only view of the shared memory.

    Raises:
        DataError: this process is on another machine, or the one that wrote has ended.
    """
    if segment.place != place():
        raise DataError(
            "shared memory needs learner and receiver on one machine, but they are on different ones (or in different "
            "containers); set learner.transport=OBJECT_STORE"
        )
    try:
        about = os.stat(_path(segment))
        if (about.st_ino, about.st_size) != (segment.inode, max(1, segment.nbytes)):
            raise DataError(
                f"the shared memory of process {segment.pid} is not the one that was published; publish again"
            )
        view = _mapped.get(segment)
        if view is None:
            _forget_the_dead()
            view = _mapped[segment] = _map(segment)
    except OSError as error:
        _forget_the_dead()
        raise DataError(
            f"the shared memory of process {segment.pid} cannot be opened ({error.strerror}): the learner has ended, "
            "or runs as another user; publish again"
        ) from error
    return view


# Mapping anew costs more than reading, because the kernel is asked for every page again; turns use few segments.
_mapped: dict[SharedMemorySegment, UInt8[np.ndarray, " _nbytes"]] = {}


def _path(segment: SharedMemorySegment) -> str:
    return f"/proc/{segment.pid}/fd/{segment.descriptor}"


def _map(segment: SharedMemorySegment) -> UInt8[np.ndarray, " nbytes"]:
    descriptor = os.open(_path(segment), os.O_RDONLY)
    try:
        view = mmap.mmap(descriptor, max(1, segment.nbytes), prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)
    return np.frombuffer(view, dtype=np.uint8)[: segment.nbytes]


def _forget_the_dead() -> None:
    """Unmap memory whose writer is gone, so that a learner that is started again does not double it."""
    for segment in tuple(_mapped):
        if not _is_kept(segment):
            _mapped.pop(segment, None)


def _is_kept(segment: SharedMemorySegment) -> bool:
    """Whether its writer still holds it. The number of a closed descriptor is soon another file's."""
    try:
        return os.stat(_path(segment)).st_ino == segment.inode
    except OSError:
        return False
