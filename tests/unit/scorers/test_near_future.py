"""Near futures: windows, what is transported where, the soft labels that come of it, and when a fork is one."""

import asyncio
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hf.embeddings import FolderEmbeddings, find_embeddings
from launch.config.run_config import run_config
from opd.certify.engines import RequestLog, engines
from opd.certify.enumeration import enumerated
from opd.certify.worlds import make_world
from opd.errors import ConfigurationError, DataError
from opd.loss.chunked import StudentLogits
from opd.loss.packing import TokenMean, WeightMean, pack
from opd.method.method import Method
from opd.method.terms import Term
from opd.objectives.targets import TargetForwardKL
from opd.objectives.vocabulary import FullReverseKL
from opd.ports import Context, Layout, NoEmbeddings, ScoreRequest
from opd.rollouts.student import StudentRollout
from opd.scorers.near_future import NearFuture, RecordedReverseKL, SampledLogRatio, candidates, divergent
from opd.scorers.teacher import SampledTokens, TeacherHidden
from opd.scorers.transport import (
    Assignment,
    EmbeddingCosine,
    Sinkhorn,
    TokenIdentity,
    assigned,
    averaged,
    distance,
    labels,
)
from opd.token_weights.targets import PerTarget
from opd.types import Scored, TargetScores
from tests.unit.loop.test_loop import Bench
from tests.unit.methods.test_objectives import every_token, world

WORLD = make_world(0)
ROLLOUT = StudentRollout(max_tokens=3, record_topk=4)
COSTS = st.integers(1, 5).flatmap(lambda n: arrays(np.float64, (n, n), elements=st.floats(0, 2)))
UNEQUAL = arrays(np.float64, (3, 5), elements=st.floats(0, 2))
ANYWHERE = engines(WORLD, RequestLog())
GREEDY = NearFuture(loss=SampledLogRatio(), cost=TokenIdentity(), transport=Assignment())
ALL = replace(GREEDY, fraction=1.0, quantile=0.0)


def ids(*tokens: int) -> np.ndarray:
    return np.asarray(tokens, dtype=np.int32)


@given(COSTS)
@settings(max_examples=60)
def test_the_assignment_is_the_cheapest_of_all_permutations(cost: np.ndarray) -> None:
    n = len(cost)
    found = assigned(cost)
    assert sorted(found) == list(range(n))
    cheapest = min(sum(cost[i, p[i]] for i in range(n)) for p in permutations(range(n)))
    assert cost[np.arange(n), found].sum() == pytest.approx(cheapest, abs=1e-9)


@given(COSTS | UNEQUAL)
@settings(max_examples=60)
def test_a_soft_plan_has_its_marginals_and_is_never_cheaper_than_the_assignment(cost: np.ndarray) -> None:
    (plan,) = Sinkhorn(regularization=0.1, iterations=20_000).plans([cost])
    n, m = cost.shape
    np.testing.assert_allclose(plan.sum(1), 1 / n, rtol=1e-9)
    np.testing.assert_allclose(plan.sum(0), 1 / m, rtol=2e-5)
    assert (plan >= 0).all()
    if n == m:
        (exact,) = Assignment().plans([cost])
        assert distance(exact, cost) <= distance(plan, cost) + 1e-5 * 2


def test_a_soft_plan_becomes_the_assignment_and_knows_nothing_of_other_problems() -> None:
    costs = [np.random.default_rng(i).random((4, 4)) for i in range(3)]
    (exact,) = Assignment().plans(costs[:1])
    apart = [distance(Sinkhorn(regularization=r).plans(costs[:1])[0], costs[0]) for r in (1.0, 0.2, 0.05, 0.005)]
    assert apart == sorted(apart, reverse=True) and apart[-1] == pytest.approx(distance(exact, costs[0]), abs=1e-3)
    together = Sinkhorn().plans([costs[2], np.zeros((2, 3)), costs[0]])
    np.testing.assert_array_equal(together[2], Sinkhorn().plans(costs[:1])[0])
    assert Sinkhorn(iterations=1).plans(costs[:1])[0].sum() == pytest.approx(1)


