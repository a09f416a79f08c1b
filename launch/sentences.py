"""What a user reads when something goes wrong: our own errors as one sentence, everything else whole."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from launch.causes import find_own
from launch.running import Preempted
from opd.errors import ConfigurationError

INTERRUPTED = 130  # what shells report for Ctrl-C
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later


@contextmanager
def sentences(console: Console) -> Iterator[None]:
    """Turn our own errors into one sentence and an exit code; anything else keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        console.print("interrupted: everything this run had started is stopped")
        sys.exit(INTERRUPTED)
    except Exception as error:
        ours = find_own(error)
        if ours is None:
            raise
        if isinstance(ours, Preempted):
            console.print(str(ours), markup=False, highlight=False, soft_wrap=True)
            sys.exit(PREEMPTED)
        console.print("error:", style="bold red", end=" ")
        console.print(f"{type(ours).__name__}: ", end="", highlight=False)
        console.print(str(ours), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2 if isinstance(ours, ConfigurationError) else 1)
