"""Chunks of weights pulled from the learner's memory, each receiver when it is ready: NCCL between GPUs.

A receiver opens a connection to the rank that owns a chunk, says which chunk it wants, and gets its bytes through a
process group of the two. So a receiver that comes late, fetches again, or fails affects no other, which a broadcast to
all of them could not give. Between CPUs the same code runs over gloo.
"""

import hmac
import json
import logging
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, distributed
from torch._C._distributed_c10d import PrefixStore, TCPStore  # where torch.distributed has them from

from opd.errors import ConfigurationError, DataError, OpdError
from opd.ports import Fill
from weight_sync.cuda_ipc import DeviceBuffers
from weight_sync.rendezvous import hosted_store, own_host

_LONGEST_LINE = 4096  # bytes of a message between the two
_ERRORS = (OSError, ValueError, TypeError, KeyError, RuntimeError)  # what sockets, json and torch's groups raise


class PullBackend(Enum):
    """Transport backend of the bytes."""

    NCCL = "nccl"
    GLOO = "gloo"


@dataclass(frozen=True, slots=True, kw_only=True)
class PullHandle:
    """Handle of chunk `number` of turn `turn` on the sender at `host:port`, with its store at `store_port`.

    `deadline_s` bounds every wait for it.
    """

    host: str
    port: int
    store_port: int
    wire: PullBackend
    turn: int
    number: int
    nbytes: int
    deadline_s: float
    token: str = field(repr=False)


class PullSender:
    """Sender (`opd.ports.WeightSender`) from which receivers pull.

    Chunks lie on the learner's device; the last two turns stay.
    """

    def __init__(self, wire: PullBackend, deadline_s: float) -> None:
        self._wire, self._deadline_s, self._token = wire, deadline_s, secrets.token_hex(16)
        self._rooms = DeviceBuffers(_device(wire))
        self._filled: dict[tuple[int, int], UInt8[Tensor, " _nbytes"]] = {}
        self._served: list[tuple[socket.socket, threading.Thread]] = []
        self._host = own_host()
        self._store = hosted_store(self._host, 0, timedelta(seconds=deadline_s))
        self._listener = socket.create_server((self._host, 0))
        threading.Thread(target=self._accept, name="weights-sender", daemon=True).start()

    def put(self, turn: int, number: int, nbytes: int, fill: Fill) -> PullHandle:
        """See `opd.ports.WeightSender`; the filled chunk is complete when this returns."""
        room = self._rooms.room(turn, number, nbytes)
        self._filled.pop((turn - 2, number), None)
        fill(room)
        if room.is_cuda:
            torch.cuda.current_stream(room.device).synchronize()  # not all streams: a receiver may be at work on one
        self._filled[turn, number] = room
        return PullHandle(
            host=self._host,
            port=self._listener.getsockname()[1],
            store_port=self._store.port,
            wire=self._wire,
            turn=turn,
            number=number,
            nbytes=nbytes,
            deadline_s=self._deadline_s,
            token=self._token,
        )

    def close(self) -> None:
        """Accept no more receivers and close the links to those there are; waits for transfers under way."""
        self._listener.close()
        for connection, thread in self._served:
            with suppress(OSError):  # it is gone already
                connection.shutdown(socket.SHUT_RD)
            thread.join(self._deadline_s)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if self._listener.fileno() < 0:  # closed
                    return
                logging.getLogger(__name__).warning("no receiver of weights can connect: %s", error)
                time.sleep(1.0)
                continue
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # idle between publications
            number = len(self._served) + 1
            thread = threading.Thread(target=self._serve, args=(connection, number), name="weights-link", daemon=True)
            self._served.append((connection, thread))
            thread.start()

    def _serve(self, connection: socket.socket, number: int) -> None:
        """Serve one receiver until it leaves. It notices the end of this process by an answer that does not come."""
        with connection, connection.makefile("rwb") as lines:
            try:
                connection.settimeout(self._deadline_s)
                if not hmac.compare_digest(str(_heard(lines)["token"]), self._token):
                    return
                _say(lines, {"link": number})
                group = _group(self._wire, (self._host, self._store.port), number, 0, self._deadline_s)
                connection.settimeout(None)  # between publications there is nothing to ask for
                while request := _heard(lines):
                    room = self._filled.get((request["turn"], request["number"]))
                    _say(lines, {"nbytes": -1 if room is None else len(room)})
                    if room is not None:
                        _pass(group, room, self._deadline_s)
            except _ERRORS as error:  # the receiver failed, hung or is none of ours; the next one is served as well
                logging.getLogger(__name__).warning("a receiver of weights was lost: %s", error)


class _Link:
    """A receiver's connection to one sender, and the process group of the two."""

    def __init__(self, to: PullHandle) -> None:
        self._device = _device(to.wire)
        self._socket = socket.create_connection((to.host, to.port), timeout=to.deadline_s)
        try:
            self._lines = self._socket.makefile("rwb")
            _say(self._lines, {"token": to.token})
            number = int(_heard(self._lines)["link"])
            self._group = _group(to.wire, (to.host, to.store_port), number, 1, to.deadline_s)
        except BaseException:
            self._socket.close()
            raise

    def pull(self, handle: PullHandle) -> UInt8[Tensor, " nbytes"] | None:
        """The bytes, or None if they are not there any more."""
        _say(self._lines, {"turn": handle.turn, "number": handle.number})
        if int(_heard(self._lines)["nbytes"]) != handle.nbytes:
            return None
        room = torch.empty(handle.nbytes, dtype=torch.uint8, device=self._device)
        _pass(self._group, room, handle.deadline_s, fresh=True)
        return room

    def close(self) -> None:
        """Close the connection, so that the sender stops serving it."""
        self._socket.close()


