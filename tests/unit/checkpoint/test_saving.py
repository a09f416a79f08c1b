"""A checkpoint reaches the disk beside training: one at a time, whole or not at all, and no error is lost."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from launch.artifacts.checkpoint_state import DriverState
from launch.artifacts.checkpoint_store import CheckpointStore, verified_state
from launch.artifacts.run_directory import RunDirectory
from launch.checkpoint.best import BestSoFar
from launch.checkpoint.resume import way_on
from launch.checkpoint.saver import Retention, Saver
from launch.config.budget import StopAfter
from launch.config.settings import ClusterConfig
from launch.run.run import Run
from launch.services.learner_group import RanksLost
from launch.services.pools import Follower, ObservedStudent
from launch.services.replicas import Fault
from launch.services.signals import Preempted, StopRequest
from learner.checkpoints import checkpoint
from opd.errors import OpdError
from opd.loop.ledger import Ledger
from opd.ports import Manifest, PublishedWeights, Sentinel, WeightAck


class Ranks:
    """A learner whose file is there when it is told so."""

    def __init__(self) -> None:
        self.begun, self.done, self.error = asyncio.Event(), asyncio.Event(), None
        self.errors: list[Exception] = []  # of the next calls
        self.saved: list[int] = []
        self.kept_in: list[str] = []
        self._folder = Path()

    async def save(self, directory: Path, step: int) -> None:
        self.saved.append(step)
        self.begun.set()
        self._folder = directory

    async def written(self) -> dict[str, str]:
        await self.done.wait()
        if self.errors:
            raise self.errors.pop()
        if self.error is not None:
            raise self.error
        path = self._folder / "rank_0.safetensors"
        path.write_bytes(b"weights")
        return {path.name: checkpoint.digest(path)}

    async def kept(self, directory: Path) -> None:
        assert (directory / "rank_0.safetensors").exists()
        self.kept_in.append(directory.parent.name)


def state(step: int) -> DriverState:
    return DriverState(
        run_name="r", step=step, ledger=Ledger().to_json(), totals={}, wall_s=0.0, teachers={}, config={}
    )


async def _check(saver: Saver) -> None:
    saver.check()


def run(folder: Path, work: Callable[[Saver, Ranks, CheckpointStore], Awaitable[None]], keep: int = 2) -> None:
    async def main() -> None:
        ranks, store = Ranks(), CheckpointStore(folder)
        saver = Saver(store, ranks, {}, Retention(keep=keep, keep_every=0))  # type: ignore[arg-type]
        await work(saver, ranks, store)

    asyncio.run(main())


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    async def work(saver: Saver, ranks: Ranks, store: CheckpointStore) -> None:
        await saver.begin(state(2))  # returns, although nothing is on the disk
        saver.check()
        assert store.steps() == [] and ranks.saved == [2]
        second = asyncio.create_task(saver.begin(state(4)))
        await asyncio.sleep(0.01)
        assert ranks.saved == [2], "the next save did not wait"
        ranks.done.set()
        await second
        assert verified_state(store.path(2)).step == 2 and ranks.saved == [2, 4]
        await saver.begin(state(6))
        await saver.finish()
        assert store.steps() == [6, 4] and ranks.kept_in == ["step_2", "step_4", "step_6"]

    run(tmp_path, work)


@pytest.mark.parametrize("how", ["check", "finish", "begin"])
def test_what_goes_wrong_in_the_background_is_raised_and_leaves_nothing(tmp_path: Path, how: str) -> None:
    async def work(saver: Saver, ranks: Ranks, store: CheckpointStore) -> None:
        ranks.done.set()
        await saver.begin(state(2))
        await saver.finish()
        ranks.error = OpdError("cannot write it: No space left on device")
        await saver.begin(state(4))
        await asyncio.sleep(0.01)
        ask = {"check": _check, "finish": Saver.finish, "begin": lambda saver: saver.begin(state(6))}[how]
        with pytest.raises(OpdError, match="No space left"):
            await ask(saver)
        assert [p.name for p in store.folder.iterdir()] == ["step_2"] and verified_state(store.path(2)).step == 2
        await saver.finish()  # it is said once

    run(tmp_path, work)


@pytest.mark.parametrize("how", ["finished", "failed", "at once"])
def test_a_run_that_fails_keeps_the_checkpoint_under_way_if_it_can(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(saver: Saver, ranks: Ranks, store: CheckpointStore) -> None:
        await saver.begin(state(2))
        if how != "at once":
            ranks.done.set()
        if how == "failed":
            ranks.error = OpdError("a learner rank died")
        await saver.give_up(at_once=how == "at once")
        assert store.steps() == ([2] if how == "finished" else [])
        saver.check()
        await saver.finish()

    run(tmp_path, work)
    assert ("could not be finished (a learner rank died)" in caplog.text) == (how == "failed")


@pytest.mark.parametrize("how", ["training goes on", "last", "lost twice"])
def test_a_checkpoint_is_given_up_with_the_ranks_that_wrote_it(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(saver: Saver, ranks: Ranks, store: CheckpointStore) -> None:
        ranks.done.set()
        ranks.errors = [RanksLost(Fault.DIED, "a learner rank died")] * (2 if how == "lost twice" else 1)
        await saver.begin(state(2))
        if how == "training goes on":
            await asyncio.sleep(0.01)
            saver.check()
            assert list(store.folder.iterdir()) == [] and ranks.kept_in == []
            await saver.begin(state(4))
        if how == "lost twice":
            with pytest.raises(OpdError, match=r"checkpoint of step 2 needs ranks that live .* lost twice"):
                await saver.finish()
        else:
            await saver.finish()
        assert store.steps() == {"training goes on": [4], "last": [2], "lost twice": []}[how]
        assert ranks.saved == ([2, 4] if how == "training goes on" else [2, 2])

    run(tmp_path, work)
    assert "the checkpoint of step 2 is given up with the ranks that wrote it (a learner rank died)" in caplog.text


class SlowStore(CheckpointStore):
    """Its `commit` has begun and waits until it is let go on."""

    begun, go_on = threading.Event(), threading.Event()

    def commit(self, state: DriverState, files: Mapping[str, str]) -> None:
        self.begun.set()
        assert self.go_on.wait(30)
        super().commit(state, files)


def test_a_checkpoint_whose_commit_has_begun_is_not_removed_under_it(tmp_path: Path) -> None:
    async def main() -> None:
        ranks, store = Ranks(), SlowStore(tmp_path)
        saver = Saver(store, ranks, {}, Retention(keep=2, keep_every=0))  # type: ignore[arg-type]
        ranks.done.set()
        await saver.begin(state(2))
        assert await asyncio.to_thread(store.begun.wait, 30)
        ending = asyncio.create_task(saver.give_up(at_once=True))
        for _ in range(5):
            await asyncio.sleep(0)
        store.go_on.set()
        await ending
        assert store.steps() == [2] and verified_state(store.path(2)).step == 2

    asyncio.run(main())


def test_sigterm_while_the_last_checkpoint_is_written_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step is done; the evaluation and the export are left to the resumed run."""
    cancelled: list[bool] = []

    async def all_steps(*arguments: Any, **_: Any) -> None:
        for observer in arguments[5]:
            await observer(SimpleNamespace(step=3, live=True))

    async def main() -> None:
        ranks, run, stop = Ranks(), object.__new__(Run), StopRequest(60.0)
        run._directory, run._stop, run._first = RunDirectory.create(tmp_path, "r"), stop, 0
        run._best = BestSoFar(None)
        run._before, run._meter = None, lambda record: {"step": float(record.step)}  # type: ignore[assignment]
        run._plan, run._ledger = SimpleNamespace(sources=None), None  # type: ignore[assignment]
        run._config = SimpleNamespace(  # type: ignore[assignment]
            checkpoint_keep=2, checkpoint_keep_every=0, checkpoint_every=0, checkpoint_minutes=0, steps=3, seed=0,
            method=None, prompts=None, staleness_schedule=None,
            evaluation=SimpleNamespace(every=0, parts=0), cluster=ClusterConfig(), stop_after=StopAfter(),
        )  # fmt: skip
        session = SimpleNamespace(learner=ranks, followers={}, engines=None)
        training = asyncio.create_task(run._train(session, None, [], SimpleNamespace(apart=nullcontext)))  # type: ignore[arg-type]
        await ranks.begun.wait()
        await asyncio.sleep(0.01)
        stop.signal(lambda: cancelled.append(training.cancel()))
        ranks.done.set()
        with pytest.raises(Preempted, match="after step 3, with a checkpoint"):
            await training
        assert not cancelled and CheckpointStore(run._directory.checkpoints).steps() == [3]

    async def nothing(_: Run) -> dict[str, str]:
        return {}

    monkeypatch.setattr("launch.run.run.train", all_steps)
    monkeypatch.setattr(Run, "_known", nothing)
    monkeypatch.setattr(Run, "_state", lambda run, step, teachers: state(step))
    asyncio.run(main())


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    async def work(saver: Saver, ranks: Ranks, store: CheckpointStore) -> None:
        with pytest.raises(OpdError, match=r"cannot write .*make room or choose another output_dir"):
            await saver.begin(state(2))
        assert ranks.saved == []

    run(tmp_path / "file" / "checkpoints", work)


