"""Verbs through group and restart: new ranks repeat what lost ones did; observers measure what is published."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ray.exceptions import ActorDiedError

from launch.services.learner_group import LearnerGroup
from launch.services.learner_restart import RankFactory, RestartingLearner
from launch.services.pools import ObservedStudent
from learner.config import LearnerConfig
from learner.learner import LearnerRank
from opd.loss.readings import StudentEntropy
from opd.ports import PublishedWeights, WeightAck
from opd.settings.devices import Dtype
from tests.integration.learner.test_learner_faults import equal
from tests.integration.learner.test_learner_verbs import Contents, config_of
from tests.small_learner import STAGES, Likelihood, Start, batches_of
from weight_sync.receiver import collect


class Local:
    """A rank of this process as Ray shows it; it dies when a verb of `deaths` has been done, before it answers."""

    def __init__(self, rank: LearnerRank, deaths: list[str]) -> None:
        self._rank, self._deaths, self._dead = rank, deaths, False

    def __getattr__(self, name: str) -> Any:
        async def remote(*arguments: Any, **options: Any) -> Any:
            if not self._dead and name != "setup":  # it is set up already
                answer = getattr(self._rank, name)(*arguments, **options)
                if not self._deaths or name != self._deaths[0]:
                    return answer
                self._deaths.pop(0)
                self._dead = True
            if self._dead:
                raise ActorDiedError()
            return None

        return SimpleNamespace(remote=remote)


class LocalGroup(LearnerGroup):
    """Its ranks are objects of this process, so that there is nothing to kill."""

    def end(self) -> None:
        pass


async def everything(learner: RestartingLearner, config: LearnerConfig, folder: Path, saved: int) -> list[Any]:
    """Every verb that changes a learner, in an order in which each depends on the ones before."""
    answers: list[Any] = []
    for number in range(4):
        answers.append(await learner.step(batches_of(number, config), Likelihood()))
        if number == 0:
            await learner.snapshot("one", optimizer=True)
        if number == 1:
            await learner.snapshot("two")
            await learner.extrapolate("one", 0.5)
        if number == saved:
            await learner.save(folder / "learner", number)
            await learner.written()
            await learner.kept(folder / "learner")
        answers.append(await learner.score(batches_of(7, config)))
        answers.append(await learner.read(batches_of(7, config), [StudentEntropy()]))
    await learner.restore("one")
    answers.append(await learner.step(batches_of(4, config), Likelihood()))
    await learner.extrapolate("two", -0.25)
    return answers


@pytest.mark.parametrize("saved", [9, 1], ids=["from the start", "from a checkpoint with snapshots"])
@pytest.mark.parametrize(
    "deaths",
    [["snapshot"], ["extrapolate"], ["restore"], ["step", "snapshot", "score", "read", "extrapolate", "restore"]],
    ids=" ".join,
)
@pytest.mark.parametrize(("stage", "dtype"), [STAGES[0], STAGES[5]], ids=str)
def test_new_ranks_repeat_what_lost_ones_did_bit_for_bit(
    stage: int, dtype: Dtype, deaths: list[str], saved: int, models: dict[str, Path], start: Start, tmp_path: Path,
    contents: Contents,
) -> None:  # fmt: skip
    """Ranks, group, restart and log are the real ones; only Ray is not there."""
    config = config_of(stage, dtype, warmup_steps=4)

    def learned(planned: list[str], folder: Path) -> tuple[list[Any], dict[str, torch.Tensor], list[str]]:
        ranks: list[LearnerRank] = []

        def make() -> LocalGroup:
            ranks.append(start(config, models["tied"]))
            return LocalGroup([Local(ranks[-1], planned)], config)

        async def whole(_: Path) -> None:
            pass

        (folder / "learner").mkdir(parents=True)
        learner = RestartingLearner(RankFactory(make=make, check=whole), 9, 1 << 30)
        answers = asyncio.run(everything(learner, config, folder, saved))
        return answers, contents(ranks[-1]), learner.history

    straight, expected, none = learned([], tmp_path / "straight")
    planned = [*deaths]
    answers, found, history = learned(planned, tmp_path / "deaths")
    assert not none and not planned and len(history) == len(deaths)
    assert str(answers) == str(straight) and equal(found, expected)


@dataclass
class ChangeNorm:
    """An observer of weights: how far each version is from the one before, in the Euclidean norm of all parameters."""

    norms: list[float] = field(default_factory=list)
    last: dict[str, torch.Tensor] = field(default_factory=dict)

    async def receive(self, weights: PublishedWeights) -> None:
        now = {name: p.clone() for name, p in collect(weights, np.asarray, "a test").tensors()}
        if self.last:
            self.norms.append(sum(float((now[name] - self.last[name]).square().sum()) for name in now) ** 0.5)
        self.last = now


class Engine:
    """Takes any weights."""

    async def generate(self, requests: list) -> list:
        return []

    async def receive(self, weights: PublishedWeights) -> WeightAck:
        return WeightAck(version=weights.version, digest=weights.digest, gap=0.0)


def test_whatever_receives_versions_may_measure_them(models: dict[str, Path], start: Start) -> None:
    config = config_of(2, Dtype.FLOAT32)
    rank, observer = start(config, models["tied"]), ChangeNorm()
    student = ObservedStudent(Engine(), observers=[observer])

    async def main() -> None:
        learner = LocalGroup([Local(rank, [])], config)
        await learner.snapshot("start")
        await learner.publish(student, 0)
        await learner.step(batches_of(0, config), Likelihood())
        await learner.publish(student, 1)
        await learner.publish(student, 1)  # as a run does that goes on
        await learner.extrapolate("start", 1.0)
        await learner.publish(student, 2)
        await learner.restore("start")
        await learner.publish(student, 3)

    asyncio.run(main())
    moved, again, doubled, back = observer.norms
    assert moved > 0 and again == 0
    assert (doubled, back) == pytest.approx((moved, 2 * moved), rel=1e-5)
