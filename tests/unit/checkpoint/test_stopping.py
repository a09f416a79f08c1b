"""Who may write into a run directory, and what SIGTERM means when."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from launch.artifacts.run_lock import LOCK, check_not_running, running
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


@pytest.mark.parametrize(
    "note",
    ["", "{", "[]", '{"pid": "x"}', "elsewhere", "reused"],
)
def test_a_note_that_names_no_living_process_here_does_not_count(tmp_path: Path, note: str) -> None:
    parent = psutil.Process(os.getppid())
    living = {"pid": parent.pid, "started": parent.create_time(), "host": socket.gethostname()}
    texts = {"elsewhere": json.dumps(living | {"host": "x"}), "reused": json.dumps(living | {"started": 5.0})}
    (tmp_path / LOCK).write_text(texts.get(note, note))
    with running(tmp_path):
        pass
    (tmp_path / LOCK).write_text(json.dumps(living))
    with pytest.raises(ConfigurationError, match="still running"):
        check_not_running(tmp_path)


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