@dataclass(slots=True)
class _Place:
    """This process's link to one sender, if it has one; the lock guards its use, creation and removal."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    link: _Link | None = None


_places: dict[str, _Place] = {}  # by token, which no two senders share


def pull(handle: PullHandle) -> UInt8[Tensor, " nbytes"]:
    """The bytes behind a handle, on this process's device. Several threads may call; a link serves one at a time.

    Raises:
        DataError: they are not there any more.
        OpdError: the learner rank that owns them has ended, or does not answer in time.
    """
    where = _places.setdefault(handle.token, _Place())
    try:
        if not where.lock.acquire(timeout=handle.deadline_s):
            raise TimeoutError("others wait for it, too")
        try:
            found = _pulled(where, handle)
        finally:
            where.lock.release()
    except torch.OutOfMemoryError as error:
        raise OpdError(
            f"chunk {handle.number} of the new weights needs {handle.nbytes} bytes on the engine's GPU, which has no "
            "room for them beside its own; lower student.gpu_memory_utilization, or set learner.transport=OBJECT_STORE"
        ) from error
    except _ERRORS as error:
        raise OpdError(
            f"chunk {handle.number} did not come from the learner rank at {handle.host}:{handle.port} within "
            f"{handle.deadline_s:.0f} s ({str(error).splitlines()[0] if str(error) else type(error).__name__}); look "
            "at its log, or raise learner.deadline_s"
        ) from error
    if found is None:
        raise DataError(
            f"chunk {handle.number} of publication {handle.turn} is not with the learner any more; publish again"
        )
    return found


def _pulled(where: _Place, handle: PullHandle) -> UInt8[Tensor, " nbytes"] | None:
    """Bytes through the existing link; if that broke while unused, once more through a new one."""
    kept = where.link is not None
    try:
        where.link = where.link or _Link(handle)
        return where.link.pull(handle)
    except BaseException as error:
        if where.link is not None:
            where.link.close()
        where.link = None
        if not kept or not isinstance(error, _ERRORS) or isinstance(error, torch.OutOfMemoryError):
            raise
    return _pulled(where, handle)


def _device(wire: PullBackend) -> torch.device:
    if wire is PullBackend.GLOO:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigurationError(
            "learner.transport=NCCL needs a GPU in every learner rank and receiver, but this process sees none; set "
            "cluster.gpus_per_*, or learner.transport=OBJECT_STORE"
        )
    return torch.device("cuda", torch.cuda.current_device())


def _group(wire: PullBackend, store: tuple[str, int], link: int, rank: int, deadline_s: float) -> Any:
    """A process group of two apart from any other, so that it meddles with no collective of the learner."""
    timeout = timedelta(seconds=deadline_s)
    # A connection of its own: one that waits for a key blocks all others.
    own = PrefixStore(f"link{link}", TCPStore(*store, is_master=False, timeout=timeout))
    if wire is PullBackend.GLOO:
        return distributed.ProcessGroupGloo(own, rank, 2, timeout=timeout)
    # By default torch ends the whole process when a peer is lost. A lost engine must not end the learner: here
    # every wait has a deadline and every loss is an exception of `pull` or `_serve`. It is read when a group is made.
    with _environment:
        before = os.environ.get(_ON_ERROR)
        os.environ[_ON_ERROR] = "0"
        try:
            options = distributed.ProcessGroupNCCL.Options()
            options._timeout = timeout
            return distributed.ProcessGroupNCCL(own, rank, 2, options)
        finally:
            os.environ.pop(_ON_ERROR) if before is None else os.environ.update({_ON_ERROR: before})


_ON_ERROR = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
_environment = threading.Lock()  # all links of a process set and unset the same variable


def _pass(group: Any, room: UInt8[Tensor, " nbytes"], deadline_s: float, *, fresh: bool = False) -> None:
    """Transfer bytes from member 0 to member 1; they are there when this returns.

    `fresh` memory comes from this thread's stream, where kernels of its last owner may still be at work in it.
    """
    if not len(room):
        return
    options = distributed.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    # Waiting for NCCL holds up the stream that waits: it must not be the one that trains.
    side = torch.cuda.Stream(room.device) if room.is_cuda else None
    if side is not None and fresh:
        side.wait_stream(torch.cuda.current_stream(room.device))
    with torch.cuda.stream(side):
        if not group.broadcast([room], options).wait(timedelta(seconds=deadline_s)):
            raise TimeoutError("the transfer did not end")
    if side is not None:
        side.synchronize()


def _say(lines: Any, message: dict[str, Any]) -> None:
    lines.write(json.dumps(message).encode() + b"\n")
    lines.flush()


def _heard(lines: Any) -> dict[str, Any]:
    """The next message; empty if the peer has gone."""
    line = lines.readline(_LONGEST_LINE)
    return json.loads(line) if line else {}