class Engine:
    """Takes any weights."""

    async def generate(self, requests: list) -> list:
        return []

    async def receive(self, weights: PublishedWeights) -> WeightAck:
        return WeightAck(version=weights.version, digest=weights.digest, gap=0.0)


class CountingFollower(Follower):
    """Notes the versions it is told, where its replicas would be."""

    async def receive(self, weights: PublishedWeights) -> None:
        told: Any = self.replicas
        told.append(weights.version)


def published(version: int) -> PublishedWeights:
    nothing = Sentinel(ids=np.zeros(2, np.int32), logprobs=np.zeros(1, np.float32), tolerance=1.0)
    manifest = Manifest(names=(), dtypes=(), shapes=(), nbytes=0)
    return PublishedWeights(version=version, manifest=manifest, chunks=(), digest="", sentinel=nothing)


def test_a_follower_takes_a_version_in_once_also_when_a_run_goes_on() -> None:
    async def main(seen: int, versions: list[int]) -> list[int]:
        versions_told: Any = []
        told = CountingFollower(replicas=versions_told, every=2, deadline_s=1.0)
        student = ObservedStudent(Engine(), {"default": told})
        student.seen = seen
        for version in versions:
            await student.receive(published(version))
        return list(versions_told)

    assert asyncio.run(main(0, [0, 1, 2, 3, 4])) == [2, 4]
    assert asyncio.run(main(2, [2, 3, 4])) == [4]  # resumed after step 2, whose version is published again


