"""Every shipped method trains through the one loop on real parts; one session serves them all."""

import asyncio
import math
from collections.abc import Iterator

import pytest

from launch.config.run_config import run_config
from launch.config.shipped_files import groups
from launch.plan.plan import make_plan
from launch.run.session import Session, open_session
from launch.services.ray_session.cluster import connected
from opd.loop.train import StepRecord, train
from opd.ports import Need, Role, needs_of
from opd.types import NO_VERSION, Scores
from tests.method_needs import NEEDS

SMALL = ["experiment=shop", "prompts.prompts_per_step=8", "prompts.group_size=2", "max_tokens=77"]
START = [  # a term that asks every further teacher
    *NEEDS["reference_kl"],
    *NEEDS["opd2"],
    *(need for need in NEEDS["judged"] if need.startswith("teachers.")),
    "+method.terms.again={scorer: {_target_: opd.scorers.ensemble.Ensemble, "
    "shares: {start: 1.0, base: 1.0, judge: 1.0}, "
    "reader: {_target_: opd.scorers.teacher.SampledTokens}}, objective: {_target_: opd.objectives.sampled.Likelihood}}",
]
# drafts that are written within the student's engine, and rewritten by a teacher that writes
BLENDS = [
    "~method.rollout.student",
    "+method.rollout.student={_target_: opd.rollouts.blended.BlendedRollout, teacher: default, "
    "student: {_target_: opd.rollouts.student.StudentRollout, max_tokens: 77}}",
]


@pytest.fixture(scope="module")
def session() -> Iterator[tuple[Session, asyncio.Runner]]:
    """All actors, with a teacher that can also write, one in the student's engine, and the student of the start."""
    plan = make_plan(run_config([*SMALL, "method=trd", *START, *BLENDS]))
    with connected(plan.config.cluster), asyncio.Runner() as runner:
        opened = runner.run(open_session(plan))
        yield opened, runner
        opened.close()


@pytest.mark.ray
@pytest.mark.parametrize("name", groups()["method"])
def test_a_method_trains(name: str, session: tuple[Session, asyncio.Runner]) -> None:
    opened, runner = session
    config = make_plan(run_config([*SMALL, f"method={name}", *NEEDS.get(name, ())])).config
    records: list[StepRecord] = []

    async def remember(record: StepRecord) -> None:
        records.append(record)

    runner.run(
        train(
            config.method,
            config.prompts,
            opened.plan.sources,
            opened.engines,
            opened.learner,
            [remember],
            start=0,
            steps=2,
        )
    )
    assert [r.step for r in records] == [1, 2]
    for record in records:
        assert math.isfinite(record.report.loss) and math.isfinite(record.report.grad_norm)
        assert record.published.gap < 1e-4
        assert record.ledger["issued"] == record.ledger["trained"] + record.ledger["dropped"]
    rollout = config.method.rollout
    versions = {int(v) for item in records[-1].scored for v in item.trajectory.versions}
    if rollout.on_policy or hasattr(rollout, "guided"):  # the student's, some of it from another context
        assert versions == {1}
    else:  # a teacher's text has no version, nor has a data set's
        assert Need(Role.WRITER) in needs_of(rollout) or name == "golden_data"
        assert versions <= ({NO_VERSION} if name == "sft" else {NO_VERSION, 1})
    if not name.startswith("grpo") and name != "sft":
        assert records[0].report.grad_norm > 0
    own = Need(Role.BLENDED) not in needs_of(rollout)
    told = config.method.scorer.produces is not Scores  # of text without scores no ratio is reported
    if told and not name.startswith("grpo") and own and rollout.on_policy and getattr(rollout, "top_p", 1.0) == 1:
        assert records[0].report.metrics["ratio"] == pytest.approx(1, abs=1e-3)
