"""Programs of a self-test, each run in a process of its own (`python -m launch.cli.selftest.programs NAME`)."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.cli.selftest.rows import Outcome, Row, dumped, loaded
from opd.errors import DataError

_GRACE_S = 20.0  # from a request to end to the end


def _packages() -> list[Row]:
    from launch.cli.selftest.machine import packages

    return packages()


def _devices() -> list[Row]:
    from launch.cli.selftest.machine import devices

    return devices()


def _speed() -> list[Row]:
    from launch.cli.selftest.machine import bandwidths

    return bandwidths()


def _loss() -> list[Row]:
    from launch.cli.selftest.arithmetic import loss_kernels

    return loss_kernels()


def _learner_float32() -> list[Row]:
    from launch.cli.selftest.learning import learner_float32

    return learner_float32()


def _learner_bfloat16() -> list[Row]:
    from launch.cli.selftest.learning import learner_bfloat16

    return learner_bfloat16()


def _sleep() -> list[Row]:
    from launch.cli.selftest.sleeping import sleep_and_wake

    return sleep_and_wake()


PROGRAMS: Mapping[str, Callable[[], list[Row]]] = {
    "packages": _packages,
    "devices": _devices,
    "speed": _speed,
    "loss": _loss,
    "learner_float32": _learner_float32,
    "learner_bfloat16": _learner_bfloat16,
    "sleep": _sleep,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """Exit status and output of a process; `code` is None if it was ended at its deadline."""

    code: int | None
    text: str

    @property
    def why(self) -> str:
        """Error sentence of the output, or else its last line."""
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        return [*errors[-1:], *lines[-1:], "it said nothing"][0]


def rows_of(name: str, scratch: Path, deadline_s: float) -> list[Row]:
    """Rows of a program, run in a process of its own: a crash or a wait without end is a failure of this one alone."""
    output = scratch / f"{name}.json"
    ended = in_process(["-m", "launch.cli.selftest.programs", name, str(output)], deadline_s)
    if ended.code == 0:
        try:
            return loaded(output.read_text(encoding="utf-8"))
        except (OSError, DataError) as error:
            return [Row(check=name, name="", outcome=Outcome.FAIL, said=str(error))]
    why = f"no end after {deadline_s:.0f} s" if ended.code is None else f"exit status {ended.code}"
    return [Row(check=name, name="", outcome=Outcome.FAIL, figure=why, said=ended.why)]


def in_process(arguments: Sequence[str], deadline_s: float) -> Ended:
    """Run this Python with `arguments` in a session of its own, which is ended at the deadline."""
    with subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env={name: value for name, value in os.environ.items() if name != "OPD_STARTED"},  # its own start-up counts
    ) as process:
        try:
            text, _ = process.communicate(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            return Ended(code=None, text=_end(process))
        except BaseException:
            _end(process)
            raise
        return Ended(code=process.returncode, text=text)


def _end(process: "subprocess.Popen[str]") -> str:
    """End a process and all that it started, first by asking."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        os.killpg(process.pid, number)
        try:
            return process.communicate(timeout=_GRACE_S)[0]
        except subprocess.TimeoutExpired:
            continue
    return ""


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(dumped(PROGRAMS[sys.argv[1]]()), encoding="utf-8")
