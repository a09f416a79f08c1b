"""Stack dumps of a run's processes when one does not answer, and the end of the log of one that has died.

An actor that is watched prints its stacks on SIGUSR1 into memory of its own, which this process reads through `/proc`.
That works while its threads are stuck, in Python or in native code. A stopped process cannot print; of every process
there is also what the kernel says. Of one that died there is what it raised, and the end of the file that its errors
went to. Actors on other hosts cannot be looked at from here.
"""

import asyncio
import faulthandler
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.artifacts.run_directory import write_text
from launch.services.failure_causes import without_colors
from opd.deadlines import running_timeout
from opd.errors import OpdError
from weight_sync.shared_memory import place

_ANSWER_S = 3.0  # what a process may take to print
_TOLD_S = 1.0  # what an actor that has long answered may take to send its listener
_TAIL = 32 << 10  # bytes of a log that are kept
_ERRORS = 2  # descriptor of a process's standard error


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """A process that prints its stacks on SIGUSR1 to its own file `descriptor`; `log` is where its errors go."""

    place: str
    pid: int
    descriptor: int
    log: str = ""


def listen(_: Any = None) -> Listener:
    """Called inside an actor: from now on, print the stacks of all threads when SIGUSR1 comes."""
    descriptor = os.memfd_create("opd-stacks", os.MFD_CLOEXEC)
    faulthandler.register(signal.SIGUSR1, file=descriptor, all_threads=True)
    log = os.readlink(f"/proc/self/fd/{_ERRORS}")
    return Listener(place=place(), pid=os.getpid(), descriptor=descriptor, log=log)


@dataclass(slots=True)
class StackDumps:
    """Writer of stack dumps: a file in `folder` each time watched actors do not answer."""

    folder: Path
    _watched: dict[Any, tuple[str, Any]] = field(default_factory=dict)
    _files: int = 0

    def watch(self, role: str, actor: Any) -> None:
        """Prepare a dump of `actor` at its start, since one that hangs cannot be called."""
        self._watched[actor] = (role, actor.__ray_call__.remote(listen))

    async def stack_dump(self, *actors: Any, error: BaseException | None = None) -> str:
        """Write where `actors` and this process stand, or how `actors` died of `error`; names the file.

        Returns the end of a sentence, which reports that one does not answer or has died; an error here becomes a part
        of it.
        """
        parts = [await self._actor(actor, last_words if error is not None else describe) for actor in actors]
        if error is None:
            parts.append(f"== driver, process {os.getpid()}\n{_own()}")
            named = "where it stood"
        else:
            parts.insert(0, f"== what was raised\n{_traceback(error)}")
            named = "its last words"
        self._files += 1
        path = self.folder / f"{self._files}_{time.strftime('%H%M%S')}.txt"
        try:
            self.folder.mkdir(exist_ok=True)
            write_text(path, "\n".join(parts))
        except (OSError, OpdError) as error:
            return f" ({named} could not be written: {error})"
        return f" ({named}: {path})"

    async def _actor(self, actor: Any, told_by: Callable[[Listener], str]) -> str:
        role, listening = self._watched.get(actor, ("an actor that is not watched", None))
        if listening is None:
            return f"== {role}"
        try:
            async with running_timeout(_TOLD_S):
                listener: Listener = await listening
        except Exception as error:  # noqa: BLE001 (it is dead, or never came so far)
            return f"== {role}: it never said how it can be looked at ({type(error).__name__})"
        if listener.place != place():
            return f"== {role}, process {listener.pid} on another host: cannot be looked at from here"
        return f"== {role}, process {listener.pid}\n{await asyncio.to_thread(told_by, listener)}"


def keep_traceback(path: Path, error: BaseException) -> str:
    """Write all that is known of `error`, tracebacks of actors too; a sentence that names the file."""
    try:
        write_text(path, _traceback(error))
    except OpdError as full:
        return f"its traceback could not be kept: {full}"
    return f"its whole traceback is in {path}"


def _traceback(error: BaseException) -> str:
    return without_colors("".join(traceback.format_exception(error)))


def describe(listener: Listener) -> str:
    """Stacks that a process of this host prints, if it can, and the kernel's view of its threads."""
    seen = "".join(_threads(listener.pid)) or "  none: the process is gone\n"
    return f"{_printed(listener)}\nthreads, as the kernel sees them (state, where it waits, name):\n{seen}"


def last_words(listener: Listener) -> str:
    """The end of the file that a process of this host wrote its errors to."""
    try:
        with open(listener.log, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            return f"the end of {listener.log}:\n{without_colors(file.read().decode(errors='replace'))}\n"
    except OSError as error:  # a pipe or a terminal, or it was deleted
        return f"there is no file of its errors ({listener.log}: {error.strerror or error})\n"


def _printed(listener: Listener) -> str:
    file = Path(f"/proc/{listener.pid}/fd/{listener.descriptor}")
    try:
        before = len(file.read_bytes())
        os.kill(listener.pid, signal.SIGUSR1)
        deadline, size = time.monotonic() + _ANSWER_S, -1
        while time.monotonic() < deadline:
            time.sleep(0.1)
            output = file.read_bytes()[before:]
            if output and len(output) == size:  # and nothing came since
                return output.decode(errors="replace")
            size = len(output)
    except OSError as error:
        return f"it cannot be asked ({error.strerror or error})\n"
    return f"it printed nothing within {_ANSWER_S:.0f} s\n"


def _threads(pid: int) -> Iterator[str]:
    for folder in sorted(Path(f"/proc/{pid}/task").glob("*")):
        try:
            status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line)
            yield f"  {status['State'].strip():16} {_where(folder):24} {status['Name'].strip()} ({folder.name})\n"
        except OSError:  # it has just ended
            continue


def _where(folder: Path) -> str:
    try:
        return (folder / "wchan").read_text().strip() or "?"
    except OSError:
        return "?"


def _own() -> str:
    """Stacks of this process's threads and of its asyncio tasks."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        print("\ntasks:", file=file)
        for task in asyncio.all_tasks():
            task.print_stack(limit=8, file=file)
        file.seek(0)
        return file.read()
