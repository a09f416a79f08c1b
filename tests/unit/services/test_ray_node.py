"""A run whose Ray has died ends at once, and its workers with it."""

import asyncio
import itertools
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.artifacts.file_locks import hold, is_held
from launch.config.settings import ClusterConfig
from launch.services.ray_session.address import check_cluster
from launch.services.ray_session.cluster import connected
from launch.services.ray_session.node import Node, start_ray
from launch.services.signals import guarded
from opd.errors import OpdError
from tests.processes import command, wait_until
from tests.tiny_models import impatient

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
LATE = "The current node timed out during startup. This could happen because\nand more"


@pytest.fixture
def ray() -> Iterator[subprocess.Popen[bytes]]:
    process = sleeping()
    yield process
    process.kill()
    process.wait()


def sleeping(*arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    """A process with these arguments and variables: begun, and not only forked, so that whoever looks sees them."""
    process = subprocess.Popen([*SLEEP, *arguments], env=os.environ | environment)
    wait_until(lambda: command(psutil.Process(process.pid))[1:] == [*SLEEP[1:], *arguments], 60, "a process", 0.01)
    return process


def worker(raylet: int) -> subprocess.Popen[bytes]:
    return sleeping(RAY_RAYLET_PID=str(raylet))


def test_work_beside_a_ray_that_dies_is_cancelled_and_the_reason_raised(
    ray: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.services.ray_session.node._PERIOD_S", 0.01)
    seen: list[str] = []

    async def work() -> None:
        await asyncio.sleep(0.1)
        seen.append("begun")
        ray.kill()  # a zombie until somebody asks for its exit status
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    with pytest.raises(OpdError, match=rf"number {ray.pid}\) has died.*\(its logs.* session_1/logs"):
        asyncio.run(guarded(work(), Node((psutil.Process(ray.pid),), Path("session_1")).watch()))
    assert seen == ["begun", "cancelled"]


def test_work_ends_its_guard_whatever_becomes_of_it() -> None:
    ended: list[str] = []

    async def guard() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("guard")

    async def answer() -> int:
        await asyncio.sleep(0.01)
        return 7

    async def fail() -> int:
        await asyncio.sleep(0.01)
        raise OpdError("no")

    async def main() -> None:
        assert await guarded(answer(), guard()) == 7
        with pytest.raises(OpdError, match="no"):
            await guarded(fail(), guard())
        whole = asyncio.ensure_future(guarded(asyncio.sleep(60), guard()))
        await asyncio.sleep(0.01)
        whole.cancel()
        with pytest.raises(asyncio.CancelledError):
            await whole
        assert ended == ["guard"] * 3

    asyncio.run(main())


def test_workers_of_a_raylet_that_died_are_ended_and_no_others(ray: subprocess.Popen[bytes]) -> None:
    node, orphan, other = Node((psutil.Process(ray.pid),)), worker(ray.pid), worker(1)
    try:
        node.end_orphans()
        assert orphan.poll() is None, "its raylet lives"
        ray.kill()
        ray.wait()
        node.end_orphans()
        assert orphan.wait(60) == -9 and other.poll() is None
    finally:
        for process in (orphan, other):
            process.kill()
            process.wait()


@pytest.fixture
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """`connected` sets these; they are put back."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))


@pytest.mark.usefixtures("no_token")
@pytest.mark.parametrize(
    ("reason", "deadline_s", "starts", "sentence"),
    [
        (
            "The current node timed out during startup\nand more",
            0.0,
            1,
            "free processors or memory, or raise cluster.st",
        ),
        (
            "The current node timed out during startup\nand more",
            1.0,  # of which every attempt takes a fifth
            5,
            "free processors or memory, or raise cluster.st",
        ),
        ("No space left on device: '/tmp/ray'", 9.0, 1, "correct that, and start again"),
    ],
)
def test_a_session_that_does_not_start_is_tried_again_and_then_one_sentence(
    monkeypatch: pytest.MonkeyPatch, reason: str, deadline_s: float, starts: int, sentence: str
) -> None:
    """A busy machine: Ray gives its own processes 30 seconds."""
    tried: list[None] = []

    def late(**_: Any) -> None:
        tried.append(None)
        raise Exception(reason)

    monkeypatch.setattr("ray.init", late)
    monkeypatch.setattr("launch.services.ray_session.node._PAUSE_S", 0.01)
    monkeypatch.setattr("opd.deadlines.monotonic", itertools.count(0.0, 0.2).__next__)
    config = impatient(ClusterConfig(), "start_deadline_s", deadline_s or 1e-9)
    with pytest.raises(OpdError, match=rf"Ray did not start on this machine \(Exception: .*\); {sentence}"):  # noqa: SIM117
        with connected(config):
            pass
    assert len(tried) == starts


@pytest.mark.usefixtures("no_token")
def test_what_a_failed_start_has_left_is_ended_and_the_next_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[subprocess.Popen[bytes]] = []

    def second_time() -> None:
        left.append(sleeping("/x/ray/raylet"))
        if len(left) == 1:
            raise Exception(LATE)

    monkeypatch.setattr("launch.services.ray_session.node._PAUSE_S", 0.01)
    start_ray(second_time, 60.0)
    try:
        assert left[0].wait(60) == -9 and left[1].poll() is None
    finally:
        left[1].kill()
        left[1].wait()


@contextmanager
def server(answer: bytes | None) -> Iterator[str]:
    """Somebody at a port who says `answer` to whatever comes, or nothing at all."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with listening.accept()[0] as connection:
                connection.recv(99)
                connection.sendall(answer or b"")

        if answer is not None:
            threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "what answers at .* is not Ray"),
        (b"-ERR unknown command\r\n", "what answers at .* is not Ray"),
        (None, r"127.0.0.1:\d+: no answer"),
    ],
)
def test_somebody_else_at_the_port_is_not_waited_for(answer: bytes | None, sentence: str) -> None:
    with server(answer) as address, pytest.raises(OpdError, match=rf"no Ray session at .* \({sentence}"):
        check_cluster(address, deadline_s=0.5 if answer is None else 60)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_nobody_at_the_port_is_one_sentence_at_once(address: str) -> None:
    with pytest.raises(OpdError, match=r"no Ray session at .* \(.*Connection refused\); start one with `ray start"):
        check_cluster(address)


