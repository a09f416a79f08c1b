"""Locks on files and folders, which the system takes back from a process that ends, however it ends.

A number of a process and the time of its start would not do: the number is used again, and the time that Linux counts
from moves with the machine's clock.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import sleep

from opd.errors import ConfigurationError

_TRIES, _PAUSE_S = 10, 0.02  # `is_held` itself holds a file for a moment


@contextmanager
def alone_in(root: Path) -> Iterator[None]:
    """Mutual exclusion of processes that make something in the folder `root`, for moments, if there is one."""
    if not root.is_dir():
        yield
        return
    handle = os.open(root, os.O_RDONLY)
    try:
        _lock(root, handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def hold(path: Path) -> int | None:
    """Descriptor of the file at `path`, made if it is missing, which no other `hold` gets until it is closed.

    None if another has it. Who removes the file does so before closing it.

    Raises:
        ConfigurationError: the file system has no locks.
    """
    for _ in range(_TRIES):
        handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        if _lock(path, handle, fcntl.LOCK_EX | fcntl.LOCK_NB) and _is_at(path, handle):
            return handle
        os.close(handle)
        sleep(_PAUSE_S)
    return None


def is_held(path: Path) -> bool:
    """Whether a process has the file at `path`, by `hold`. Changes nothing."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not _lock(path, handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    finally:
        os.close(handle)


def _lock(path: Path, handle: int, how: int) -> bool:
    try:
        fcntl.flock(handle, how)
    except BlockingIOError:
        return False
    except OSError as error:
        raise ConfigurationError(
            f"the file system of {path} has no locks ({error.strerror}), without which two processes could write into "
            "one run; choose a folder on another one"
        ) from error
    return True


def _is_at(path: Path, handle: int) -> bool:
    """Whether the open file is still the one at `path`: its holder may have removed it meanwhile."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
