"""Trajectories of several turns: whose token is whose, what is trained, what is paid, through the whole loop."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd import ports
from opd.certify.certify import certify
from opd.errors import ConfigurationError
from opd.loss.packing import SequenceMean, TokenMean, pack
from opd.method.method import Method, loss_masks
from opd.objectives.sampled import ClippedPolicyGradient, SampledReverseKL
from opd.ports import Completion, Context, Layout, Outcome
from opd.rollouts.environment import EnvironmentRollout, SingleTurn
from opd.rollouts.student import StudentRollout
from opd.scorers.returns import WithReturns
from opd.scorers.reward import GroupAdvantage, task_rewards
from opd.scorers.teacher import SampledTokens, StudentTopK, TeacherTopK
from opd.types import NO_VERSION, Prompt, Scored, StopReason, TokenScores, TopKScores, Trajectory
from tests.unit.loop.test_loop import Bench, Threes


class Digits(Threes):
    """Ids are their own digits, in both directions; every text begins with a 0, as if a template put it there."""

    eos_id = 3

    def encode(self, text: str) -> np.ndarray:
        return np.array([0, *map(int, text)], dtype=np.int32)

    def encode_all(self, prompts: Sequence[Any]) -> list[np.ndarray]:
        raise NotImplementedError


@dataclass(kw_only=True)
class Guess:
    """Pays for every 3 of a turn, and says 2 and 1 while there are turns left. A file of a user's own has no more."""

    turns: int = 2
    seen: list[str] = field(default_factory=list)

    async def reset(self, prompt: Prompt) -> str:
        return ""

    async def step(self, action: str) -> Outcome:
        self.seen.append(action)
        return Outcome(reward=action.count("3") / 8, done=len(self.seen) == self.turns, text="21")


def at_play(make: Any, **environments: Any) -> Bench:
    bench = Bench(make, lr=20.0)
    bench.engines = replace(bench.engines, tokenizer=Digits(), environments=environments)
    return bench


def grpo(rollout: Any) -> Method:
    return Method(name="m", rollout=rollout, scorer=GroupAdvantage(), objective=ClippedPolicyGradient())


def same(a: Trajectory, b: Trajectory) -> bool:
    arrays = ("token_ids", "loss_mask", "versions")
    equal = all(np.array_equal(getattr(a, n), getattr(b, n)) for n in arrays)
    said = np.asarray(a.behavior.logprobs).tobytes() == np.asarray(b.behavior.logprobs).tobytes()
    return bool(equal and said and (a.prompt, a.sample, a.stop, a.digests) == (b.prompt, b.sample, b.stop, b.digests))


def test_a_single_turn_is_the_students_rollout_bit_for_bit(make: Any) -> None:
    """Text, credit and weights: with a grader's environment the loop trains what it always trained."""
    tables, texts, credit = [], [], []
    for rollout in (StudentRollout(max_tokens=8), EnvironmentRollout(max_tokens=8)):
        bench = at_play(make)
        asyncio.run(bench.run(grpo(rollout), 4))
        tables.append(bench.learner.table)
        scored = [item for record in bench.records for item in record.scored]
        texts.append([item.trajectory for item in scored])
        credit.append(np.concatenate([item.scores.advantages for item in scored]))
    assert torch.equal(*tables) and np.array_equal(*credit) and credit[0].any()
    assert all(len(t) == len(u) and same(replace(t, prompt=u.prompt), u) for t, u in zip(*texts, strict=True))
    played = texts[1]
    assert {t.reward is None for t in played if t.stop is StopReason.LENGTH} == {True}, "a cut turn is no action"
    assert {t.reward is None for t in played if t.stop is StopReason.END} == {False}


def test_two_turns_go_through_the_whole_loop_and_their_reward_rises(make: Any) -> None:
    bench = at_play(make, t=Guess)
    rollout = EnvironmentRollout(max_tokens=18, max_turn_tokens=8)
    ledger = asyncio.run(bench.run(grpo(rollout), 30))
    played = [item.trajectory for record in bench.records for item in record.scored]
    twice = [t for t in played if len(t) == 18]
    assert len(twice) > len(played) / 3 and ledger.outstanding == 0
    for t in twice:
        assert t.loss_mask.tolist() == [True] * 8 + [False] * 2 + [True] * 8
        assert t.token_ids[8:10].tolist() == [2, 1], "the observation's own ids, without what begins every text"
        assert t.versions[8:10].tolist() == [NO_VERSION] * 2 and not np.asarray(t.behavior.logprobs)[8:10].any()
        assert {*t.versions[:8].tolist(), *t.versions[10:].tolist()} == {int(t.prompt.id.split("/")[0])}
    ended = [t for t in twice if t.stop is StopReason.END]
    assert ended and all(t.reward == np.sum(t.token_ids == 3) / 8 for t in ended)
    cut = [t for t in twice if t.stop is StopReason.LENGTH]
    assert cut and all(t.reward == np.sum(t.token_ids[:8] == 3) / 8 for t in cut), "the cut turn earned something"
    first, last = (np.mean([t.reward or 0.0 for t in played[s]]) for s in (slice(0, 60), slice(-60, None)))
    assert last > first + 0.2


