"""Promises against the same formulas written as loops over tokens, and what a divergence must be."""

from collections.abc import Callable
from dataclasses import replace
from math import exp, log
from typing import Any

import pytest
import torch
from torch import Tensor

from opd.errors import ConfigurationError
from opd.method import promises as exact
from opd.method.promises import States
from opd.method.reward_promises import BeyondDeviation

V, N = 7, 4


def states(seed: int = 0) -> States:
    draw = torch.Generator().manual_seed(seed)
    p, q, mu, credit = (torch.randn(N, V, generator=draw, dtype=torch.float64) for _ in range(4))
    return States(
        student=(2 * p).log_softmax(-1),
        teacher=(2 * q).log_softmax(-1),
        behavior=mu.log_softmax(-1),
        support=torch.rand(N, V, generator=draw).argsort(-1) < 3,
        credit=credit,
        target=(credit + q).softmax(-1),
    )


def pairs(s: States, row: int, members: list[int] | None = None) -> list[tuple[float, float]]:
    ids = range(V) if members is None else members
    return [(exp(s.student[row, v]), exp(s.teacher[row, v])) for v in ids]


def reverse(pq: list[tuple[float, float]]) -> float:
    return sum(p * log(p / q) for p, q in pq)


def forward(pq: list[tuple[float, float]]) -> float:
    return sum(q * log(q / p) for p, q in pq)


def jsd(pq: list[tuple[float, float]], b: float) -> float:
    return sum(b * q * log(q / (b * q + (1 - b) * p)) + (1 - b) * p * log(p / (b * q + (1 - b) * p)) for p, q in pq)


def conditioned(pq: list[tuple[float, float]]) -> list[tuple[float, float]]:
    mass = [sum(x[i] for x in pq) for i in (0, 1)]
    return [(p / mass[0], q / mass[1]) for p, q in pq]


def merged(s: States, row: int, members: list[int]) -> list[tuple[float, float]]:
    rest = pairs(s, row, [v for v in range(V) if v not in members])
    return [*pairs(s, row, members), (sum(p for p, _ in rest), sum(q for _, q in rest))]


def ids(mask: Tensor) -> list[int]:
    return mask.nonzero()[:, 0].tolist()


WHOLE: dict[Any, Callable[[list[tuple[float, float]]], float]] = {
    exact.ReverseKL(): reverse,
    exact.ForwardKL(): forward,
    exact.JensenShannon(0.3): lambda pq: jsd(pq, 0.3),
    exact.SkewedReverseKL(0.1): lambda pq: sum(p * log(p / (0.9 * q + 0.1 * p)) for p, q in pq),
    exact.SkewedForwardKL(0.1): lambda pq: sum(q * log(q / (0.9 * p + 0.1 * q)) for p, q in pq),
    exact.GeneralizedReverseKL(): lambda pq: sum(p * log(p / q) - p + q for p, q in pq),
}


@pytest.mark.parametrize("of", WHOLE, ids=str)
def test_a_divergence_is_its_formula_on_the_vocabulary_and_on_every_support(of: Any) -> None:
    s, formula, said = states(), WHOLE[of], exact.ScoredSupport()
    for row in range(N):
        members = ids(s.support[row])
        expected = {
            of: formula(pairs(s, row)),
            exact.Renormalized(of=of, support=said): formula(conditioned(pairs(s, row, members))),
            exact.Coarsened(of=of, support=said): formula(merged(s, row, members)),
            exact.Truncated(of=of, support=said): formula(pairs(s, row, members)),
        }
        for promise, value in expected.items():
            assert promise(s)[row].item() == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("of", WHOLE, ids=str)
@pytest.mark.parametrize("wrap", [exact.Renormalized, exact.Coarsened, exact.Truncated])
def test_the_ends_of_a_support_are_the_whole_and_nothing_and_have_gradients(of: Any, wrap: Any) -> None:
    for fill, value in ((True, of(states())), (False, torch.zeros(N).double())):
        s = replace(states(), support=torch.full((N, V), fill))
        leaf = s.student.clone().requires_grad_()
        result = wrap(of=of, support=exact.ScoredSupport())(replace(s, student=leaf))
        torch.testing.assert_close(result.detach(), value, rtol=0, atol=1e-12)
        (gradient,) = torch.autograd.grad(result.sum(), leaf)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("of", WHOLE, ids=str)
def test_a_divergence_is_positive_and_flat_where_both_agree(of: Any) -> None:
    for promise in (of, exact.Renormalized(of=of, support=exact.Union(k=2))):
        s = states(1)
        assert (promise(s) > 0).all()
        z = s.student.clone().requires_grad_()
        value = promise(replace(s, student=z.log_softmax(-1), teacher=s.student))
        (gradient,) = torch.autograd.grad(value.sum(), z)
        assert value.abs().max().item() < 1e-12 and gradient.abs().max().item() < 1e-12


def test_supports_are_sets_of_the_likeliest_ids() -> None:
    s = states()
    for row in range(N):
        mine, its = (set(x[row].topk(2).indices.tolist()) for x in (s.student, s.teacher))
        for support, expected in (
            (exact.StudentTop(k=2), mine),
            (exact.TeacherTop(k=2), its),
            (exact.Union(k=2), mine | its),
            (exact.Intersection(k=2), mine & its),
        ):
            assert set(ids(support(s)[row])) == expected
    assert exact.Union(k=99)(s).all()
    with pytest.raises(ConfigurationError, match=r"Union\.k needs a whole number from 1 to .*, got 0"):
        exact.Union(k=0)


def test_combinations_and_credits_are_their_formulas() -> None:
    s = states()
    p, mu, a = s.student.exp(), s.behavior.exp(), s.credit
    reverse, forward = exact.ReverseKL()(s), exact.ForwardKL()(s)
    entropy = -(s.teacher.exp() * s.teacher).sum(-1)
    clipped = torch.tensor(
        [
            -sum(
                mu[i, v] * min(r * a[i, v], min(max(r, 0.8), 1.3) * a[i, v])
                for v in range(V)
                for r in [p[i, v] / mu[i, v]]
            )
            for i in range(N)
        ]
    ).double()
    threshold = entropy.median().item()
    expected = {
        exact.Sum((exact.ReverseKL(), exact.Weighted(weight=-2.0, of=exact.ForwardKL()))): reverse - 2 * forward,
        exact.WhereUncertain(of=exact.ForwardKL(), threshold=threshold): forward * (entropy > threshold),
        exact.CrossEntropy(): -(mu * s.student).sum(-1),
        exact.FromBehavior(): (p * (s.student - s.behavior)).sum(-1),
        exact.ExpectedCredit(): -(p * a).sum(-1),
        exact.FromTarget(): (s.target * (s.target.log() - s.student)).sum(-1),
        exact.ClippedCredit(low=0.2, high=0.3): clipped,
        exact.PerMass(of=exact.ReverseKL(), support=exact.ScoredSupport()): reverse / (p * s.support).sum(-1),
    }
    for promise, value in expected.items():
        torch.testing.assert_close(promise(s), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("made", [exact.Renormalized, exact.Coarsened, exact.Truncated], ids=lambda c: c.__name__)
def test_credit_of_several_numbers_goes_through_whatever_is_made_of_a_promise(made: Any) -> None:
    s = states()
    two = replace(s, credit=torch.stack([s.credit.abs(), s.credit.abs() / 2], -1), support=torch.ones(N, V).bool())
    of = BeyondDeviation(relaxation=0.5)
    torch.testing.assert_close(made(of=of, support=exact.ScoredSupport())(two), of(two))
    assert of(two).abs().min() > 1e-3
