"""`opd ...` in this process: what a user types, without the seconds of processor time that a new Python needs."""

import os
import signal
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """How a command ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def as_from_a_terminal() -> None:
    """Take signals as a terminal's programs do, here and in what this process starts.

    A background job has SIGINT ignored, nohup SIGHUP, and the product keeps to that. This process itself goes on at a
    hangup.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda number, frame: None)


def opd(*arguments: str) -> Done:
    """Run one command to its end; a run's actors are processes of their own all the same."""
    from launch.cli.main import main

    before = dict(os.environ)
    with TemporaryFile("w+") as out, TemporaryFile("w+") as errors:  # files, since Ray asks streams for their number
        try:
            with redirect_stdout(out), redirect_stderr(errors):
                main(list(arguments))
            code = None
        except SystemExit as end:
            code = end.code
        finally:
            os.environ.clear()
            os.environ.update(before)
        assert isinstance(code, int), f"a command ends with a number, not with {code!r}"
        return Done(returncode=code, stdout=_written(out), stderr=_written(errors))


def _written(file: IO[str]) -> str:
    file.flush()
    file.seek(0)
    return file.read()
