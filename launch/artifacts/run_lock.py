"""Lock of a run directory: the one process that writes into it, while it runs on this machine."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from opd.errors import ConfigurationError

LOCK = "running.json"
_MALFORMED = (ValueError, KeyError, TypeError, OverflowError, RecursionError)  # raised by reading a malformed note


@contextmanager
def running(directory: Path) -> Iterator[None]:
    """Note this process in `directory` while the block lasts.

    A process that was killed leaves its note behind, which counts only while a process of that number and age runs
    on this host. A note of another host cannot be checked and does not count.

    Raises:
        ConfigurationError: another living process is at this run.
    """
    path = directory / LOCK
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # held for this moment only: of two that start together, one reads the other
        file.seek(0)
        _refuse(directory, file.read())
        file.truncate(0)
        here = psutil.Process()
        file.write(json.dumps({"pid": here.pid, "started": here.create_time(), "host": socket.gethostname()}))
        file.flush()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def alone_in(root: Path) -> Iterator[None]:
    """Mutual exclusion of processes that make something in the folder `root`, for moments, if there is one."""
    if not root.is_dir():
        yield
        return
    handle = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def check_not_running(directory: Path) -> None:
    """Raise `ConfigurationError` if a running process of this host holds the run in `directory`."""
    path = directory / LOCK
    if path.exists():
        _refuse(directory, path.read_text(errors="replace"))


def is_over(directory: Path) -> bool:
    """Whether certainly no process holds the run in `directory`. A note of another host cannot be checked."""
    try:
        text = (directory / LOCK).read_text(errors="replace")
    except FileNotFoundError:
        return True
    try:
        here = json.loads(text)["host"] == socket.gethostname()
    except _MALFORMED:
        here = True
    return here and _holder(text) is None


def _refuse(directory: Path, text: str) -> None:
    holder = _holder(text)
    if holder is not None:
        raise ConfigurationError(
            f"the run {directory} is still running (process {holder} on this host); wait for it or stop it"
        )


def _holder(text: str) -> int | None:
    """The running process on this host that `text` names, if it is not this one."""
    try:
        note = json.loads(text)
        pid, started, host = int(note["pid"]), float(note["started"]), str(note["host"])
    except _MALFORMED:  # empty, cut off by a crash, or none of ours
        return None
    if host != socket.gethostname() or pid == os.getpid():
        return None
    try:
        process = psutil.Process(pid)
        alive = process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - started) < 1
    except (psutil.Error, OverflowError):
        return None
    return pid if alive else None
