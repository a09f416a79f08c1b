"""Who may write into a run directory, and what SIGTERM means when."""

import asyncio
import errno
import fcntl
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from launch.artifacts.file_locks import alone_in
from launch.artifacts.run_lock import LOCK, check_not_running, is_over, running
from launch.services.signals import StopRequest, run_until_stopped
from opd.errors import ConfigurationError


def test_a_living_process_keeps_its_run(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from launch.artifacts.run_lock import running\n"
        "with running(Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"
    )
    root = Path(__file__).parents[3]
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == b"in\n"
        with pytest.raises(ConfigurationError, match=rf"still running \(process {other.pid} on this host\)"):
            check_not_running(tmp_path)
        with pytest.raises(ConfigurationError, match="still running"), running(tmp_path):
            pass
        other.kill()  # leaves its note
        other.wait()
        assert (tmp_path / LOCK).exists()
        check_not_running(tmp_path)
        with running(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        assert not (tmp_path / LOCK).exists()
    finally:
        other.kill()
        other.communicate()


@pytest.mark.parametrize("shift", [-3600.0, -1.0, 1.0, 3600.0])
def test_a_clock_that_is_set_does_not_let_a_second_process_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: float
) -> None:
    """Linux tells a process's start by its clock of today: another start of the same process once it is set."""
    now, booted = time.time, psutil.boot_time()
    with running(tmp_path):
        monkeypatch.setattr(time, "time", lambda: now() + shift)
        monkeypatch.setattr(psutil._psplatform, "boot_time", lambda: booted + shift)
        assert psutil.Process().create_time() == pytest.approx(booted + shift, abs=1e9)
        with pytest.raises(ConfigurationError, match=f"still running .process {os.getpid()} on this host"):
            check_not_running(tmp_path)
        with pytest.raises(ConfigurationError, match="still running"), running(tmp_path):
            pass
        assert not is_over(tmp_path)
    assert is_over(tmp_path) and not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("host", ["here", "elsewhere"])
@pytest.mark.parametrize("note", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1}', "killed", "of an older version"])
def test_a_note_that_no_process_holds_does_not_count(tmp_path: Path, note: str, host: str) -> None:
    parent = {"pid": os.getppid(), "host": socket.gethostname() if host == "here" else "x"}
    texts = {"killed": json.dumps(parent), "of an older version": json.dumps(parent | {"started": 5.0})}
    (tmp_path / LOCK).write_text(texts.get(note, note))
    check_not_running(tmp_path)
    assert is_over(tmp_path) or (host == "elsewhere" and note in texts), "another host cannot be asked"
    with running(tmp_path):
        pass


def test_of_many_that_begin_one_is_let_in_whoever_looks_meanwhile(tmp_path: Path) -> None:
    """Whoever looks holds the file for a moment; a holder that ends removes it while others have it open."""
    inside, most, over = itertools.count(), list[int](), threading.Event()

    def look() -> None:
        while not over.is_set():
            is_over(tmp_path)

    def begin() -> None:
        for _ in range(20):
            try:
                with running(tmp_path):
                    at = os.open(tmp_path / "inside", os.O_CREAT | os.O_EXCL | os.O_WRONLY)  # fails beside another
                    most.append(next(inside))
                    os.close(at)
                    (tmp_path / "inside").unlink()
            except ConfigurationError:
                continue

    looking = threading.Thread(target=look)
    looking.start()
    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(begin) for _ in range(4)]
    over.set()
    looking.join(60)
    for each in done:
        each.result()
    assert len(most) > 20, "somebody is let in nearly always"


def test_a_file_system_without_locks_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, how: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for use in (running(tmp_path), alone_in(tmp_path)):
        with pytest.raises(ConfigurationError, match=r"has no locks \(Operation not supported\)"), use:
            pass


def test_sigterm_waits_for_a_boundary_only_where_there_is_one() -> None:
    async def work(stop: StopRequest, waits: bool, signals: int, seen: list[str]) -> None:
        stop.waits = waits
        try:
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGTERM)
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.2)  # a step: cancelled in the middle, or looked at when it is over
            assert stop.asked
            seen.append("boundary")
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    seen: list[str] = []
    run_until_stopped(work(stop := StopRequest(60.0), True, 1, seen), stop)
    for waits, signals in ((False, 1), (True, 2)):
        with pytest.raises(KeyboardInterrupt):
            run_until_stopped(work(stop := StopRequest(60.0), waits, signals, seen), stop)
    assert seen == ["boundary", "cancelled", "cancelled"]


def test_a_grace_that_ends_before_the_boundary_cancels() -> None:
    async def endless(stop: StopRequest) -> None:
        stop.waits = True
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()

    with pytest.raises(KeyboardInterrupt):
        run_until_stopped(endless(stop := StopRequest(0.01)), stop)
    assert stop.asked


def test_a_grace_that_ends_after_the_checkpoint_cuts_nothing_short() -> None:
    async def work(stop: StopRequest) -> str:
        stop.waits = True
        task = asyncio.current_task()
        assert task is not None
        stop.signal(task.cancel)
        stop.met()
        await asyncio.sleep(0.2)  # trackers and actors are closed
        return "closed"

    assert run_until_stopped(work(stop := StopRequest(0.05)), stop) == "closed"
