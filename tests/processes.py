"""Processes that tests start: what is waited for, who belongs to a run, how all of it ends, and ports of their own."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.command import ROOT

MARK = "OPD_TEST_RUN"  # inherited by every process of a run
GONE_S = 120  # what the end of a run may take on a machine that others use as well
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST_PORT = 21_200  # above those of Ray's workers and of its client server


def start(mark: str, runs: Path, *arguments: str, module: str = "launch.cli", **more: str) -> subprocess.Popen[str]:
    """`opd train ...` on the shop task, small; `more` are variables of its environment."""
    command = ["train", "experiment=shop", "evaluation.prompts.prompts_per_step=8", "evaluation.samples=1"]
    command += ["evaluation.reverse_kl_prompts=4", "steps=100000", f"output_dir={runs}", "run_name=r", *arguments]
    return subprocess.Popen(
        [sys.executable, "-m", module, *command],
        cwd=ROOT,
        env=os.environ | {MARK: mark} | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A job that a script started in the background ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_until(condition: Callable[[], object], seconds: float, what: str, every_s: float = 0.3) -> None:
    """Wait until `condition` holds: an event and no time that it might take. Its deadline costs nothing when all is
    well."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(every_s)


def family(mark: str, name: str = "") -> list[psutil.Process]:
    """Living processes that the marked run has started, whoever their parent is now; of this name if one is given."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found += [process] if name in ("", process.name()) else []
    return found


def command(process: psutil.Process) -> list[str]:
    """Its command line; nothing if it has gone meanwhile."""
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []


def status(pid: int) -> str:
    """Its state as psutil names it; "gone" if it has gone meanwhile."""
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return "gone"


def open_files() -> list[str]:
    """What this process holds open, each as often as it does."""
    places = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing itself, or a thread has closed it
            places.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return places


def end_family(mark: str) -> None:
    """Kill what is left of a marked run; some of it may end by itself meanwhile."""
    for process in family(mark):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def nobody_is_left(mark: str, seconds: float = GONE_S) -> None:
    """Wait until no process of the marked run lives."""
    deadline = time.monotonic() + seconds
    while left := family(mark):
        assert time.monotonic() < deadline, f"left after {seconds} s: {[command(p)[:3] for p in left]}"
        time.sleep(0.3)


def end_of(driver: subprocess.Popen[str], seconds: float = GONE_S) -> str:
    """What it printed; if it does not end in time, where it stands."""
    try:
        return driver.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.kill(driver.pid, signal.SIGUSR1)
        time.sleep(2)
        driver.kill()
        pytest.fail(f"the driver did not end: {driver.communicate(timeout=10)[0]}")


def own_port() -> int:
    """A port of the loopback for a process that is told its port, and that begins to listen seconds later.

    The system gives none of these to a process that asks for any free port, as all others of a run do meanwhile, and
    tests of another process at the same time are given others.
    """
    for port in itertools.islice(_ports, 1000):
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port
    raise AssertionError("1000 ports for tests are in use")


def _own_ports() -> Iterator[int]:
    """Those of this process: each once, then again."""
    low = int(_EPHEMERAL.read_text().split()[0])
    every = range(_FIRST_PORT, low if low > _FIRST_PORT + 1000 else _FIRST_PORT + 10_000)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    mine = every[number::workers]
    begin = os.getpid() % len(mine)  # other runs of the tests on this machine begin elsewhere
    return itertools.cycle([*mine[begin:], *mine[:begin]])


_ports = _own_ports()
