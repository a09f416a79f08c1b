"""A process that does not answer is looked at before it is ended; of one that died its last words are kept."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.config.retry_policy import RetryPolicy
from launch.services.replicas import Fault, ReplicaFault, Replicas
from launch.services.stack_dumps import Listener, StackDumps, describe, keep_traceback
from opd.errors import OpdError
from tests.processes import status, wait_until
from weight_sync.shared_memory import place

PROGRAM = """
import threading, time
from launch.services.stack_dumps import listen
told = listen()
def stuck_for_good():
    print(told.pid, told.descriptor, flush=True)
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
    root = Path(__file__).parents[3]
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, cwd=root)
    assert process.stdout is not None
    pid, descriptor = map(int, process.stdout.readline().split())
    wait_until(lambda: status(pid) == psutil.STATUS_SLEEPING, 60, "its sleep", 0.01)
    yield Listener(place=place(), pid=pid, descriptor=descriptor)
    process.kill()
    process.wait()


def test_a_process_that_is_stuck_says_where_and_goes_on(stuck: Listener) -> None:
    for _ in range(2):  # it can be asked again
        told = describe(stuck)
        assert told.count("in stuck_for_good") == 1, told
        assert "S (sleeping)" in told
    assert Path(f"/proc/{stuck.pid}").exists()


def test_of_a_process_that_is_stopped_there_is_what_the_kernel_says(stuck: Listener) -> None:
    os.kill(stuck.pid, signal.SIGSTOP)
    wait_until(lambda: status(stuck.pid) == psutil.STATUS_STOPPED, 60, "its stop", 0.01)
    told = describe(stuck)
    assert "printed nothing within" in told and "T (stopped)" in told, told


def test_of_a_process_that_is_gone_there_is_that(stuck: Listener) -> None:
    os.kill(stuck.pid, signal.SIGKILL)
    wait_until(lambda: status(stuck.pid) == psutil.STATUS_ZOMBIE, 60, "its end", 0.01)
    assert "cannot be asked" in describe(stuck) or "Z (zombie)" in describe(stuck)


def test_a_replica_that_hangs_is_looked_at_before_it_is_ended_and_the_sentence_names_the_file(
    stuck: Listener, tmp_path: Path
) -> None:
    ended: list[Any] = []

    async def play() -> str:
        stacks = StackDumps(tmp_path / "stacks")
        actor = Told(stuck)
        stacks.watch("engine", actor)

        def end(one: Any) -> None:
            assert one is actor and list((tmp_path / "stacks").iterdir()), "ended before it was looked at"
            ended.append(one)

        async def nothing(_: Any) -> None: ...

        replicas = Replicas(
            service="rollout actor",
            retry=RetryPolicy(deadline_s=1.0),
            ready=nothing,
            warm_up=nothing,
            end=end,
            stack_dump=stacks.stack_dump,
        )
        replicas.adopt([actor])
        (replica,) = replicas.serving
        reporting = asyncio.ensure_future(replicas.report(replica, ReplicaFault(Fault.HUNG, "it did not answer")))
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
        stacks = StackDumps(folder)
        stacks.watch("teacher", far)
        return await stacks.stack_dump(far, object())

    asyncio.run(play(tmp_path / "stacks"))
    (file,) = (tmp_path / "stacks").iterdir()
    assert "teacher, process 1 on another host" in file.read_text()
    assert "an actor that is not watched" in file.read_text()
    (tmp_path / "file").touch()
    assert "could not be written" in asyncio.run(play(tmp_path / "file" / "stacks"))


def test_of_one_that_died_there_is_what_it_raised_and_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "worker.err"
    log.write_bytes(b"too old\n" * 9000 + b"\x1b[31mfree(): invalid pointer\x1b[0m \xff\n")
    actor = Told(Listener(place=place(), pid=1, descriptor=0, log=str(log)))

    async def play(fault: Fault) -> OpdError | None:
        stacks = StackDumps(tmp_path / "stacks")
        stacks.watch("teacher", actor)

        async def refuse(_: Any) -> None:
            raise ValueError("\x1b[31mno such layer\x1b[0m")

        replicas = Replicas(
            service="teacher actor", retry=RetryPolicy(deadline_s=1.0), ready=refuse, warm_up=refuse,
            end=lambda _: None, make=lambda: actor, stack_dump=stacks.stack_dump,
        )  # fmt: skip
        if fault is Fault.INVALID_ANSWER:
            replicas.adopt([actor])
            await replicas.report(replicas.serving[0], ReplicaFault(fault, "chunk 0 is damaged", repeats=True))
            await replicas.close()
            return OpdError(replicas.history[0])
        with pytest.raises(OpdError) as caught:
            await replicas.start(1)
        return caught.value

    said = str(asyncio.run(play(Fault.DIED)))
    (file,) = (tmp_path / "stacks").iterdir()
    assert said == f"teacher actor did not start: ValueError: no such layer (its last words: {file})"
    text = file.read_text()
    assert "in refuse" in text and "ValueError: no such layer" in text and "\x1b" not in text
    assert "free(): invalid pointer" in text and "== teacher, process 1" in text
    assert text.count("too old") < 5000, "the log is kept whole"
    file.unlink()
    assert "last words" not in str(asyncio.run(play(Fault.INVALID_ANSWER))), "one that lied is there and has said why"


def test_two_that_die_alike_are_known_though_each_has_a_file_of_its_own(tmp_path: Path) -> None:
    log = tmp_path / "worker.err"
    log.write_text("gone\n")

    async def play() -> tuple[list[str], int]:
        made: list[Told] = []
        stacks = StackDumps(tmp_path / "stacks")

        def make() -> Told:
            made.append(Told(Listener(place=place(), pid=len(made), descriptor=0, log=str(log))))
            stacks.watch("engine", made[-1])
            return made[-1]

        async def refuse(_: Any) -> None:
            raise ValueError("no memory for prompt 7")

        async def nothing(_: Any) -> None: ...

        replicas = Replicas(
            service="rollout actor", retry=RetryPolicy(deadline_s=1.0, restarts=8), ready=nothing, warm_up=refuse,
            end=lambda _: None, make=make, stack_dump=stacks.stack_dump,
        )  # fmt: skip
        replicas.adopt([make()])
        died = ReplicaFault.of(Fault.DIED, ValueError("no memory for prompt 3"))
        await replicas.report(replicas.serving[0], died)
        with pytest.raises(OpdError, match=r"two failed alike.*no memory for prompt 7 \(its last words"):
            await replicas.acquire(1)
        return replicas.history, len(made)

    history, made = asyncio.run(play())
    assert made == 2 and len(history) == 1
    assert len(list((tmp_path / "stacks").iterdir())) == 2


def test_the_traceback_of_what_is_no_sentence_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="deep") as caught:
        raise ValueError("deep inside")
    file = tmp_path / "failure.txt"
    assert str(file) in keep_traceback(file, caught.value)
    assert "test_the_traceback_of_what" in file.read_text()
    assert "could not be kept" in keep_traceback(tmp_path / "nowhere" / "failure.txt", caught.value)
