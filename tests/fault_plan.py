"""What goes wrong where in a real run: a folder of planned faults, which processes of the run claim and do.

A plan is a file whose name says everything; a process claims it by renaming it, so that one process does it, once, and
the new name is the witness. Processes find the folder in the environment.
"""

import ctypes
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from opd.errors import DataError

FOLDER = "OPD_TEST_FAULT_PLAN"


@dataclass(frozen=True)
class Fired:
    """A fault that process `pid` has claimed at `place` (and has done or is about to do)."""

    place: str
    how: str
    pid: int


def plan(folder: Path, place: str, how: str, *, entry: int = 1, after: int = 0) -> None:
    """Do `how` at the `entry`-th time that any process comes to `place`, or later, once `after` faults have fired."""
    (folder / f"{after:02}~{place}~{entry}~{how}").touch()


def fired(folder: Path) -> list[Fired]:
    """In the order they fired."""
    found = sorted(folder.glob("fired~*"), key=lambda path: path.stat().st_ctime_ns)
    return [Fired(place, how, int(pid)) for _, place, how, pid, _ in (path.name.split("~") for path in found)]


def entries(folder: Path, place: str) -> int:
    """How often processes came to `place` so far."""
    path = folder / f"count~{place}"
    return path.stat().st_size if path.exists() else 0


def present(role: str) -> None:
    """This process has the role."""
    (_folder() / f"{role}~{os.getpid()}~is").touch()


def processes(folder: Path, role: str) -> list[int]:
    """Who has or had the role."""
    return sorted(int(path.name.split("~")[1]) for path in folder.glob(f"{role}~*~is"))


def claimed(place: str) -> str:
    """This process is at `place`: what it is to do there, "" for nothing."""
    folder = _folder()
    entry, already = _count(folder / f"count~{place}"), len(list(folder.glob("fired~*")))
    for path in sorted(folder.glob(f"[0-9]*~{place}~*")):
        after, _, first, how = path.name.split("~")
        if already < int(after) or entry < int(first):
            continue
        try:
            path.rename(folder / f"fired~{place}~{how}~{os.getpid()}~{entry}")
        except FileNotFoundError:  # another process was faster
            continue
        return how
    return ""


def at(place: str) -> None:
    """This process is at `place`; if a fault is planned for it, it happens now."""
    how = claimed(place)
    if how:
        DEEDS[how.split()[0]](*how.split()[1:])


def _folder() -> Path:
    return Path(os.environ[FOLDER])


def _count(path: Path) -> int:
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(handle, b".")
        return os.lseek(handle, 0, os.SEEK_CUR)  # where our own byte ends: appends never meet
    finally:
        os.close(handle)


def _signal(number: int) -> Callable[..., None]:
    def deed(wait_s: str = "0") -> None:
        time.sleep(float(wait_s))
        os.kill(os.getpid(), number)

    return deed


def _segfault(wait_s: str = "0") -> None:
    time.sleep(float(wait_s))
    ctypes.string_at(0)


def _kill(role: str, most: str = "99", wait_s: str = "0") -> None:
    """SIGKILL to living processes of another role, and time for the news to spread."""
    alive = [pid for pid in processes(_folder(), role) if Path(f"/proc/{pid}").exists()]
    for pid in alive[: int(most)]:
        os.kill(pid, signal.SIGKILL)
    time.sleep(float(wait_s))


def _raises(error: Exception) -> Callable[..., None]:
    def deed() -> None:
        raise error

    return deed


DEEDS: dict[str, Callable[..., None]] = {
    "SIGKILL": _signal(signal.SIGKILL),
    "SIGSTOP": _signal(signal.SIGSTOP),
    "segfault": _segfault,
    "exit": lambda: os._exit(3),
    "sleep": lambda seconds: time.sleep(float(seconds)),
    "kill": _kill,
    "error": _raises(DataError("a planned fault; take it out of the plan")),
    "bug": _raises(ValueError("a planned fault that no code expects")),
}
