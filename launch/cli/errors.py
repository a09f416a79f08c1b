"""Error output of the commands: our own errors as one sentence, everything else with its traceback."""

import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console

from launch.artifacts.redaction import masked
from launch.services.failure_causes import find_own
from launch.services.signals import Preempted
from opd.errors import ConfigurationError

INTERRUPTED = 130  # what shells report for Ctrl-C


@contextmanager
def sentences(console: Console) -> Iterator[None]:
    """Context in which our own errors become one sentence and an exit code; anything else keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt as error:
        console.print("interrupted: everything this run had started is stopped")
        _notes(error, console)
        sys.exit(INTERRUPTED)
    except Exception as error:
        ours = find_own(error)
        if ours is None:
            raise
        if isinstance(ours, Preempted):
            console.print(masked(str(ours)), markup=False, highlight=False, soft_wrap=True)
            _notes(error, console)
            sys.exit(ours.code)
        console.print("error:", style="bold red", end=" ")
        console.print(f"{type(ours).__name__}: ", end="", highlight=False)
        console.print(masked(str(ours)), markup=False, highlight=False, soft_wrap=True)
        _notes(error, console)
        sys.exit(2 if isinstance(ours, ConfigurationError) else 1)


def keep_secrets() -> None:
    """Mask secrets in all that does not pass through `sentences`: warnings and tracebacks of unexpected errors."""
    sys.excepthook = _masked_trace
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Masked())


class _Masked(logging.Formatter):
    """Log formatter that masks secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """The formatted record, secrets masked."""
        return masked(super().format(record))


def _masked_trace(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(masked("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def _notes(error: BaseException, console: Console) -> None:
    """Print the notes attached to an error: how to go on, where that is known."""
    for note in getattr(error, "__notes__", ()):
        console.print(masked(note), markup=False, highlight=False, soft_wrap=True)