@dataclass
class Scribe:
    """Writes `length` tokens of its own for every request, and keeps what it was asked."""

    length: int = 3
    ends: bool = True
    topk: bool = False
    asked: list[ports.GenerateRequest] = field(default_factory=list)

    async def receive(self, weights: Any) -> Any:
        raise NotImplementedError

    async def generate(self, requests: Sequence[ports.GenerateRequest]) -> list[Completion]:
        self.asked += requests
        return [self._one(request) for request in requests]

    def _one(self, request: ports.GenerateRequest) -> Completion:
        n = min(self.length, request.sampling.max_tokens)
        logprobs = np.full(n, -1.5, dtype=np.float32)
        ids = np.full(n, 3, dtype=np.int32)
        behavior: TokenScores = TokenScores(logprobs=logprobs)
        if request.sampling.topk:
            support = np.tile(np.array([3, 1], dtype=np.int32), (n, 1))
            behavior = TopKScores(logprobs=logprobs, topk_ids=support, topk_logprobs=np.tile(logprobs, (2, 1)).T)
        stop = StopReason.END if self.ends and n == self.length else StopReason.LENGTH
        versions = np.full(n, 5, dtype=np.int32)
        return Completion(token_ids=ids, behavior=behavior, versions=versions, stop=stop, digests={5: "d"})


@dataclass(kw_only=True)
class Says:
    """Begins with `first`, says `text` after every turn, never ends."""

    first: str = ""
    text: str = "12"

    async def reset(self, prompt: Prompt) -> str:
        return self.first

    async def step(self, action: str) -> Outcome:
        return Outcome(reward=0.5, done=False, text=self.text)


def played(rollout: EnvironmentRollout, scribe: Any, world: Any, make: Any, count: int = 1) -> list[Trajectory]:
    box = Context(
        student=scribe, teachers={}, writers={}, graders={}, tokenizer=Digits(), environments={"t": world}
    )  # fmt: skip
    return asyncio.run(rollout([make.prompt([1, 2], task="t")] * count, box))


@given(
    most=st.integers(1, 40),
    turns=st.integers(1, 6),
    turn=st.integers(0, 5),
    length=st.integers(1, 6),
    text=st.text("12", max_size=5),
    ends=st.booleans(),
)
def test_no_trajectory_is_longer_than_it_may_be(
    most: int, turns: int, turn: int, length: int, text: str, ends: bool
) -> None:
    from tests.conftest import Make

    scribe = Scribe(length=length, ends=ends)
    rollout = EnvironmentRollout(max_tokens=most, max_turns=turns, max_turn_tokens=turn)
    (t,) = played(rollout, scribe, lambda: Says(text=text), Make)
    assert 0 < len(t) <= most and len(scribe.asked) <= turns and t.stop is StopReason.LENGTH
    assert len(t.loss_mask) == len(t.versions) == len(t.behavior.logprobs) == len(t)
    assert t.loss_mask[-1] and (t.versions[t.loss_mask] == 5).all() and (t.versions[~t.loss_mask] == NO_VERSION).all()
    for before, after in zip(scribe.asked, scribe.asked[1:], strict=False):  # what was read is what is trained
        assert np.array_equal(after.context_ids[: len(before.context_ids)], before.context_ids)
    assert np.array_equal(scribe.asked[-1].context_ids[2:], t.token_ids[: len(scribe.asked[-1].context_ids) - 2])
    whole = len(scribe.asked) - (len(t.token_ids[t.loss_mask]) < length * len(scribe.asked) or not ends)
    assert t.reward == (0.5 * whole if whole else None)


def test_every_turn_of_every_sample_has_a_seed_of_its_own(make: Any) -> None:
    scribe = Scribe()
    played(EnvironmentRollout(max_tokens=60, max_turns=3), scribe, Says, make, count=4)
    named = [(r.prompt_id, r.sample) for r in scribe.asked]
    assert len(set(named)) == 12 and named[:4] == [("p", i) for i in range(4)], (
        "the first turn is the student's rollout"
    )


def test_what_an_environment_says_first_stands_behind_the_prompt(make: Any) -> None:
    scribe = Scribe()
    (t,) = played(EnvironmentRollout(max_tokens=10, max_turns=1), scribe, lambda: Says(first="21"), make)
    assert scribe.asked[0].context_ids.tolist() == [1, 2, 2, 1] and scribe.asked[0].sampling.max_tokens == 8
    assert t.token_ids.tolist() == [2, 1, 3, 3, 3] and t.loss_mask.tolist() == [False, False, True, True, True]
    with pytest.raises(ConfigurationError, match=r"gives prompt 'p' more than the 2 tokens .*; raise max_tokens"):
        played(EnvironmentRollout(max_tokens=2), scribe, lambda: Says(first="21"), make)


def test_a_recorded_support_has_a_row_for_every_token(make: Any) -> None:
    rollout = EnvironmentRollout(max_tokens=20, max_turns=2, record_topk=2)
    (t,) = played(rollout, Scribe(), Says, make)
    assert isinstance(t.behavior, TopKScores) and t.behavior.topk_ids.shape == (8, 2) and len(t.behavior.rest) == 8
    assert rollout.records is TopKScores and len(set(t.behavior.topk_ids[3].tolist())) == 2
    Method(name="m", rollout=rollout, scorer=StudentTopK(), objective=SampledReverseKL())


