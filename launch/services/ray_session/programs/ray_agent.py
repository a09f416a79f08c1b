"""Stand-in for the agent of Ray's dashboard, of which a raylet wants one, whether or not there is a dashboard.

It says that there are no metrics, as Ray's own does where its optional packages are not installed, and ends with its
raylet. Ray's own takes 1.6 CPU seconds to start, and the raylet waits for it.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from time import sleep

# The files for which a raylet waits, and what Ray writes there for a service that is not used.
_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")
_UNUSED = "-1"
_LOOK_S = 1.0


def main(arguments: Sequence[str]) -> None:
    """Write the ports, then wait for the raylet's end."""
    raylet = os.getppid()
    parts = [argument.removeprefix("--").partition("=") for argument in arguments]
    given = {name: value for name, _, value in parts}
    for name in _PORTS:
        write(Path(given["session-dir"]) / f"{name}_{given['node-id']}", _UNUSED)
    while os.getppid() == raylet:
        sleep(_LOOK_S)


def write(path: Path, text: str) -> None:
    """Write a whole file at once: its reader may look at any time."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)


if __name__ == "__main__":
    main(sys.argv[1:])
