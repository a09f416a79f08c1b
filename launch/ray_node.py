"""Ray's own processes of a local session. When one of them dies Ray says nothing for minutes, and actors stay behind.

(Ray 2.60: a driver whose raylet was killed still waited after 200 s, and so did its workers, which look for a parent
that is process 1 only after they have been asked something.)
"""

import asyncio
import os
from dataclasses import dataclass

import psutil

from launch.supervision import GO_ON
from opd.errors import OpdError

_NAMES = ("raylet", "gcs_server")
_PERIOD_S = 2.0


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


def _is_dead(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True