@pytest.mark.parametrize("address", ["head", "head:", "http://head", "head:port"])
def test_an_address_that_is_none_is_one_sentence(address: str) -> None:
    with pytest.raises(OpdError, match="is not of the form HOST:PORT"):
        check_cluster(address)


def test_a_grpc_server_is_taken_for_a_cluster() -> None:
    with server(b"\x00\x00\x06\x04\x00\x00\x00\x00\x00" + b"\x00\x03\x00\x00\x00\x64") as address:
        check_cluster(address, deadline_s=60)


def session(root: Path, name: str, mark: str | None) -> Path:
    folder = root / f"session_{name}"
    (folder / "logs").mkdir(parents=True)
    if mark is not None:
        (folder / ".opd-driver").write_text(mark)
    return folder


def test_of_temporary_folders_only_those_of_ended_programs_of_ours_go(tmp_path: Path) -> None:
    stay = {"of a cluster": None, "alive": "", "in use": ""}
    go = {"killed": "", "of an older version": f"{os.getpid()}\n1.5"}
    for name, mark in (stay | go).items():
        session(tmp_path, name, mark)
    alive = hold(tmp_path / "session_alive" / ".opd-driver")
    assert alive is not None
    (tmp_path / "session_latest").symlink_to(tmp_path / "session_in use")
    (tmp_path / "elsewhere").mkdir()
    worker = sleeping(str(tmp_path / "session_in use" / "sockets"))
    try:
        node = Node.started_here(str(session(tmp_path, "own", None)))
        Node().tidy()  # of a cluster that was joined
        assert (tmp_path / "session_own").exists()
        assert is_held(tmp_path / "session_own" / ".opd-driver")
        node.tidy()
        node.let_go()
    finally:
        os.close(alive)
        worker.kill()
        worker.wait()
    left = {path.name.removeprefix("session_") for path in tmp_path.iterdir()}
    assert left == {*stay, "latest", "elsewhere"}
