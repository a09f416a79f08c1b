"""OPD2: what tuning changed in a teacher, counted where it agrees with plain distillation."""

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from launch.config.run_config import run_config
from opd.certify.engines import RequestLog, engines
from opd.certify.fitting import teacher_names
from opd.certify.worlds import make_world
from opd.loss.chunked import StudentLogits
from opd.method.method import Method
from opd.objectives.delta import DeltaReverseKL, Reward
from opd.objectives.sampled import LogprobSource, SampledReverseKL
from opd.ports import Need, Role
from opd.rollouts.student import StudentRollout
from opd.scorers.delta import TeacherDelta
from opd.scorers.ensemble import ContextIds
from opd.scorers.teacher import SampledTokens
from opd.types import DeltaScores
from tests.unit.loop.test_loop import Bench
from tests.unit.methods.test_objectives import every_token, outcome, said, world

WORLD = make_world(0, names=("base", "default"), named=frozenset({"base"}))
ROLLOUT = StudentRollout(max_tokens=3, record_topk=4)
PLAIN = SampledReverseKL(signal=LogprobSource.STUDENT)


def test_what_is_kept_of_a_delta_by_hand() -> None:
    """Two ids, p = (1/4, 3/4). Teacher (1/2, 1/2), base (1/4, 3/4): both signals favor the first id."""
    p, q = torch.tensor([0.25, 0.75]).double().log(), torch.tensor([0.5, 0.5]).double().log()
    every, student = torch.arange(2), StudentLogits(logits=p.expand(2, 2).clone().requires_grad_())
    support = every.expand(2, 2)

    def kept(base: list[float], **settings: Any) -> list[float]:
        b = torch.tensor(base).double().log()
        scores = DeltaScores(
            logprobs=q, topk_ids=support, topk_logprobs=q.expand(2, 2), base=b, topk_base=b.expand(2, 2)
        )
        batch = replace(every_token(world(0), said(DeltaScores, world(0))).rows(0, 2), scores=scores)
        batch = replace(batch, target_ids=every, behavior_logprobs=p)
        return (-DeltaReverseKL(**settings)(student, batch).loss).tolist()

    up, down = np.log(2.0), np.log(2 / 3)  # log q - log base; less the mean under p
    mean = 0.25 * up + 0.75 * down
    assert kept([0.25, 0.75]) == pytest.approx([up - mean, down - mean])
    assert kept([0.25, 0.75], center=False, coefficient=0.5) == pytest.approx([up / 2, down / 2])
    assert kept([0.75, 0.25]) == [0.0, 0.0]  # tuning went the other way
    away = [np.log(2 / 3), np.log(2.0)]
    mean = 0.25 * away[0] + 0.75 * away[1]
    assert kept([0.75, 0.25], agree=False) == pytest.approx([away[0] - mean, away[1] - mean])


@pytest.mark.parametrize("stale", [False, True])
def test_the_log_ratio_as_it_is_is_the_plain_estimate_bit_for_bit(stale: bool) -> None:
    w = world(2, stale=stale)
    assert torch.equal(outcome(DeltaReverseKL(reward=Reward.LOG_RATIO, center=False), w).loss, outcome(PLAIN, w).loss)


@pytest.mark.parametrize("reads", list(ContextIds))
def test_teacher_and_base_score_the_same_tokens_each_in_its_context(reads: ContextIds) -> None:
    log = RequestLog()
    context = engines(WORLD, log)
    group = [p for p in WORLD.prompts if p.id == WORLD.prompts[0].id][:3]
    texts = asyncio.run(ROLLOUT(group, context))
    found: Any = asyncio.run(TeacherDelta(base_reads=reads)(texts, context))
    asked = {name: {r.context_ids.tobytes() for n, r in log.score_requests if n == name} for name in WORLD.teachers}
    assert asked == {"default": {group[0].teacher_ids.tobytes()}, "base": {reads.of(group[0]).tobytes()}}
    for text, scores in zip(texts, found, strict=True):
        (rows,) = WORLD.teachers["base"].logprobs([(reads.of(text.prompt), text.token_ids)])
        own = rows.gather(-1, torch.from_numpy(text.token_ids).long()[:, None])[:, 0]
        np.testing.assert_allclose(scores.base, own.numpy(), atol=1e-6)
        np.testing.assert_allclose(
            scores.topk_base, rows.gather(-1, torch.from_numpy(np.asarray(scores.topk_ids)).long()).numpy(), atol=1e-6
        )


def test_a_method_needs_the_base_by_name_and_the_certificate_routes_no_prompt_to_it() -> None:
    method = run_config(["experiment=shop", "method=opd2", "teachers.base.path=${student.path}"]).method
    assert method.scorer.needs_engines == {Need(Role.READER), Need(Role.READER, "base")}
    assert teacher_names(method) == ("default", "base")
    assert {p.teacher for p in WORLD.prompts} == {"default"}
    assert {p.teacher for p in replace(WORLD, named=frozenset()).prompts} == {"base", "default"}


def test_a_base_that_is_its_teacher_teaches_nothing_and_a_log_ratio_trains_as_plain_distillation(make: Any) -> None:
    tables = []
    rollout, plain = StudentRollout(max_tokens=8, record_topk=3), DeltaReverseKL(reward=Reward.LOG_RATIO, center=False)
    for scorer, objective in ((TeacherDelta(), plain), (SampledTokens(), PLAIN), (TeacherDelta(), DeltaReverseKL())):
        bench = Bench(make)
        before = bench.learner.table.clone()
        (teacher,) = bench.engines.teachers.values()
        bench.engines = replace(bench.engines, teachers={"default": teacher, "base": teacher})
        asyncio.run(bench.run(Method(name="m", rollout=rollout, scorer=scorer, objective=objective), 3))
        tables.append(bench.learner.table)
    assert torch.equal(tables[0], tables[1]) and torch.equal(tables[2], before)