def test_a_follower_does_not_take_a_version_in_twice_when_the_learner_was_lost_meanwhile() -> None:
    class Broken(CountingFollower):
        """The learner is lost while it reads."""

        async def receive(self, weights: PublishedWeights) -> None:
            await super().receive(weights)
            raise OpdError("the learner is gone")

    async def main() -> None:
        versions: Any = []
        student = ObservedStudent(Engine(), {"default": Broken(replicas=versions, every=1, deadline_s=1.0)})
        with pytest.raises(OpdError, match="the learner is gone"):
            await student.receive(published(1))
        with pytest.raises(OpdError, match=r"may have taken in version 1 in part and cannot do so twice"):
            await student.receive(published(1))
        assert versions == [1]

    asyncio.run(main())


class Fills(Ranks):
    """Ranks on a disk with room for so many checkpoints below `checkpoints`."""

    room = 100

    async def written(self) -> dict[str, str]:
        store = self._folder.parents[1]
        if store.name == "checkpoints" and len(list(store.glob("step_*"))) >= self.room:
            raise OpdError("rank 0 cannot write it: No space left on device")
        return await super().written()


ALL = [6, 5, 4, 3]


@pytest.mark.parametrize(
    ("room", "free", "blocked", "expected", "left"),
    [
        (100, 0, 0, "checkpoints", [7, *ALL]),
        (3, 0, 0, "checkpoints", [7, 6, 4]),  # the newest and milestones stay, whatever happens
        (2, 0, 0, "rescued", [6, 4]),
        (3, 10**9, 0, "rescued", ALL),  # it is not for want of room that nothing can be written
        (0, 10**9, 1, "spare", ALL),
        (0, 10**9, 2, "", ALL),
    ],
)
def test_the_last_step_is_saved_where_there_is_room(
    room: int, free: int, blocked: int, expected: str, left: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [tmp_path / "rescued", tmp_path / "spare"]
    for path in places[:blocked]:
        path.touch()  # a file, where a folder should be
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))

    async def main() -> None:
        ranks, store = Fills(), CheckpointStore(tmp_path / "checkpoints")
        saver = Saver(store, ranks, {}, Retention(keep=5, keep_every=4))  # type: ignore[arg-type]
        ranks.done.set()
        for step in sorted(ALL):
            await saver.begin(state(step))
            await saver.finish()
        ranks.room = room
        if expected:
            place = await saver.rescue(state(7), places)
            assert place == tmp_path / expected / "step_7" and verified_state(place).step == 7
        else:
            with pytest.raises(OpdError, match="rank 0 cannot write it"):  # of its own place
                await saver.rescue(state(7), places)
        assert saver.kept == (7 if expected else 6) and store.steps() == left

    asyncio.run(main())


def test_ranks_that_are_lost_write_nowhere(tmp_path: Path) -> None:
    async def work(saver: Saver, ranks: Ranks, store: CheckpointStore) -> None:
        ranks.done.set()
        ranks.errors = [RanksLost(Fault.DIED, "a learner rank died")] * 2
        with pytest.raises(OpdError, match="lost twice"):
            await saver.rescue(state(2), [tmp_path / "rescued"])
        assert ranks.saved == [2, 2] and not (tmp_path / "rescued").exists()

    run(tmp_path / "checkpoints", work)


def test_how_to_go_on_names_what_was_rescued(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, "r")
    CheckpointStore(directory.checkpoints).begin(5)
    CheckpointStore(directory.checkpoints).commit(state(5), {})
    assert f"step 5 is kept in {directory.checkpoints / 'step_5'}: " in way_on(directory)
    elsewhere = tmp_path / "spare" / "step_6"
    said = way_on(directory, elsewhere)
    assert f"step 6 is kept in {elsewhere}, since" in said and f"resume={elsewhere}" in said
