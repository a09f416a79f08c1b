"""A run whose Ray has died ends at once, and its workers with it."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from launch.cluster import connected
from launch.ray_node import Node
from launch.running import beside
from launch.settings import ClusterConfig
from opd.errors import OpdError

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def ray() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(SLEEP)
    yield process
    process.kill()
    process.wait()


def worker(raylet: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(SLEEP, env=os.environ | {"RAY_RAYLET_PID": str(raylet)})


def test_work_beside_a_ray_that_dies_is_cancelled_and_the_reason_raised(
    ray: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.ray_node._PERIOD_S", 0.01)
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

    with pytest.raises(OpdError, match=rf"a process of Ray itself \(number {ray.pid}\) has died"):
        asyncio.run(beside(work(), Node((psutil.Process(ray.pid),)).watch()))
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
        assert await beside(answer(), guard()) == 7
        with pytest.raises(OpdError, match="no"):
            await beside(fail(), guard())
        whole = asyncio.ensure_future(beside(asyncio.sleep(60), guard()))
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
        assert orphan.wait(30) == -9 and other.poll() is None
    finally:
        for process in (orphan, other):
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("local", r"Ray did not start on this machine \(Exception: The current node timed out during startup\); free"),
        ("ray://far", r"no Ray session at cluster.address='ray://far' \(The current node timed out during startup"),
    ],
)
def test_a_session_that_does_not_start_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, address: str, sentence: str
) -> None:
    """A busy machine: Ray gives its own processes 30 seconds."""

    def late(**_: Any) -> None:
        raise Exception("The current node timed out during startup\nand more")

    monkeypatch.setattr("ray.init", late)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    with pytest.raises(OpdError, match=sentence), connected(ClusterConfig(address=address)):
        pass