@given(arrays(np.float64, (4, 4), elements=st.floats(0, 2)))
@settings(max_examples=30)
def test_the_distance_is_the_same_with_the_windows_swapped(cost: np.ndarray) -> None:
    for solver in (Assignment(tie=0.0), Sinkhorn(regularization=0.2, tolerance=1e-9, iterations=20_000)):
        there, back = (distance(solver.plans([c])[0], c) for c in (cost, cost.T))
        assert there == pytest.approx(back, abs=1e-6) and there >= 0


def test_equal_windows_are_not_apart_and_neither_are_reordered_ones() -> None:
    """What costs of single tokens cannot see: the order of a window (a known weakness of the method)."""
    own = ids(5, 7, 5, 9)
    (same,), (turned,) = (TokenIdentity().between([own], [other], ANYWHERE) for other in (own, own[::-1]))
    for cost in (same, turned):
        assert distance(Assignment().plans([cost])[0], cost) == 0
    np.testing.assert_array_equal(Assignment().plans([same])[0], np.eye(4) / 4)  # of equally cheap ones the nearest
    found = averaged(4, [labels(0, Assignment().plans([same])[0], own)])
    assert found.target_ids[:, 0].tolist() == own.tolist() and (found.target_probs[:, 0] == 1).all()
    w = world(0)
    scores = TargetScores(target_ids=torch.full((7, 1), 5), target_probs=torch.ones(7, 1), targets=torch.ones(7))
    z = w.z.detach()  # then the loss is the cross-entropy of the teacher's tokens
    loss = TargetForwardKL()(StudentLogits(logits=z.expand(7, 7)), every_token(w, scores)).loss
    assert float(loss[0]) == pytest.approx(-float(z.log_softmax(-1)[5]))


def test_labels_by_hand() -> None:
    """Two windows overlap at place 2, where the first says 7 and the second 7 or 9."""
    first = labels(1, np.asarray([[0.5, 0.0], [0.0, 0.5]]), ids(4, 7))
    second = labels(2, np.asarray([[0.25, 0.25], [0.0005, 0.4995]]), ids(7, 9), least=0.01)
    found = averaged(5, [first, second])
    assert found.targets.tolist() == [0, 1, 2, 1, 0]
    rows = [
        {int(i): float(p) for i, p in zip(*row, strict=True) if p > 0}
        for row in zip(found.target_ids, found.target_probs, strict=True)
    ]
    assert rows == [{}, {4: 1.0}, {7: 0.75, 9: 0.25}, {9: 1.0}, {}]
    narrow = averaged(2, [])
    joined = TargetScores.concat([found, narrow])
    assert joined.target_ids.shape == (7, 2) and joined.targets.tolist() == [0, 1, 2, 1, 0, 0, 0]
    again = labels(0, np.asarray([[0.2, 0.3], [0.1, 0.4]]), ids(3, 3))  # a teacher's token that comes twice
    assert averaged(2, [again]).target_ids.tolist() == [[3], [3]]


