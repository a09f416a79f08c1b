"""Lock of a run directory: the one process that writes into it, while it runs."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.artifacts.file_locks import hold, is_held
from opd.errors import ConfigurationError

LOCK = "running.json"
_MALFORMED = (ValueError, KeyError, TypeError, OverflowError, RecursionError)  # raised by reading a malformed note


@contextmanager
def running(directory: Path) -> Iterator[None]:
    """Hold the run in `directory` for this process while the block lasts, with a note of its number and host.

    A process that was killed leaves its note behind, which no longer is held.

    Raises:
        ConfigurationError: another living process, or another place in this one, is at this run.
    """
    path = directory / LOCK
    handle = hold(path)
    if handle is None:
        raise _still_running(directory)
    try:
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        yield
    finally:
        try:
            path.unlink(missing_ok=True)
        finally:  # also on a disk that has become read-only
            os.close(handle)


def check_not_running(directory: Path) -> None:
    """Raise `ConfigurationError` if a running process holds the run in `directory`, as far as this host can see."""
    if is_held(directory / LOCK):
        raise _still_running(directory)


def is_over(directory: Path) -> bool:
    """Whether certainly no process holds the run in `directory`. That of another host may hold it unseen."""
    if is_held(directory / LOCK):
        return False
    try:
        return _note(directory)[1] == socket.gethostname()
    except (FileNotFoundError, *_MALFORMED):
        return True


def _note(directory: Path) -> tuple[int, str]:
    """Number and host of the process that left the note in `directory`."""
    note = json.loads((directory / LOCK).read_text(errors="replace"))
    return int(note["pid"]), str(note["host"])


def _still_running(directory: Path) -> ConfigurationError:
    try:
        pid, host = _note(directory)
        holder = f"process {pid} on {'this host' if host == socket.gethostname() else host}"
    except (FileNotFoundError, *_MALFORMED):  # it is just beginning or ending
        holder = "another process"
    return ConfigurationError(f"the run {directory} is still running ({holder}); wait for it or stop it")
