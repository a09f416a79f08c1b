"""Watch of Ray's own processes in a local session: after the death of one, Ray reports nothing for minutes.

(Ray 2.60: a driver whose raylet was killed still waited after 200 s, and so did its workers, which look for a parent
that is process 1 only after they have been asked something.)
"""

import asyncio
import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil

from launch.artifacts.file_locks import hold, is_held
from launch.services.failure_causes import brief
from launch.services.ray_session.programs import ray_agent, start_worker
from launch.services.replicas import GO_ON
from opd.deadlines import repeated
from opd.errors import OpdError

_NAMES = ("raylet", "gcs_server")
_MARK = ".opd-driver"  # in the folder of a session, held by the program that has started it
_PERIOD_S = 2.0
_PAUSE_S = 1.0
Started = TypeVar("Started")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Node:
    """The raylet and the control store that this process has started; none of a cluster that it has joined.

    `folder` is what Ray keeps of their session (sockets, logs), `mark` the descriptor of the file in it that this
    process holds.
    """

    processes: tuple[psutil.Process, ...] = ()
    folder: Path | None = None
    mark: int | None = None

    @classmethod
    def started_here(cls, folder: str = "") -> "Node":
        """Those that are children of this process now; their `folder` is marked as this process's."""
        processes = tuple(p for p in psutil.Process().children() if p.name() in _NAMES)
        return cls(processes, Path(folder), _mark(Path(folder))) if folder else cls(processes)

    async def watch(self) -> None:
        """Never returns.

        Raises:
            OpdError: one of the processes has died.
        """
        while True:
            await asyncio.sleep(_PERIOD_S)
            if (dead := self.dead) is not None:
                logs = "" if self.folder is None else f" (its logs, until the next run: {self.folder / 'logs'})"
                raise OpdError(
                    f"a process of Ray itself (number {dead.pid}) has died, and with it this run's session{logs}; "
                    f"{GO_ON}"
                )

    @property
    def dead(self) -> psutil.Process | None:
        """One of the processes that has ended, if one has."""
        return next((p for p in self.processes if _is_dead(p)), None)

    def end_orphans(self) -> None:
        """Kill workers whose raylet has died, which Ray does not; to be called when the session is over."""
        raylets = {str(p.pid) for p in self.processes if _is_dead(p)}
        for process in psutil.process_iter() if raylets else ():
            try:
                if process.uids().real == os.getuid() and process.environ().get("RAY_RAYLET_PID") in raylets:
                    process.kill()
            except psutil.Error:  # it has just ended
                continue

    def tidy(self) -> None:
        """Remove the session's folder, and those that killed programs of ours have left beside it.

        Ray never does. Only marked ones are ours: a cluster's own session has a folder beside them. What is removed
        was for processes that have ended; the last words of those that died are in the run's folder.
        """
        if self.folder is None:
            return
        for mark in self.folder.parent.glob(f"session_*/{_MARK}"):
            if mark.parent == self.folder or _is_left(mark):
                shutil.rmtree(mark.parent, ignore_errors=True)

    def let_go(self) -> None:
        """Give up the mark of the session's folder, if it is still there: the next run may remove it."""
        if self.mark is not None:
            os.close(self.mark)


def _mark(folder: Path) -> int | None:
    try:
        return hold(folder / _MARK)
    except (OSError, OpdError) as error:  # a full disk: the folder stays, which is no reason to end a run
        logger.debug("%s stays when this session is over: %s", folder, error)
        return None


def _is_left(mark: Path) -> bool:
    """Whether the folder with `mark` is this user's, and the program that made it and all its processes have ended."""
    folder = mark.parent
    try:
        if folder.is_symlink() or mark.stat().st_uid != os.getuid() or is_held(mark):
            return False
        return not any(folder.name in " ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"]))
    except (OSError, OpdError, psutil.Error):  # it has just gone, or is none of ours
        return False


@contextmanager
def on_loopback() -> Iterator[None]:
    """Ray's processes that are started inside listen on 127.0.0.1 alone.

    Ray turns that address into the machine's own, under which other machines can reach it, unless clusters are
    switched off (RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER, which it reads when it is imported).
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def bare() -> Iterator[None]:
    """Ray's processes that are started inside are those that a run on one machine needs.

    Left out are the autoscaler, the monitor of logs (whose lines no driver here asks for), and the dashboard, which Ray
    starts without a page where none is wanted. Two are replaced (`launch.services.ray_session.programs`): the
    dashboard's agent and the program that sets a worker's environment.
    """
    from ray._private import parameter, ray_constants, services

    if not all(hasattr(services, name) for name in ("start_api_server", "start_ray_process")):
        yield  # another Ray than the one that is locked starts all that it wants
        return
    whole, start, raylet = parameter.RayParams, services.start_api_server, ray_constants.PROCESS_TYPE_RAYLET
    begin = services.start_ray_process

    def with_own_agent(command: list[str], process_type: str, *args: Any, **options: Any) -> Any:
        if process_type == raylet:
            command = [_own_agent(part) for part in command]
        return begin(command, process_type, *args, **options)

    fewer: dict[str, Any] = {"no_monitor": True, "include_log_monitor": False}
    parameter.RayParams = partial(whole, **fewer, setup_worker_path=start_worker.__file__)
    services.start_api_server = lambda *_, **__: (None, None)  # what Ray's own returns when the dashboard fails
    services.start_ray_process = with_own_agent
    try:
        yield
    finally:
        parameter.RayParams, services.start_api_server, services.start_ray_process = whole, start, begin


def _own_agent(part: str) -> str:
    """The argument of a raylet with our agent, if it is the one that names the dashboard's."""
    name, _, command = part.partition("=")
    if name != "--dashboard_agent_command":
        return part
    words = shlex.split(command)
    at = next((i for i, word in enumerate(words) if Path(word).parts[-2:] == ("dashboard", "agent.py")), None)
    if at is None:  # another Ray than the one that is locked: its own agent does as well
        return part
    own = [sys.executable, "-S", ray_agent.__file__, *words[at + 1 :]]
    return f"{name}={subprocess.list2cmdline(own)}"  # as Ray writes it


def start_ray(start: Callable[[], Started], deadline_s: float) -> Started:
    """Call `start` again while Ray's processes need longer than the 30 s that Ray gives them, for `deadline_s` in all.

    Raises:
        OpdError: Ray did not start.
    """

    def attempt() -> Started:
        before = {p.pid for p in psutil.Process().children()}
        try:
            return start()
        except Exception as error:  # Ray raises this very class
            for process in psutil.Process().children():
                if process.pid not in before and _is_rays(process):
                    with suppress(psutil.NoSuchProcess):  # it has just ended
                        process.kill()
            if _timed_out(error):
                logger.warning("Ray needs longer than it allows itself to start on this machine")
            raise

    try:
        return repeated(attempt, _timed_out, deadline_s, _PAUSE_S)
    except Exception as error:
        late = "free processors or memory, or raise cluster.start_deadline_s"
        advice = late if _timed_out(error) else "correct that"
        raise OpdError(f"Ray did not start on this machine ({brief(error)}); {advice}, and start again") from error


def _timed_out(error: Exception) -> bool:
    return "timed out" in str(error)


def _is_rays(process: psutil.Process) -> bool:
    try:
        return process.name() in _NAMES or any(f"{os.sep}ray{os.sep}" in part for part in process.cmdline())
    except psutil.Error:  # it has just ended
        return False


def _is_dead(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True