def test_each_trajectory_has_an_environment_of_its_own(make: Any) -> None:
    made: list[Guess] = []

    def new() -> Guess:
        made.append(Guess(turns=3))
        return made[-1]

    rewards = [t.reward for t in played(EnvironmentRollout(max_tokens=60), Scribe(), new, make, count=3)]
    assert [len(world.seen) for world in made] == [3, 3, 3] and rewards == [9 / 8] * 3


def test_only_the_students_tokens_are_trained_and_counted(make: Any) -> None:
    """Whatever stands at an observation's tokens, batch, divisor and gradient are the same."""
    (t,) = played(EnvironmentRollout(max_tokens=20, max_turns=2), Scribe(), Says, make)
    own = t.loss_mask
    batches = []
    for lie in (0.0, -9.0):
        behavior = TokenScores(logprobs=np.where(own, t.behavior.logprobs, lie).astype(np.float32))
        scores = TokenScores(logprobs=np.where(own, -1.0, lie - 1).astype(np.float32))
        scored = [Scored(trajectory=replace(t, behavior=behavior), scores=scores)]
        ((batch,),) = pack(scored, loss_masks(scored), Layout(ranks=1, tokens_per_microbatch=40), TokenMean())
        batches.append(batch)
    first, second = batches
    assert first.denominator == own.sum() == 6 and first.target_ids.tolist() == [3] * 6
    assert first.depth.tolist() == [0, 1, 2, 5, 6, 7] and len(first.input_ids) == 2 + 8 - 1
    assert np.array_equal(first.behavior_logprobs, second.behavior_logprobs)
    assert np.array_equal(first.scores.logprobs, second.scores.logprobs)
    per_sequence = pack(scored, loss_masks(scored), Layout(ranks=1, tokens_per_microbatch=40), SequenceMean())
    assert float(per_sequence[0][0].weights.sum() / per_sequence[0][0].denominator) == pytest.approx(1.0)


def test_returns_earn_nothing_at_an_observation(make: Any) -> None:
    """And stand at none."""
    bench = at_play(make, t=Says)
    (t,) = played(EnvironmentRollout(max_tokens=20, max_turns=2), Scribe(), Says, make)
    (said,) = asyncio.run(WithReturns(k=2, length_normalized=False)([t], bench.engines))
    (asked,) = asyncio.run(TeacherTopK(k=2)([t], bench.engines))
    rewards = np.where(t.loss_mask, asked.logprobs - t.behavior.logprobs, 0)  # type: ignore[attr-defined]
    expected = np.where(t.loss_mask, rewards.sum() - rewards.cumsum(), 0)
    np.testing.assert_allclose(said.returns, expected, rtol=1e-5, atol=1e-5)  # type: ignore[attr-defined]


def test_an_environments_reward_comes_before_a_graders(make: Any) -> None:
    bench = at_play(make, world=Guess)
    mine = make.trajectory([1], [3, 3], prompt=make.prompt([1], task="t"), reward=-2.5, stop=StopReason.LENGTH)
    graded = make.trajectory([1], [3, 2], prompt=make.prompt([1], task="t"))
    cut = make.trajectory([1], [3, 2], prompt=make.prompt([1], task="world"), stop=StopReason.LENGTH)
    assert asyncio.run(task_rewards([mine, graded, cut], bench.engines)) == [-2.5, 0.5, 0.0]


def test_a_task_of_nobody_is_named(make: Any) -> None:
    box = at_play(make, world=Guess).engines
    with pytest.raises(ConfigurationError, match=r"of task 'other', but .* environments \['world'\] and .*'t'"):
        asyncio.run(EnvironmentRollout(max_tokens=8)([make.prompt([1], task="other")], box))


def test_a_method_that_plays_is_certified() -> None:
    """Of its single-turn form, which the enumerated world has; the loss counts what the packing test counts."""
    method = Method(
        name="m", rollout=EnvironmentRollout(max_tokens=8), scorer=SampledTokens(), objective=SampledReverseKL()
    )  # fmt: skip
    assert certify(method).passed


def test_the_single_turn_is_the_graders_view(make: Any) -> None:
    one = SingleTurn(grader=Threes())
    assert asyncio.run(one.reset(make.prompt([1]))) == ""
    assert asyncio.run(one.step("3312")) == Outcome(reward=0.5, done=True)


def test_text_of_two_kinds_of_writers_is_of_published_weights(make: Any) -> None:
    """An observation has no version, and asks for no digest."""
    from opd.loop.staleness import StalenessSchedule, unknown_weights

    (t,) = played(EnvironmentRollout(max_tokens=20, max_turns=2), Scribe(), Says, make)
    assert unknown_weights(t, {5: "d"}) == "" and StalenessSchedule().reject_reason(t, 5, {5: "d"}) == ""
    assert "d was published" in unknown_weights(replace(t, digests={5: "e"}), {5: "d"})
