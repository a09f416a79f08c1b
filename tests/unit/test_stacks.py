"""A process that does not answer is looked at before it is ended, also when it cannot answer at all."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.stacks import Listener, Stacks, describe
from launch.supervision import Care, Fault, Faulty, Replicas
from opd.errors import OpdError
from opd.shared_memory import place

PROGRAM = """
import threading, time
from launch.stacks import listen
told = listen()
print(told.pid, told.descriptor, flush=True)
def stuck_for_good():
    with threading.Lock() as lock: time.sleep(600)
stuck_for_good()
"""


class Told:
    """A process as an actor: whoever asks is told how it can be looked at."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self.__ray_call__ = self

    def remote(self, function: Any) -> Any:
        assert function.__name__ == "listen"

        async def answer() -> Listener:
            return self._listener

        return asyncio.ensure_future(answer())


@pytest.fixture
def stuck() -> Iterator[Listener]:
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, cwd=root)
    assert process.stdout is not None
    pid, descriptor = map(int, process.stdout.readline().split())
    yield Listener(place=place(), pid=pid, descriptor=descriptor)
    process.kill()
    process.wait()


def test_a_process_that_is_stuck_says_where_and_goes_on(stuck: Listener) -> None:
    time.sleep(0.2)
    for _ in range(2):  # it can be asked again
        told = describe(stuck)
        assert told.count("in stuck_for_good") == 1, told
        assert "S (sleeping)" in told
    assert Path(f"/proc/{stuck.pid}").exists()


def test_of_a_process_that_is_stopped_there_is_what_the_kernel_says(stuck: Listener) -> None:
    os.kill(stuck.pid, signal.SIGSTOP)
    while psutil.Process(stuck.pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    told = describe(stuck)
    assert "printed nothing within" in told and "T (stopped)" in told, told


def test_of_a_process_that_is_gone_there_is_that(stuck: Listener) -> None:
    os.kill(stuck.pid, signal.SIGKILL)
    while psutil.Process(stuck.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert "cannot be asked" in describe(stuck) or "Z (zombie)" in describe(stuck)


def test_a_replica_that_hangs_is_looked_at_before_it_is_ended_and_the_sentence_names_the_file(
    stuck: Listener, tmp_path: Path
) -> None:
    ended: list[Any] = []

    async def play() -> str:
        stacks = Stacks(tmp_path / "stacks")
        actor = Told(stuck)
        stacks.watch("engine", actor)

        def end(one: Any) -> None:
            assert one is actor and list((tmp_path / "stacks").iterdir()), "ended before it was looked at"
            ended.append(one)

        async def nothing(_: Any) -> None: ...

        replicas = Replicas(
            who="rollout actor", care=Care(deadline_s=1.0), ready=nothing, prime=nothing, end=end, look=stacks.look
        )
        replicas.adopt([actor])
        (replica,) = replicas.serving
        reporting = asyncio.ensure_future(replicas.report(replica, Faulty(Fault.HUNG, "it did not answer")))
        await asyncio.sleep(0)
        reporting.cancel()  # a hedge has answered meanwhile
        with pytest.raises(asyncio.CancelledError):
            await reporting
        with pytest.raises(OpdError, match="no replica is left"):
            await replicas.acquire(1)
        return replicas.history[0]

    sentence = asyncio.run(play())
    assert len(ended) == 1
    (file,) = (tmp_path / "stacks").iterdir()
    assert sentence == (f"rollout actor 0 hung and is replaced: it did not answer (where it stood: {file})")
    text = file.read_text()
    assert "== engine, process" in text and "in stuck_for_good" in text
    assert "== driver, process" in text and "play" in text


def test_what_cannot_be_looked_at_is_said_and_a_full_disk_hides_nothing(tmp_path: Path) -> None:
    far = Told(Listener(place="elsewhere", pid=1, descriptor=0))

    async def play(folder: Path) -> str:
        stacks = Stacks(folder)
        stacks.watch("teacher", far)
        return await stacks.look(far, object())

    asyncio.run(play(tmp_path / "stacks"))
    (file,) = (tmp_path / "stacks").iterdir()
    assert "teacher, process 1 on another host" in file.read_text()
    assert "an actor that is not watched" in file.read_text()
    (tmp_path / "file").touch()
    assert "could not be written" in asyncio.run(play(tmp_path / "file" / "stacks"))
