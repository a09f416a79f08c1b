"""Target distributions that no window makes: the interpolated teacher of TAID as a scorer, learned as any soft label.

A second user of `TargetScores` beside TOPD, as a part of one's own; what it teaches is compared with forward KL.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import numpy as np
import torch

from opd.certify.certificate import Row
from opd.certify.certify import certify
from opd.certify.checks.invariances import ALONE, check_teacher
from opd.certify.gradients import make_case, relative_difference
from opd.certify.worlds import make_world
from opd.method.method import Method
from opd.method.schedules import LinearSchedule, Schedule, value
from opd.objectives.targets import TargetForwardKL
from opd.ports import AtIds, Context, Need, Role, ScoreKinds
from opd.rollouts.student import StudentRollout
from opd.scorers.teacher import StudentTopK
from opd.token_weights.targets import PerTarget
from opd.types import Scores, TargetScores, TopKScores, Trajectory
from tests.unit.methods.test_hybrids import BOX, WORLD, shipped, step, trained

LINEAR = LinearSchedule(first=0.4, last=1.0)  # published: from 0.4 to 1; its rate that follows the loss is not here


@dataclass(frozen=True, slots=True, kw_only=True)
class InterpolatedLabels:
    """Softmax of `(1 - t) student + t teacher` in logits, the student as it wrote (TAID, arXiv 2501.16937).

    On the recorded top k, over which the target is normalized; of fresh text and k = V it is the paper's.
    """

    needs: ClassVar[type[Scores]] = TopKScores
    produces: ClassVar[type[Scores]] = TargetScores
    requires: ClassVar[ScoreKinds] = frozenset({AtIds})
    needs_engines: ClassVar[frozenset[Need]] = frozenset({Need(Role.READER)})
    min_group: ClassVar[int] = 1

    t: float | Schedule

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        answers = cast(list[TopKScores], await StudentTopK()(trajectories, context))
        return [
            self._labels(cast(TopKScores, one.behavior), answer, value(self.t, context))
            for one, answer in zip(trajectories, answers, strict=True)
        ]

    def _labels(self, own: TopKScores, taught: TopKScores, t: float) -> TargetScores:
        between = (1 - t) * np.asarray(own.topk_logprobs, np.float64) + t * np.asarray(taught.topk_logprobs, np.float64)
        odds = np.exp(between - between.max(-1, keepdims=True))
        probs = odds / odds.sum(-1, keepdims=True)
        return TargetScores(target_ids=own.topk_ids, target_probs=probs, targets=np.ones(len(probs)))


def method(t: Any, k: int = WORLD.vocabulary) -> Method:
    rollout = StudentRollout(max_tokens=8, record_topk=k)
    parts: Any = {"weights": {"targets": PerTarget()}, "objective": TargetForwardKL()}
    return Method(name="taid", rollout=rollout, scorer=InterpolatedLabels(t=t), **parts)


def test_it_is_certified_as_any_method() -> None:
    certificate = certify(method(LINEAR, k=4))
    assert certificate.passed, certificate.failures
    assert "FromTarget" in certificate.promise
    assert {"the teacher matters", "a shifted teacher is noticed"} <= {row.name for row in certificate.rows}


def test_a_scorer_that_hides_its_teacher_is_not_certified() -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Hiding(InterpolatedLabels):
        needs_engines: ClassVar[frozenset[Need]] = frozenset()

    findings = check_teacher(make_case(replace(method(LINEAR, k=4), scorer=Hiding(t=LINEAR)), make_world(0)))
    assert [row.name for row in findings if isinstance(row, Row) and not row.passed] == [ALONE]


def test_at_the_teacher_it_is_the_forward_kl_and_at_the_student_nothing() -> None:
    forward = trained(shipped("full_forward_kl"))
    assert relative_difference(trained(method(1.0)), forward) < 1e-5  # scores are float32
    assert float(trained(method(0.0)).norm()) < 1e-5 * float(forward.norm())


def test_between_them_a_target_is_the_normalized_geometric_mean() -> None:
    for item in step(method(0.3)):
        t, scores = item.trajectory, item.scores
        p = WORLD.student.logprobs([(t.prompt.student_ids, t.token_ids)])[0]
        q = WORLD.teachers[t.prompt.teacher].logprobs([(t.prompt.teacher_ids, t.token_ids)])[0]
        expected = (0.7 * p + 0.3 * q).softmax(-1).gather(-1, torch.from_numpy(scores.target_ids).long())
        np.testing.assert_allclose(scores.target_probs, expected.numpy(), rtol=1e-5)


def test_the_schedule_moves_the_target_from_step_to_step() -> None:
    texts = asyncio.run(method(LINEAR).rollout(WORLD.prompts[:1], BOX))

    def at(scorer: InterpolatedLabels, number: int) -> Any:
        (found,) = asyncio.run(scorer(texts, BOX.at(number)))
        return found.target_probs

    assert np.array_equal(at(InterpolatedLabels(t=LINEAR), 0), at(InterpolatedLabels(t=0.4), 0))
    assert np.array_equal(at(InterpolatedLabels(t=LINEAR), BOX.steps), at(InterpolatedLabels(t=1.0), 0))