def test_of_windows_of_different_lengths_the_longer_is_cut_or_spread() -> None:
    cost = np.asarray([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    (plan,) = Assignment().plans([cost])
    assert plan.tolist() == [[0, 0.5], [0.5, 0], [0, 0]]
    assert averaged(3, [labels(0, plan, ids(8, 9))]).targets.tolist() == [1, 1, 0]
    (soft,) = Sinkhorn().plans([cost])
    assert averaged(3, [labels(0, soft, ids(8, 9))]).targets.tolist() == [1, 1, 1]


def test_candidates_have_the_greatest_losses_and_forks_are_far() -> None:
    losses = np.asarray([0.1, 3.0, 2.0, 3.0, 9.0])
    mask = np.asarray([True, True, True, True, False])
    assert candidates(losses, mask, 0.5).tolist() == [1, 3]
    assert candidates(losses, mask, 1e-6).tolist() == [1] and candidates(losses, ~mask, 1.0).tolist() == [4]
    assert candidates(losses, np.zeros(5, dtype=bool), 1.0).tolist() == []
    assert divergent(np.asarray([0.2, 0.0, 0.6, 0.4]), 0.5).tolist() == [False, False, True, True]
    assert divergent(np.asarray([0.0, 0.0]), 0.0).tolist() == [False, False]


def test_a_window_begins_with_the_candidate_itself_and_the_teacher_goes_on_before_it() -> None:
    log = RequestLog()
    context = engines(WORLD, log)
    texts = [item.trajectory for item in enumerated(ROLLOUT, SampledTokens(), WORLD).scored][:5]
    found = asyncio.run(ALL(texts, context))
    begun = {np.concatenate([t.prompt.teacher_ids, t.token_ids[:i]]).tobytes() for t in texts for i in range(len(t))}
    read = [r.context_ids.tobytes() for r in log.continuations]
    assert set(read) == begun and len(read) < sum(map(len, texts))  # equal ones are asked once
    for t, scores in zip(texts, found, strict=True):
        assert isinstance(scores, TargetScores) and len(scores.targets) == len(t)
        for r in (r for r in log.continuations if len(r.context_ids) == len(t.prompt.teacher_ids)):
            assert r.sampling.max_tokens in {len(t) for t in texts}  # from the first token to the end of a text


def test_targets_are_distributions_over_tokens_that_the_teacher_wrote() -> None:
    written: set[int] = set()
    context = engines(WORLD, RequestLog())
    writer = context.writers["default"]

    class Noted:
        async def generate(self, requests: Any) -> Any:
            made = await writer.generate(requests)
            written.update(int(i) for one in made for i in one.token_ids)
            return made

    noted = replace(context, writers={"default": Noted()})
    texts = [item.trajectory for item in enumerated(ROLLOUT, SampledTokens(), WORLD).scored][:20]
    soft = replace(ALL, transport=Sinkhorn(), cost=EmbeddingCosine(), temperature=1.0)
    for scores in asyncio.run(soft(texts, noted)):
        assert isinstance(scores, TargetScores)
        np.testing.assert_allclose(scores.target_probs.sum(-1), scores.targets > 0, atol=1e-6)
        assert set(scores.target_ids[scores.target_probs > 0].tolist()) <= written


def test_turns_of_others_end_a_window() -> None:
    (text, *_) = (item.trajectory for item in enumerated(ROLLOUT, SampledTokens(), WORLD).scored)
    heard = replace(text, loss_mask=np.asarray([True, False, True]))
    log = RequestLog()
    asyncio.run(ALL([heard], engines(WORLD, log)))
    assert [(len(r.context_ids) - len(text.prompt.teacher_ids), r.sampling.max_tokens) for r in log.continuations] == [
        (0, 1),
        (2, 1),
    ]


def test_the_recorded_loss_is_exact_where_the_whole_vocabulary_is_recorded() -> None:
    whole = enumerated(StudentRollout(max_tokens=3, record_topk=12), SampledTokens(), WORLD).scored[0].trajectory
    context, loss = engines(WORLD, RequestLog()), RecordedReverseKL()
    (asked,) = asyncio.run(context.teachers["default"].score([_request(whole, loss)]))
    student, teacher = WORLD.student, WORLD.teachers["default"]
    p = student.logprobs([(whole.prompt.student_ids, whole.token_ids)])[0]
    q = teacher.logprobs([(whole.prompt.teacher_ids, whole.token_ids)])[0]
    np.testing.assert_allclose(loss.losses(whole, asked[0]), (p.exp() * (p - q)).sum(-1).numpy(), atol=1e-5)


def _request(text: Any, loss: Any) -> Any:
    return ScoreRequest(context_ids=text.prompt.teacher_ids, token_ids=text.token_ids, kinds=(loss.kind(text),))


def test_a_mean_over_targets_does_not_depend_on_micro_batches_and_ranks() -> None:
    scored: list[Scored[Any]] = enumerated(ROLLOUT, ALL, WORLD).scored
    weights = PerTarget()(scored, engines(WORLD, RequestLog()))
    assert max(w.max() for w in weights) > 1
    sums = set()
    for ranks, tokens in ((1, 10**6), (2, 40), (3, 12)):
        packed = pack(scored, weights, Layout(ranks=ranks, tokens_per_microbatch=tokens), WeightMean())
        sums.add(round(sum(float((b.weights / b.denominator).sum()) for rank in packed for b in rank), 5))
        labeled = [b.scores for rank in packed for b in rank if b.weights.any()]
        assert all(((s.target_probs.sum(-1) - 1) < 1e-6).all() and (s.targets > 0).all() for s in labeled)
    assert sums == {1.0}


def _term(**changes: Any) -> Term:
    parts: dict[str, Any] = {"coefficient": 0.1, "scorer": replace(GREEDY, temperature=1.0), **changes}
    return Term(weights={"t": PerTarget()}, objective=TargetForwardKL(), normalizer=WeightMean(), **parts)


@pytest.mark.parametrize("way", ["no factor", "no fork", "forks"])
def test_without_a_factor_it_is_plain_bit_for_bit(make: Any, way: str) -> None:
    none = NearFuture(loss=SampledLogRatio(), cost=_Nothing(), transport=Assignment())
    term = {"no factor": _term(coefficient=0.0), "no fork": _term(scorer=none), "forks": _term()}[way]
    tables = []
    for terms in ({}, {"futures": term}):
        bench = Bench(make)
        rollout = StudentRollout(max_tokens=8)
        method = Method(name="m", rollout=rollout, scorer=TeacherHidden(), objective=FullReverseKL(), terms=terms)
        asyncio.run(bench.run(method, 3))
        tables.append(bench.learner.table)
    assert torch.equal(*tables) == (way != "forks")


class _Nothing(TokenIdentity):
    """A cost of nothing: no window is apart from any."""

    def between(self, own: Any, others: Any, context: Context) -> Any:
        return [np.zeros((len(a), len(b))) for a, b in zip(own, others, strict=True)]


def test_scores_and_objectives_that_do_not_fit_are_refused() -> None:
    parts: Any = {"name": "m", "rollout": ROLLOUT}
    with pytest.raises(ConfigurationError, match=r"objective TargetForwardKL needs TargetScores, but .*;"):
        Method(**parts, scorer=SampledTokens(), objective=TargetForwardKL())
    with pytest.raises(ConfigurationError, match="objective FullReverseKL needs VocabularyScores, but scorer NearFut"):
        Method(**parts, scorer=GREEDY, objective=FullReverseKL())
    recorded = replace(GREEDY, loss=RecordedReverseKL())
    with pytest.raises(ConfigurationError, match=r"scorer NearFuture needs TopKScores of the behavior.*record_topk"):
        Method(name="m", rollout=StudentRollout(max_tokens=3), scorer=recorded, objective=TargetForwardKL())


def test_embeddings_are_those_of_the_folder() -> None:
    folder = str(Path(__file__).resolve().parents[3] / "assets" / "shop" / "student")
    name, stored = find_embeddings(folder)
    assert name.endswith("embed_tokens.weight")
    found = FolderEmbeddings(folder)
    rows = found.rows(ids(3, 0, 3))
    assert rows.shape == (3, stored.shape[1]) and rows.dtype == np.float32 and (rows[0] == rows[2]).all()
    with pytest.raises(DataError, match="token id 100000 has no embedding among the"):
        found.rows(ids(1, 100_000))
    with pytest.raises(ConfigurationError, match="this session has none; give"):
        NoEmbeddings().rows(ids(1))


def test_the_shipped_method_is_reverse_kl_and_a_term_of_futures() -> None:
    method = run_config(["experiment=shop", "method=topd"]).method
    assert isinstance(method.objective, FullReverseKL) and isinstance(method.normalizer, TokenMean)
    assert {need.role.name for need in method.terms["futures"].scorer.needs_engines} == {
        "READER",
        "WRITER",
        "EMBEDDINGS",
    }
    plain = run_config(["experiment=shop", "method=topd", "method.terms.futures.coefficient=0"]).method
    assert list(plain.every_term) == ["main"] and not plain.is_sum
