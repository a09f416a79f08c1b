"""Lookahead rewards: a token is credited for the state it leads to, compared with the student's other candidates."""

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from opd.certify.engines import RequestLog, engines
from opd.certify.enumeration import enumerated
from opd.certify.worlds import World, make_world
from opd.loss.chunked import StudentLogits
from opd.loss.packing import TokenMean, pack
from opd.method.method import Method
from opd.objectives.rewarded import CreditedReverseKL
from opd.objectives.sampled import LogprobSource, SampledReverseKL
from opd.ports import Layout
from opd.rollouts.student import StudentRollout
from opd.scorers.lookahead import LookaheadReward, entropy, standing
from opd.scorers.teacher import SampledTokens
from opd.types import CreditScores, Scored, TopKScores
from tests.unit.loop.test_loop import Bench
from tests.unit.methods.test_objectives import every_token, expected_gradient, outcome, said, world

WORLD = make_world(0)
ROLLOUT = StudentRollout(max_tokens=3, record_topk=4)
CONFIDENCES = arrays(np.float64, st.integers(2, 9), elements=st.floats(0, 1))


def credit_of(scorer: LookaheadReward, world: World = WORLD) -> list[np.ndarray]:
    return [item.scores.credit for item in enumerated(ROLLOUT, scorer, world).scored]


@given(CONFIDENCES)
def test_a_groups_rewards_have_mean_zero_and_deviation_one(group: np.ndarray) -> None:
    rewards = np.asarray([standing(own, group, 1e-6) for own in group])
    assert abs(rewards.mean()) < 1e-9 and rewards.std() <= 1 + 1e-9
    if group.std() > 1e-2:
        assert rewards.std() == pytest.approx(1, abs=1e-3)
    if group.std() == 0:
        assert (rewards == 0).all() and standing(0.9, group, 1e-6) == 0


