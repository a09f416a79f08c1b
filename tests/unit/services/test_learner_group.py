"""How the loss of a rank is told apart from everything else that a rank may say."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError

from launch.services.learner_group import LearnerGroup, RanksLost
from launch.services.replicas import Fault
from learner.config import LearnerConfig
from opd.errors import ConfigurationError, DataError, OpdError
from opd.ports import Call, Manifest, PublishedWeights, Rank, Sentinel, WeightAck, WeightChunk, WeightShard

DEADLINE_S, START_S = 1.0, 3.0  # as short as settings allow
LOAD = Call.broadcast(Rank.load, Path("step_1"))


async def say(answer: Any = None, after_s: float = 0.0) -> Any:
    await asyncio.sleep(after_s)
    if isinstance(answer, BaseException):
        raise answer
    return answer


def rank(**answers: Callable[[], Awaitable[Any]]) -> Any:
    """As Ray shows it: `answers` has what comes of each method."""
    return SimpleNamespace(
        **{name: SimpleNamespace(remote=lambda *_, answer=answer: answer()) for name, answer in answers.items()}
    )


def group(*ranks: Any) -> LearnerGroup:
    async def stack_dump(*actors: Any, error: BaseException | None = None) -> str:
        return f" (where {len(actors)} stood)" if error is None else " (last words)"

    return LearnerGroup(
        ranks, LearnerConfig(ranks=len(ranks), deadline_s=DEADLINE_S, tokens_per_microbatch=64), stack_dump, START_S
    )


def died() -> ActorDiedError:
    return ActorDiedError()


@pytest.mark.parametrize("seen", [(True, True), (True, False)])
def test_ranks_that_do_not_see_the_run_s_folder_are_refused_before_they_load(
    seen: tuple[bool, bool], tmp_path: Path
) -> None:
    """Each looks for a file that is made for it; nothing of it stays."""
    looked, loaded = list[str](), list[int]()

    def look(answer: bool, file: str) -> Awaitable[Any]:
        looked.append(file)
        return say(answer and Path(file).is_file())

    async def load() -> None:
        loaded.append(1)

    ranks = [rank(address=lambda: say(("host", 1)), setup=load) for _ in seen]
    for one, answer in zip(ranks, seen, strict=True):
        one.__ray_call__ = SimpleNamespace(remote=lambda _, file, answer=answer: look(answer, file))
    learner = LearnerGroup(
        ranks, LearnerConfig(ranks=2, deadline_s=DEADLINE_S, tokens_per_microbatch=64), folder=tmp_path
    )
    if all(seen):
        asyncio.run(learner.setup())
    else:
        with pytest.raises(ConfigurationError, match=r"rank 1 does not see .*set output_dir to a folder that all"):
            asyncio.run(learner.setup())
    assert len(set(looked)) == 1 and len(loaded) == 2 * all(seen) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("first", ["the dead one", "its partner"])
def test_a_rank_that_died_is_lost_whoever_is_told_first(first: str) -> None:
    late = 0.05
    one = rank(load=lambda: say(died(), late if first == "its partner" else 0.0))
    other = rank(load=lambda: say(RuntimeError("Connection closed by peer"), 0.0 if first == "its partner" else late))
    with pytest.raises(RanksLost, match=r"^a learner rank died \(ActorDiedError\) \(last words\)$") as caught:
        asyncio.run(group(one, other).call(LOAD))
    assert caught.value.fault is Fault.DIED


def test_a_rank_that_hangs_is_looked_at_with_the_others_and_lost() -> None:
    one, other = rank(load=lambda: say(None, 9.0)), rank(load=say)
    with pytest.raises(RanksLost, match=r"a learner rank did not answer within .* \(where 2 stood\)$") as caught:
        asyncio.run(group(one, other).call(LOAD))
    assert caught.value.fault is Fault.HUNG


@pytest.mark.parametrize("seconds", [1.5, 9.0])
def test_ranks_may_take_longer_to_start_than_to_answer(seconds: float) -> None:
    one = rank(address=lambda: say(("host", 1)), setup=lambda: say(None, seconds))
    if seconds < START_S:
        asyncio.run(group(one).setup())
        return
    with pytest.raises(RanksLost, match=r"a learner rank did not answer within 3 s"):
        asyncio.run(group(one).setup())


@pytest.mark.parametrize("error", [DataError("no number"), OpdError("out of memory")])
def test_what_a_rank_says_itself_is_no_loss(error: OpdError) -> None:
    with pytest.raises(type(error), match=str(error)) as caught:
        asyncio.run(group(rank(load=lambda: say(error))).call(LOAD))
    assert not isinstance(caught.value, RanksLost)


class Engine:
    """Cannot read the weights."""

    async def generate(self, requests: list) -> list:
        return []

    async def receive(self, weights: PublishedWeights) -> WeightAck:
        raise DataError("chunk 0 cannot be opened")


@pytest.mark.parametrize("alive", [True, False])
def test_weights_that_nobody_can_read_are_a_lost_rank_if_one_is_gone(alive: bool) -> None:
    sentinel = Sentinel(ids=np.zeros(2, np.int32), logprobs=np.zeros(1, np.float32), tolerance=1.0)
    manifest = Manifest(names=(), dtypes=(), shapes=(), nbytes=0)
    share = WeightShard(version=3, manifest=manifest, chunks=(), sentinel=sentinel)
    one = rank(share=lambda: say(share), busy_s=lambda: say(1.0 if alive else died()))
    kind, says = (DataError, "chunk 0 cannot be opened") if alive else (RanksLost, "a learner rank died")
    with pytest.raises(kind, match=says):
        asyncio.run(group(one).publish(Engine(), 3))


def test_ranks_are_asked_for_what_needs_their_model_in_a_turn_and_for_nothing_else() -> None:
    """Also for their chunks of a publication, but not while engines read those, nor while a file is being written."""
    order = list[str]()

    @asynccontextmanager
    async def turn(*, joins: bool = False) -> AsyncIterator[None]:
        assert joins, "what repeats calls of lost ranks has the turn already"
        order.append("turn")
        yield
        order.append("end")

    def noted(name: str, answer: Any) -> Callable[[], Awaitable[Any]]:
        async def ask() -> Any:
            order.append(name)
            return answer

        return ask

    manifest = Manifest(names=("a",), dtypes=("float32",), shapes=((1,),), nbytes=4)
    sentinel = Sentinel(ids=np.zeros(2, np.int32), logprobs=np.zeros(1, np.float32), tolerance=1.0)
    chunk = WeightChunk(first=0, last=1, nbytes=4, digest="d", owner=0, handle=None)
    shard = WeightShard(version=1, manifest=manifest, chunks=(chunk,), sentinel=sentinel)
    one = rank(
        share=noted("share", shard), written=noted("written", ("f", "d")), load=noted("load", 1),
        offload=noted("offload", None), reload=noted("reload", None),
    )  # fmt: skip
    learner = LearnerGroup([one], LearnerConfig(ranks=1, deadline_s=DEADLINE_S, tokens_per_microbatch=64), turn=turn)

    class Student:
        async def receive(self, weights: PublishedWeights) -> WeightAck:
            order.append("receive")
            return WeightAck(version=weights.version, digest=weights.digest, gap=0.0)

    async def all_of_it() -> None:
        await learner.call(LOAD)
        await learner.call(Call.broadcast(Rank.written))
        await learner.publish(Student(), 1)  # type: ignore[arg-type]
        await learner.sleep()
        await learner.wake()

    asyncio.run(all_of_it())
    asked = ["turn", "load", "end", "written", "turn", "share", "end", "receive", "offload", "reload"]
    assert order == asked
