"""Cal-OPD: what of a discrepancy is beyond the teacher's own deviation, and how that deviation is measured."""

import asyncio
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from opd.certify.certify import certify
from opd.certify.engines import RequestLog, engines
from opd.certify.worlds import make_world
from opd.errors import ConfigurationError
from opd.loss.chunked import StudentLogits
from opd.method.method import Method
from opd.method.promises import States
from opd.objectives.calibrated import CalibratedReverseKL
from opd.objectives.sampled import LogprobSource, SampledReverseKL
from opd.rollouts.student import StudentRollout
from opd.scorers.deviation import SelfDeviation
from opd.scorers.teacher import SampledTokens
from opd.types import Batch, DeviationScores, Scores, TokenLoss
from tests.unit.loop.test_loop import Bench
from tests.unit.methods.test_objectives import every_token, outcome, world

WORLD = make_world(0)
ROLLOUT = StudentRollout(max_tokens=3)
PLAIN = SampledReverseKL(signal=LogprobSource.STUDENT)


def test_what_is_kept_of_a_discrepancy_by_hand() -> None:
    """Gaps of 1, 1, -1, -1, 0 and what a relaxation of 2 leaves: toward the student alone counts."""
    w = world(0)
    p = w.z.log_softmax(-1).detach()
    gaps = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0, 1.0, -1.0]).double()
    falls = torch.tensor([0.3, 0.5, 9.0, 0.0, 1.0, 0.0, 0.2]).double()
    rises = torch.tensor([9.0, 0.0, 0.3, 0.7, 1.0, 0.4, 0.0]).double()
    batch = replace(every_token(w, DeviationScores(logprobs=p + gaps, falls=falls, rises=rises)), behavior_logprobs=p)
    result = CalibratedReverseKL(relaxation=2.0)(StudentLogits(logits=w.z.expand(len(p), -1)), batch)
    expected = torch.tensor([-0.4, 0.0, 0.4, 0.0, 0.0, -1.0, 1.0]).double()
    torch.testing.assert_close(result.loss.detach(), expected)
    torch.testing.assert_close(result.metrics["discrepancy_kept"], expected.abs())
    torch.testing.assert_close(result.metrics["discrepancy"], gaps.abs())


@pytest.mark.parametrize("stale", [False, True])
def test_without_a_relaxation_it_is_the_plain_estimate_bit_for_bit(stale: bool) -> None:
    w = world(2, stale=stale)
    assert torch.equal(outcome(CalibratedReverseKL(relaxation=0.0), w).loss, outcome(PLAIN, w).loss)


def test_a_text_is_read_once_plainly_and_once_per_probe_in_its_own_words() -> None:
    log = RequestLog()
    scorer = SelfDeviation(probes={"up": "{prompt} 3", "down": "5 {prompt} {answer}"})
    group = [replace(p, answer="6 2") for p in WORLD.prompts if p.id == WORLD.prompts[0].id][:2]
    context = engines(WORLD, log)
    texts = asyncio.run(ROLLOUT(group, context))
    found: Any = asyncio.run(scorer(texts, context))
    ids = group[0].student_ids.tolist()
    contexts = [group[0].teacher_ids.tolist(), [*ids, 3], [5, *ids, 6, 2]]
    assert [r.context_ids.tolist() for _, r in log.score_requests] == contexts * 2
    own = [[float(row[t, v]) for t, v in enumerate(texts[0].token_ids)] for row in _rows(contexts, texts[0].token_ids)]
    plain, *probed = np.asarray(own)
    shifts = np.asarray([np.zeros(len(plain)), *(other - plain for other in probed)])
    np.testing.assert_allclose(found[0].logprobs, plain, atol=1e-6)
    np.testing.assert_allclose(found[0].falls, -shifts.min(0), atol=1e-6)
    np.testing.assert_allclose(found[0].rises, shifts.max(0), atol=1e-6)
    assert (found[0].falls > 0).any() and (found[0].rises > 0).any()


def _rows(contexts: list[list[int]], token_ids: np.ndarray) -> Any:
    return WORLD.teachers["default"].logprobs([(np.asarray(ids, dtype=np.int32), token_ids) for ids in contexts])


def test_a_probe_that_says_nothing_finds_no_deviation_and_trains_as_plain_distillation_bit_for_bit(make: Any) -> None:
    silent, misled = (SelfDeviation(probes={"probe": text}) for text in ("{prompt}", "{prompt} 3"))
    tables = []
    rollout = StudentRollout(max_tokens=8)
    for scorer, objective in (
        (misled, CalibratedReverseKL(relaxation=0.0)),
        (silent, CalibratedReverseKL()),
        (SampledTokens(), PLAIN),
        (misled, CalibratedReverseKL()),
    ):
        bench = Bench(make)
        asyncio.run(bench.run(Method(name="m", rollout=rollout, scorer=scorer, objective=objective), 3))
        tables.append(bench.learner.table)
    assert torch.equal(tables[0], tables[2]) and torch.equal(tables[1], tables[2])
    assert not torch.equal(tables[3], tables[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class SteadyRewards:
    """-sum_v p sg((log q - log p) / (1 + falls + 2 rises)): rewards count less where the teacher moves under probes."""

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        falls, rises = states.credit.unbind(-1)
        reward = (states.teacher - states.student.detach()) / (1 + falls + 2 * rises)
        return -(states.student.exp() * reward).sum(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SteadyReverseKL:
    """Another objective of the same two numbers, as one of one's own."""

    consumes: ClassVar[type[Scores]] = DeviationScores
    on_policy: ClassVar[bool] = True
    promise: ClassVar[SteadyRewards] = SteadyRewards()

    def __call__(self, student: StudentLogits, batch: Batch[DeviationScores]) -> TokenLoss:
        own, scores = student.at(batch.target_ids), batch.scores
        reward = (scores.logprobs - own.detach()) / (1 + scores.falls + 2 * scores.rises)
        return TokenLoss(loss=-(own - batch.behavior_logprobs).exp() * reward, metrics={"reward": reward})


class Exchanged(SteadyReverseKL):
    """The same, which takes each number for the other."""

    def __call__(self, student: StudentLogits, batch: Batch[DeviationScores]) -> TokenLoss:
        falls, rises = batch.scores.falls, batch.scores.rises
        turned = replace(batch.scores, falls=rises, rises=falls)
        return SteadyReverseKL.__call__(self, student, replace(batch, scores=turned))


@pytest.mark.parametrize("objective", [SteadyReverseKL(), Exchanged()])
def test_an_objective_of_one_s_own_has_both_numbers_in_its_promise(objective: SteadyReverseKL) -> None:
    parts = {"scorer": SelfDeviation(), "objective": objective}
    found = certify(Method(name="steady", rollout=StudentRollout(max_tokens=8), **parts)).failures
    assert ("gradient of the promise" in found) if isinstance(objective, Exchanged) else not found


def test_at_least_one_probe_is_needed() -> None:
    with pytest.raises(ConfigurationError, match="probes"):
        SelfDeviation(probes={})
