"""A learner that outlives its ranks: what new ones do again, in which order, and when the run ends all the same."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.services.learner_group import RanksLost
from launch.services.learner_restart import RankFactory, RestartingLearner
from launch.services.replay_log import ReplayLog
from launch.services.replicas import Fault
from opd.errors import DataError, OpdError
from opd.ports import Call, Layout, Learner, Manifest, PublishedWeights, PublishReport, Rank, Sentinel
from opd.types import Batch, HiddenScores, RemoteRows, StepReport, nbytes

NO_VERSION: Any = None  # no objective, no engine is looked at here


def batch(number: int, trained: int = 4) -> list[list[Batch[Any]]]:
    """What one rank gets for a step; its tokens name the step. Hidden states of 100 bytes a row lie elsewhere."""
    rows = RemoteRows(pieces=((f"handle {number}", np.arange(trained)),), row_nbytes=100)
    scores = HiddenScores(logprobs=np.zeros(trained, np.float32), hidden=rows)
    ids, floats = np.full(trained, number, np.int32), np.zeros(trained, np.float32)
    made = Batch(
        input_ids=ids, position_ids=ids, cu_seqlens=np.array([0, trained], np.int32), predict_at=ids, target_ids=ids,
        behavior_logprobs=floats, weights=floats, depth=ids, scores=scores, denominator=1.0,
    )  # fmt: skip
    return [[made]]


def weights(version: int, digest: str) -> PublishedWeights:
    sentinel = Sentinel(ids=np.zeros(2, np.int32), logprobs=np.zeros(1, np.float32), tolerance=1.0)
    return PublishedWeights(
        version=version,
        manifest=Manifest(names=(), dtypes=(), shapes=(), nbytes=0),
        chunks=(),
        digest=digest,
        sentinel=sentinel,
    )


@dataclass
class World:
    """Makes ranks, and decides in which calls they die: `faults` has the name of a call, once per death."""

    faults: list[str] = field(default_factory=list)
    generations: list["FakeRanks"] = field(default_factory=list)
    renewed: list[tuple[int, str]] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    disk: dict[str, tuple[int, ...]] = field(default_factory=dict)  # folder -> the steps in its checkpoint
    repeats: bool = True
    broken: Exception | None = None  # what new ranks say to a step

    def make(self) -> "FakeRanks":
        self.generations.append(FakeRanks(self))
        return self.generations[-1]

    def recipe(self) -> RankFactory:
        return RankFactory(
            make=self.make,
            renew=lambda weights: self.renewed.append((weights.version, weights.digest)),
            check=self.check,
        )

    async def check(self, folder: Path) -> None:
        self.checked.append(folder.name)

    @property
    def calls(self) -> list[list[str]]:
        """What each generation was asked."""
        return [ranks.calls for ranks in self.generations]


@dataclass
class FakeRanks(Learner):
    """Ranks whose weights are the steps they took."""

    world: World
    steps: tuple[int, ...] = ()
    calls: list[str] = field(default_factory=list)
    alive: bool = True
    layout: Layout = field(default_factory=lambda: Layout(ranks=1, tokens_per_microbatch=64))
    saving: tuple[str, tuple[int, ...]] = ("", ())

    def _say(self, what: str) -> None:
        self.calls.append(what)
        if what in self.world.faults:
            self.world.faults.remove(what)
            self.alive = False
        if not self.alive:
            raise RanksLost(Fault.DIED, "a learner rank died (ActorDiedError)")

    async def setup(self) -> None:
        self._say("setup")

    async def call(self, call: Call[Any]) -> list[Any]:
        """The verbs of rank 0, the only one."""
        return [getattr(self, f"_{call.name}")(*call.of(0), **call.options)]

    def _step(self, batches: Sequence[Batch[Any]], objective: Any) -> StepReport:
        number = int(batches[0].input_ids[0])
        self._say(f"step {number}")
        if self.world.broken is not None and len(self.world.generations) > 1:
            raise self.world.broken
        self.steps = (*self.steps, number)
        return StepReport(loss=float(hash(self.steps)), grad_norm=0.0, lr=0.0, tokens=1, trained_tokens=1, metrics={})

    def _evaluate(self, batches: Any, objective: Any) -> dict[str, float]:
        self._say("evaluate")
        return {"loss": float(hash(self.steps))}

    def _score(self, batches: Any) -> list[Any]:
        self._say("score")
        return []

    def _snapshot(self, name: str, *, optimizer: bool = False) -> None:
        self._say(f"snapshot {name} {optimizer}")

    def _extrapolate(self, name: str, factor: float) -> None:
        self._say(f"extrapolate {name} {factor}")
        self.steps = (*self.steps, int(-100 * factor))

    async def share(self, version: int) -> PublishedWeights:
        self._say(f"share {version}")
        return weights(version, self._digest())

    async def publish(self, student: Any, version: int) -> PublishReport:
        self._say(f"publish {version}")
        return PublishReport(version=version, gap=0.0, nbytes=0, digest=self._digest())

    def _digest(self) -> str:
        return f"{self.steps}" + ("" if self.world.repeats else f" {len(self.world.generations)}")

    def _save(self, directory: Path, step: int) -> None:
        self._say(f"save {step}")
        self.saving = directory.name, self.steps

    def _written(self) -> tuple[str, str]:
        self._say("written")
        name, self.world.disk[name] = self.saving
        return "rank_0.safetensors", ""

    def _load(self, directory: Path) -> int:
        self._say(f"load {directory.name}")
        self.steps = self.world.disk[directory.name]
        return len(self.steps)

    def _export(self, directory: Path) -> None:
        self._say("export")

    def end(self) -> None:
        self.calls.append("end")
        self.alive = False


def play(
    world: World,
    work: Callable[[RestartingLearner], Awaitable[None]],
    restarts: int = 8,
    replay_log_bytes: int = 1 << 20,
) -> RestartingLearner:
    learner = RestartingLearner(world.recipe(), restarts, replay_log_bytes)

    async def main() -> None:
        async with asyncio.timeout(5):
            await learner.setup()
            await work(learner)

    asyncio.run(main())
    return learner


async def steps(learner: RestartingLearner, *numbers: int) -> None:
    for number in numbers:
        await learner.step(batch(number), NO_VERSION)
        await learner.publish(NO_VERSION, number)


async def checkpoint(learner: RestartingLearner, step: int) -> None:
    await learner.save(Path(f"step_{step}"), step)
    await learner.written()
    await learner.kept(Path(f"step_{step}"))


def test_new_ranks_take_the_steps_since_the_beginning_again_in_order() -> None:
    world = World(["step 3"])
    learner = play(world, lambda learner: steps(learner, 1, 2, 3, 4))
    first, second = world.calls
    assert first == ["setup", "step 1", "publish 1", "step 2", "publish 2", "step 3", "end"]
    assert second == ["setup", "step 1", "step 2", "share 2", "step 3", "publish 3", "step 4", "publish 4"]
    assert world.generations[-1].steps == (1, 2, 3, 4) and world.renewed == [(2, "(1, 2)")]
    assert learner.history == [
        "a learner rank died (ActorDiedError), before step 3 was answered; all ranks start anew from the student they "
        "began with (calls to repeat: 2)"
    ]


def test_new_ranks_repeat_in_order_what_changed_the_state_and_nothing_else() -> None:
    world = World(["extrapolate a 0.5", "score"])

    async def work(learner: RestartingLearner) -> None:
        await learner.snapshot("a", optimizer=True)
        await steps(learner, 1)
        await learner.evaluate(batch(9), NO_VERSION)
        await learner.extrapolate("a", 0.5)
        await learner.step(batch(2), NO_VERSION)
        await learner.score(batch(9))

    learner = play(world, work)
    changing = ["snapshot a True", "step 1", "extrapolate a 0.5", "step 2"]
    assert world.calls[1] == ["setup", *changing[:2], "share 1", *changing[2:], "score", "end"]
    assert world.calls[2] == ["setup", *changing, "share 1", "score"]
    assert [line.split(", before ")[1].split(" was")[0] for line in learner.history] == ["extrapolate 1", "score"]
    assert "calls to repeat: 2" in learner.history[0] and "calls to repeat: 4" in learner.history[1]


def test_steps_that_are_in_a_whole_checkpoint_are_not_taken_again() -> None:
    world = World(["step 5"])

    async def work(learner: RestartingLearner) -> None:
        await steps(learner, 1, 2)
        await checkpoint(learner, 2)
        await steps(learner, 3)
        await learner.save(Path("step_3"), 3)
        await steps(learner, 4)  # taken before the next checkpoint is whole: it has step 3, but not this one
        await learner.written()
        await learner.kept(Path("step_3"))
        await steps(learner, 5)

    play(world, work)
    assert world.calls[1] == ["setup", "load step_3", "step 4", "share 4", "step 5", "publish 5"]
    assert world.checked == ["step_3"], "the checkpoint was not looked at before it was read"
    assert world.generations[-1].steps == (1, 2, 3, 4, 5)


def test_a_checkpoint_that_is_being_written_is_no_checkpoint() -> None:
    world = World(["written", "step 4"])

    async def work(learner: RestartingLearner) -> None:
        await steps(learner, 1)
        await checkpoint_given_up(learner, 1)
        await steps(learner, 2)
        await checkpoint(learner, 2)
        await steps(learner, 3, 4)

    async def checkpoint_given_up(learner: RestartingLearner, step: int) -> None:
        await learner.save(Path(f"step_{step}"), step)
        with pytest.raises(RanksLost):
            await learner.written()

    learner = play(world, work)
    assert world.calls[0][-2:] == ["written", "end"], "somebody asked who is gone"
    assert world.calls[1][:5] == ["setup", "step 1", "share 1", "step 2", "publish 2"]
    assert world.calls[2] == ["setup", "load step_2", "step 3", "share 3", "step 4", "publish 4"]
    assert len(learner.history) == 2


def test_a_checkpoint_is_given_up_also_when_its_writers_took_the_last_restart() -> None:
    world = World(["step 2"])

    async def work(learner: RestartingLearner) -> None:
        await steps(learner, 1)
        await learner.save(Path("step_1"), 1)
        gate = asyncio.Event()

        async def written(call: Call[Any], ranks: FakeRanks = world.generations[0]) -> list[Any]:
            if call.verb is Rank.written:
                await gate.wait()
            return await FakeRanks.call(ranks, call)

        world.generations[0].call = written  # type: ignore[method-assign]
        writing = asyncio.create_task(learner.written())
        await asyncio.sleep(0)
        await steps(learner, 2)  # the one restart there is
        gate.set()
        with pytest.raises(RanksLost):
            await writing
        await steps(learner, 3)

    assert len(play(world, work, restarts=1).history) == 1


def test_a_resumed_learner_begins_again_where_it_was_resumed() -> None:
    world = World(["step 8"], disk={"step_6": (1, 2, 3, 4, 5, 6)})

    async def work(learner: RestartingLearner) -> None:
        await learner.load(Path("step_6"))
        await steps(learner, 7, 8)

    play(world, work)
    assert world.calls[1] == ["setup", "load step_6", "step 7", "share 7", "step 8", "publish 8"]


@pytest.mark.parametrize("verb", ["evaluate", "publish 2", "save 2", "export"])
def test_every_verb_is_asked_again(verb: str) -> None:
    world = World([verb])

    async def work(learner: RestartingLearner) -> None:
        await steps(learner, 1, 2)
        loss = await learner.evaluate(batch(9), NO_VERSION)
        assert loss == {"loss": float(hash((1, 2)))}
        await checkpoint(learner, 2)
        await learner.export(Path("export"))

    play(world, work)
    assert [calls.count(verb) for calls in world.calls] == [1, 1]
    assert world.generations[-1].steps == (1, 2)


@pytest.mark.parametrize("place", ["step 3", "step 1", "setup", "share 2"])
def test_ranks_that_are_lost_twice_in_one_place_end_the_run(place: str) -> None:
    """`step 3` is what is asked; the others are on the way back to it."""
    world = World()

    async def work(learner: RestartingLearner) -> None:
        await steps(learner, 1, 2)
        world.faults = ["step 3", place] if place == "step 3" else ["step 3", place, place]
        with pytest.raises(OpdError, match=r"^a learner rank died .* because ranks were lost in .* before"):
            await steps(learner, 3)

    play(world, work)


def test_deaths_in_different_calls_are_bad_luck_up_to_the_limit() -> None:
    world = World(["step 1", "step 2", "step 3", "step 4"])

    async def work(learner: RestartingLearner) -> None:
        await steps(learner, 1, 2, 3)
        with pytest.raises(OpdError, match=r"no other rank can take its place after 3 restarts \(cluster.restarts\)"):
            await steps(learner, 4)

    assert len(play(world, work, restarts=3).history) == 3


@pytest.mark.parametrize("verb", ["step 1", "written"])
def test_without_restarts_a_death_ends_the_run_and_nothing_is_kept(verb: str) -> None:
    world = World([verb])

    async def work(learner: RestartingLearner) -> None:
        if verb == "written":
            await steps(learner, 1)
            await learner.save(Path("step_1"), 1)
        ask = learner.written() if verb == "written" else steps(learner, 1)
        with pytest.raises(OpdError, match=r"no other rank can take its place \(cluster.restarts=0\)") as caught:
            await ask
        assert type(caught.value) is OpdError
        assert not learner._replay_log.calls

    play(world, work, restarts=0)
    assert len(world.generations) == 1


@pytest.mark.parametrize("saved", [True, False])
def test_more_than_the_bytes_allowed_is_let_go_of_until_the_next_checkpoint(
    saved: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A step here is 400 bytes of hidden states and a few of arrays."""
    one = nbytes(batch(1)[0][0])
    assert 400 < one < 600

    async def work(learner: RestartingLearner) -> None:
        await steps(learner, 1, 2)
        assert len(learner._replay_log.calls) == 2 and not caplog.text
        await steps(learner, 3, 4)
        assert not learner._replay_log.calls and caplog.text.count("cluster.replay_log_bytes") == 1
        await learner.save(Path("step_4"), 4)
        await steps(learner, 5)
        world.faults = ["step 6"]
        if saved:
            await learner.written()
            await learner.kept(Path("step_4"))
            await steps(learner, 6)
        else:
            with pytest.raises(
                OpdError, match=r"more than cluster.replay_log_bytes=\d+ \(set a smaller checkpoint_every"
            ):
                await steps(learner, 6)

    world = World()
    play(world, work, replay_log_bytes=2 * one)


