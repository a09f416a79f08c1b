"""Updates of several verbs on real ranks: ranks lost between them and a resumed run end bit by bit as without."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.services.learner_restart import RankFactory, RestartingLearner
from learner.config import LearnerConfig
from learner.learner import LearnerRank
from opd.settings.devices import Dtype
from opd.updates.extrapolated import ExtrapolatedStep, Origin
from opd.updates.optimizer import OptimizerStep
from opd.updates.slow_weights import SLOW, SlowWeights
from tests.integration.learner.test_learner_faults import equal
from tests.integration.learner.test_learner_verbs import Contents, config_of
from tests.integration.learner.test_restarted_verbs import Local, LocalGroup
from tests.small_learner import STAGES, Likelihood, Start, batches_of
from tests.unit.loop.test_loop import Bench

STEPS = 4
RULES = {
    "accepted": ExtrapolatedStep(trials=2),
    "paper": ExtrapolatedStep(trials=2, origin=Origin.STEPPED),
    "refused": ExtrapolatedStep(metric="behavior"),  # which no weights change
}


class Runs:
    """Short trainings on ranks of this process."""

    def __init__(self, config: LearnerConfig, model: Path, start: Start, folder: Path) -> None:
        self.config, self.model, self.start, self.folder = config, model, start, folder

    def __call__(self, update: Any, deaths: list[str], *, first: int = 0, saved: int = 99) -> tuple[list[Any], Any]:
        ranks: list[LearnerRank] = []

        def make() -> LocalGroup:
            ranks.append(self.start(self.config, self.model))
            return LocalGroup([Local(ranks[-1], deaths)], self.config)

        async def whole(_: Path) -> None:
            pass

        async def steps() -> list[Any]:
            learner = RestartingLearner(RankFactory(make=make, check=whole), 99, 1 << 30)
            if first:
                assert await learner.load(self.folder / "learner") == first
            context, reports = replace(Bench(None).engines, steps=STEPS), []
            for step in range(first, STEPS):
                batches = batches_of(step, self.config)
                reports.append(await update(learner, batches, Likelihood(), context.at(step)))
                if step + 1 == saved:
                    (self.folder / "learner").mkdir(parents=True)
                    await learner.save(self.folder / "learner", saved)
                    await learner.written()
                    await learner.kept(self.folder / "learner")
            return reports

        return asyncio.run(steps()), ranks[-1]


@pytest.fixture(params=[STAGES[0], STAGES[5]], ids=str)
def runs(request: Any, models: dict[str, Path], start: Start, tmp_path: Path) -> Runs:
    stage, dtype = request.param
    return Runs(config_of(stage, dtype, warmup_steps=4), models["tied"], start, tmp_path)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "deaths",
    [
        ["evaluate"],
        ["extrapolate"],
        ["step", "evaluate", "restore", "extrapolate"],
        ["evaluate", "snapshot", "restore"],
    ],
    ids=" ".join,
)
def test_ranks_that_are_lost_between_the_verbs_of_a_search_change_nothing(
    runs: Runs, rule: str, deaths: list[str], contents: Contents
) -> None:
    straight, rank = runs(RULES[rule], [])
    expected = contents(rank)
    planned = [*deaths]
    reports, rank = runs(RULES[rule], planned, saved=1)  # new ranks begin with a checkpoint's snapshots
    assert not planned and reports == straight and equal(contents(rank), expected)
    accepted = [report.metrics["probes_accepted"] for report in straight if "probes_accepted" in report.metrics]
    assert len(accepted) == 3 and (any(accepted) == (rule != "refused"))


@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_run_searches_from_the_snapshots_of_its_checkpoint(runs: Runs, rule: str, contents: Contents) -> None:
    straight, rank = runs(RULES[rule], [], saved=2)
    expected = contents(rank)
    resumed, rank = runs(RULES[rule], [], first=2)
    assert resumed == straight[2:] and equal(contents(rank), expected)


def test_slow_weights_survive_ranks_lost_between_their_verbs_and_a_resumed_run(runs: Runs, contents: Contents) -> None:
    rule = SlowWeights(period=2, fraction=0.5)
    straight, rank = runs(rule, [])
    expected = contents(rank)
    planned = ["snapshot", "step", "extrapolate", "snapshot"]
    reports, rank = runs(rule, planned, saved=3)  # in the middle of a period
    assert not planned and reports == straight and equal(contents(rank), expected)
    resumed, rank = runs(rule, [], first=3)
    assert resumed == straight[3:] and equal(contents(rank), expected) and any(SLOW in name for name in expected)


@pytest.mark.parametrize("rule", [ExtrapolatedStep(trials=0), ExtrapolatedStep(stride=0.0), RULES["refused"]], ids=str)
def test_no_trial_no_stride_and_refused_candidates_are_plain_steps_bit_for_bit(
    runs: Runs, rule: Any, contents: Contents
) -> None:
    (plain, one), (other, two) = runs(OptimizerStep(), []), runs(rule, [])
    assert [(r.loss, r.grad_norm, r.lr) for r in plain] == [(r.loss, r.grad_norm, r.lr) for r in other]
    found = {name: values for name, values in contents(two).items() if "@" not in name}
    assert equal(found, contents(one))


def test_only_matrices_of_attention_and_feed_forward_modules_jump(
    models: dict[str, Path], start: Start, tmp_path: Path, contents: Contents
) -> None:
    """Of one step: everything else is as after the plain one."""
    config = replace(config_of(2, Dtype.FLOAT32), lr=1e-3)
    found: list[dict[str, torch.Tensor]] = []
    for update in (OptimizerStep(), ExtrapolatedStep(trials=1)):
        rank = start(config, models["untied"])
        learner = LocalGroup([Local(rank, [])], config)
        asyncio.run(update(learner, batches_of(0, config), Likelihood(), Bench(None).engines))
        found.append({name: values for name, values in contents(rank).items() if "@" not in name})
    changed = {name for name, values in found[0].items() if not torch.equal(values, found[1][name])}
    assert changed and all("proj" in name for name in changed)
    assert any("norm" in name for name in found[0]) and any("embed" in name for name in found[0])
