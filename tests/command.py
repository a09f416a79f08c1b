"""`opd ...` in this process: what a user types, without the seconds of processor time that a new Python needs."""

import os
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


def opd(*arguments: str) -> Done:
    """Run one command to its end; a run's actors are processes of their own all the same."""
    from launch.cli import main

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