def test_a_checkpoint_after_which_too_much_came_does_not_lead_to_now() -> None:
    journal = ReplayLog(most=2 * nbytes(batch(1)[0][0]))
    journal.add(Call.scatter(Rank.step, batch(1), NO_VERSION))
    journal.saving()
    for number in (2, 3, 4):
        journal.add(Call.scatter(Rank.step, batch(number), NO_VERSION))
    journal.kept(Path("step_1"))
    assert not journal.whole
    journal.saving()
    journal.kept(Path("step_4"))
    assert journal.whole and not journal.calls


def test_weights_that_came_out_otherwise_are_not_handed_to_new_engines(caplog: pytest.LogCaptureFixture) -> None:
    world = World(["step 2"], repeats=False)
    play(world, lambda learner: steps(learner, 1, 2))
    assert world.renewed == [] and "an engine that starts now serves from the next version on" in caplog.text


def test_what_is_no_death_ends_the_run_as_it_is() -> None:
    for error in (DataError("no number"), OpdError("out of memory")):
        world = World(["step 2"], broken=error)

        async def work(learner: RestartingLearner, error: Exception = error) -> None:
            with pytest.raises(type(error), match=str(error)):
                await steps(learner, 1, 2)

        play(world, work)


def test_hidden_states_that_are_gone_too_are_one_sentence() -> None:
    from ray.exceptions import OwnerDiedError

    world = World(["step 2"], broken=OwnerDiedError("0" * 56, None, ""))  # type: ignore[arg-type]

    async def work(learner: RestartingLearner) -> None:
        with pytest.raises(OpdError, match=r"cannot do step 1 again, because a teacher's scores of it are gone"):
            await steps(learner, 1, 2)

    play(world, work)


def test_a_checkpoint_is_not_taken_away_from_ranks_that_start() -> None:
    """What is removed when a checkpoint becomes whole is what new ranks may be reading."""
    world, order = World(["step 2"]), list[str]()
    gate = asyncio.Event()

    async def work(learner: RestartingLearner) -> None:
        await steps(learner, 1)
        await learner.save(Path("step_1"), 1)
        await learner.written()
        slow = FakeRanks.setup

        async def setup(ranks: FakeRanks) -> None:
            await gate.wait()
            await slow(ranks)
            order.append("up")

        FakeRanks.setup = setup
        try:
            going = asyncio.create_task(steps(learner, 2))
            await asyncio.sleep(0)
            kept = asyncio.create_task(learner.kept(Path("step_1")))
            kept.add_done_callback(lambda _: order.append("kept"))
            await asyncio.sleep(0.01)
            assert order == []
            gate.set()
            await asyncio.gather(going, kept)
        finally:
            FakeRanks.setup = slow
        assert order == ["up", "kept"]

    play(world, work)
    assert world.calls[1][:2] == ["setup", "step 1"], "it began from what was whole when it began"
