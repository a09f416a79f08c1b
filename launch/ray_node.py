"""Ray's own processes of a local session. When one of them dies Ray says nothing for minutes, and actors stay behind.

(Ray 2.60: a driver whose raylet was killed still waited after 200 s, and so did its workers, which look for a parent
that is process 1 only after they have been asked something.)
"""

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic, sleep

import psutil

from launch.causes import brief
from launch.supervision import GO_ON
from opd.errors import OpdError

_NAMES = ("raylet", "gcs_server")
_PERIOD_S = 2.0
_PAUSE_S = 1.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Node:
    """The raylet and the control store that this process has started; none of a cluster that it has joined."""

    processes: tuple[psutil.Process, ...] = ()

    @classmethod
    def started_here(cls) -> "Node":
        """Those that are children of this process now."""
        return cls(tuple(p for p in psutil.Process().children() if p.name() in _NAMES))

    async def watch(self) -> None:
        """Never returns.

        Raises:
            OpdError: one of the processes has died.
        """
        while True:
            await asyncio.sleep(_PERIOD_S)
            dead = next((p for p in self.processes if _is_dead(p)), None)
            if dead is not None:
                raise OpdError(
                    f"a process of Ray itself (number {dead.pid}) has died, and with it this run's session; {GO_ON}"
                )

    def end_orphans(self) -> None:
        """Kill workers whose raylet has died: nobody else does. To be called when the session is over."""
        raylets = {str(p.pid) for p in self.processes if _is_dead(p)}
        for process in psutil.process_iter() if raylets else ():
            try:
                if process.uids().real == os.getuid() and process.environ().get("RAY_RAYLET_PID") in raylets:
                    process.kill()
            except psutil.Error:  # it has just ended
                continue


def start_patiently(start: Callable[[], object], deadline_s: float) -> None:
    """Call `start` again while Ray's processes need longer than the 30 s that Ray gives them, for `deadline_s` in all.

    Raises:
        OpdError: Ray did not start.
    """
    began = monotonic()
    while True:
        before = {p.pid for p in psutil.Process().children()}
        try:
            start()
            return
        except Exception as error:  # Ray raises this very class
            for process in psutil.Process().children():
                if process.pid not in before and _is_rays(process):
                    process.kill()
            late = "timed out" in str(error)
            if late and monotonic() - began + _PAUSE_S < deadline_s:
                logger.warning("Ray needs longer than it allows itself to start on this machine; it is tried again")
                sleep(_PAUSE_S)
                continue
            advice = "free processors or memory, or raise cluster.start_deadline_s" if late else "correct that"
            raise OpdError(f"Ray did not start on this machine ({brief(error)}); {advice}, and start again") from error


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