@given(CONFIDENCES.filter(lambda group: group.std() > 1e-2), st.floats(0.1, 9), st.floats(-5, 5))
def test_a_reward_does_not_change_where_all_confidences_are_scaled_and_shifted(
    group: np.ndarray, scale: float, shift: float
) -> None:
    changed = standing(scale * group[0] + shift, scale * group + shift, 1e-12)
    assert changed == pytest.approx(standing(group[0], group, 1e-12), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("threshold", [0.0, 0.2, 1.0])
def test_the_credit_is_that_of_one_prefill_for_every_candidate(threshold: float) -> None:
    """Naively, from the models alone; the certificate has it of every world, this one tells when it looks ahead."""
    found = enumerated(ROLLOUT, LookaheadReward(threshold=threshold), WORLD)
    teacher, looked = WORLD.teachers["default"], 0
    for item in found.scored:
        text, credit = item.trajectory, item.scores.credit
        assert isinstance(text.behavior, TopKScores)
        for t in range(len(text)):
            if t == len(text) - 1 or entropy(text.behavior)[t] <= threshold:
                assert credit[t] == 0
                continue
            ids = [*np.asarray(text.behavior.topk_ids)[t], text.token_ids[t]]
            prefills = [np.concatenate([text.token_ids[:t], [v, 0]]).astype(np.int32) for v in ids]
            rows = teacher.logprobs([(text.prompt.teacher_ids, ids) for ids in prefills])
            *group, own = [float(row[-1].exp().max()) for row in rows]
            assert credit[t] == pytest.approx((own - np.mean(group)) / (np.std(group) + 1e-6), abs=1e-4)
            looked += 1
    assert looked > 0


def test_what_follows_a_token_in_its_text_does_not_change_its_credit() -> None:
    scored = enumerated(ROLLOUT, LookaheadReward(threshold=0.0), WORLD).scored
    found: dict[Any, set[float]] = {}
    for item in scored:
        ids = item.trajectory.token_ids
        for t in range(len(ids) - 1):
            found.setdefault((item.trajectory.prompt.id, ids[: t + 1].tobytes()), set()).add(
                float(item.scores.credit[t])
            )
    assert max(map(len, found.values())) == 1 and len(scored) > len(found) / 3
    assert len({value for values in found.values() for value in values}) > 5


def test_equal_questions_of_a_group_are_asked_once_and_certain_tokens_ask_none() -> None:
    for threshold, more in ((0.0, True), (100.0, False)):
        log = RequestLog()
        context = engines(WORLD, log)
        texts = [item.trajectory for item in enumerated(ROLLOUT, LookaheadReward(), WORLD).scored]
        group = [t for t in texts if t.prompt.id == texts[0].prompt.id]
        asyncio.run(LookaheadReward(threshold=threshold)(group, context))
        keys = [(r.context_ids.tobytes(), int(r.token_ids[0])) for _, r in log.score_requests[len(group) :]]
        assert len(set(keys)) == len(keys) and bool(keys) == more


@given(st.integers(0, 9), st.integers(1, 7))
def test_the_entropy_of_a_support_and_its_rest_is_a_lower_bound_and_exact_for_the_whole(seed: int, k: int) -> None:
    p = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)).double().log_softmax(-1)
    values, ids = p.topk(k)
    scores = TopKScores(logprobs=p[:, 0].numpy(), topk_ids=ids.int().numpy(), topk_logprobs=values.numpy())
    exact = -(p.exp() * p).sum(-1).numpy()
    assert (entropy(scores) <= exact + 1e-6).all()
    if k == 7:
        np.testing.assert_allclose(entropy(scores), exact, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("stale", [False, True])
def test_without_a_weight_or_a_credit_it_is_the_plain_estimate_bit_for_bit(seed: int, stale: bool) -> None:
    w = world(seed, stale=stale)
    plain = outcome(SampledReverseKL(signal=LogprobSource.STUDENT), w)
    assert torch.equal(outcome(CreditedReverseKL(weight=0.0), w).loss, plain.loss)
    without = every_token(w, replace(said(CreditScores, w), credit=torch.zeros_like(w.q)))
    student = StudentLogits(logits=w.z.expand(len(w.q), -1))
    assert torch.equal(CreditedReverseKL()(student, without).loss, plain.loss)


@pytest.mark.parametrize("weight", [0.5, 1.0, 3.0])
def test_a_descent_step_makes_the_credited_token_likelier_than_it_would_be(weight: float) -> None:
    w = world(1)
    token = int(w.mu.argmin())
    more = replace(w, advantages=w.advantages + torch.nn.functional.one_hot(torch.tensor(token), len(w.q)))
    steps = [w.z.detach() - 0.1 * expected_gradient(CreditedReverseKL(weight=weight), v) for v in (w, more)]
    before, after = (step.log_softmax(-1)[token] for step in steps)
    assert after > before


@pytest.mark.parametrize("parts", [{"threshold": 100.0}, {}], ids=["never uncertain", "no weight"])
def test_never_looking_ahead_and_no_weight_train_as_plain_distillation_bit_for_bit(make: Any, parts: Any) -> None:
    rollout = StudentRollout(max_tokens=8, record_topk=3)
    tables = []
    for scorer, objective in (
        (LookaheadReward(**parts), CreditedReverseKL(weight=1.0 if parts else 0.0)),
        (SampledTokens(), SampledReverseKL(signal=LogprobSource.STUDENT)),
        (LookaheadReward(), CreditedReverseKL()),
    ):
        bench = Bench(make)
        asyncio.run(bench.run(Method(name="m", rollout=rollout, scorer=scorer, objective=objective), 3))
        tables.append(bench.learner.table)
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])


def test_credit_is_packed_with_its_tokens_in_any_micro_batches() -> None:
    scored: list[Scored[Any]] = enumerated(ROLLOUT, LookaheadReward(), WORLD).scored
    weights = [np.ones(len(item.trajectory)) for item in scored]
    sums = set()
    for ranks, tokens in ((1, 10**6), (2, 40)):
        packed = pack(scored, weights, Layout(ranks=ranks, tokens_per_microbatch=tokens), TokenMean())
        sums.add(round(sum(float((b.scores.credit / b.denominator).sum()) for rank in packed for b in rank), 6))
    assert len(sums) == 1 and 0.0 not in sums
