"""Every objective does what its docstring claims: enumerated expectations against autograd of the exact quantity.

A world is one state: a student `z` (logits), a teacher `q`, a writer `mu`, a support. Row `v` of its batch is the
case that the writer wrote token `v`, so an expectation over `y ~ mu` is a sum over rows weighted by `mu`: exact, no
sampling. P1..P17 are the properties of the methods document, section 10.2.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass, replace
from math import log
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from torch import Tensor

import opd.objectives
from opd.errors import ConfigurationError
from opd.loss.chunked import StudentLogits, read
from opd.loss.metrics import diagnosed
from opd.loss.packing import TokenMean, pack
from opd.method import promises
from opd.method.promises import States
from opd.method.reward_promises import BeyondDeviation
from opd.method.shapes import Below, Clip, Floor, ProximalTeacher, SignLog
from opd.objectives.bridged import BridgeDivergence
from opd.objectives.calibrated import CalibratedReverseKL
from opd.objectives.delta import DeltaReverseKL, Reward
from opd.objectives.estimators import Baseline, RatioReverseKL, SampledDivergence, SquaredReverseKL
from opd.objectives.evidence import EvidenceReverseKL
from opd.objectives.montecarlo import MonteCarloDivergence, uniform
from opd.objectives.returns import MiniLLM
from opd.objectives.rewarded import CreditedReverseKL
from opd.objectives.reweighted import AtTemperature, ImportanceWeighted
from opd.objectives.sampled import ClippedPolicyGradient, Likelihood, LogprobSource, SampledReverseKL
from opd.objectives.shaped import FixedAdvantage, FullShapedReverseKL, ShapedReverseKL
from opd.objectives.support import ABSENT, EntropyAwareKL, Outside, SupportDivergence
from opd.objectives.targets import TargetForwardKL
from opd.objectives.topk import GeneralizedReverseKL, HeadTailDivergence, TopKDivergence, WeightedReverseKL
from opd.objectives.truncated import TruncatedRatio
from opd.objectives.vocabulary import FullForwardKL, FullReverseKL, JensenShannon, SkewedForwardKL, SkewedReverseKL
from opd.ports import Layout
from opd.splitmix64 import mix_
from opd.types import (
    AdvantageScores,
    Batch,
    CreditScores,
    DeltaScores,
    DeviationScores,
    EvidenceScores,
    HiddenScores,
    Scores,
    TargetScores,
    TokenLoss,
    TokenScores,
    TopKReturnScores,
    TopKScores,
    VocabularyScores,
)

V = 7
SEEDS = range(3)
HEAD_TAIL = HeadTailDivergence(of=FullReverseKL())
BUCKETED, RENORMALIZED, STOPPED, PER_MASS = (
    TopKDivergence(of=FullReverseKL(), outside=outside)
    for outside in (Outside.BUCKET, Outside.RENORMALIZED, Outside.NOTHING, Outside.PER_MASS)
)
OF_STOPPED = (Outside.NOTHING, Outside.PER_MASS)
BASELINED, TOPK_BASELINED = (
    SampledDivergence(of=FullReverseKL(), baseline=baseline) for baseline in (Baseline.VOCABULARY, Baseline.TOPK)
)


@dataclass(frozen=True, kw_only=True)
class World:
    """Log-probabilities `q`, `mu` over the vocabulary; `z` is the student's leaf."""

    z: Tensor
    q: Tensor
    mu: Tensor
    support: Tensor
    advantages: Tensor


def world(seed: int, k: int = 3, *, stale: bool = False, at_teacher: bool = False, dtype=torch.float64) -> World:
    """A random state. `stale`: the writer is not the student. `at_teacher`: the student equals its teacher."""
    draw = torch.Generator().manual_seed(seed)
    z, q, mu, advantages = torch.randn(4, V, generator=draw, dtype=dtype) * 1.5
    return World(
        z=z.clone().requires_grad_(),
        q=(z if at_teacher else q).log_softmax(-1),
        mu=(z + mu if stale else z).log_softmax(-1),
        support=torch.randperm(V, generator=draw)[:k],  # any support fixed by the state
        advantages=torch.zeros_like(advantages) if at_teacher else advantages,
    )


def moved(advantages: Tensor) -> dict[str, Tensor]:
    """How far a teacher's log-probabilities fall and rise, made of the one number per token that there is."""
    return {"falls": advantages.relu(), "rises": 0.1 + (-advantages).relu()}


def label(w: World) -> Tensor:
    """Probabilities of a soft label on the support."""
    return torch.arange(len(w.support), dtype=w.q.dtype).softmax(0)


def on_vocabulary(w: World) -> Tensor:
    """The same over the vocabulary."""
    return torch.zeros_like(w.q).scatter(0, w.support, label(w))


def said(kind: type[Scores], w: World) -> Scores:
    """What an objective that consumes `kind` is told about the state, once per written token."""
    if issubclass(kind, TopKScores):
        support = w.support.expand(V, -1)
        on = {"topk_ids": support, "topk_logprobs": w.q.expand(V, -1).gather(-1, support)}
        more = {"returns": w.advantages} if kind is TopKReturnScores else {}
        if kind is DeltaScores:
            base = w.q - w.advantages
            more = {"base": base, "topk_base": base.expand(V, -1).gather(-1, support)}
        return kind(logprobs=w.q, **on, **more)
    if kind is VocabularyScores:
        return VocabularyScores(logprobs=w.q, vocabulary_logprobs=w.q.expand(V, -1))
    if kind is AdvantageScores:
        return AdvantageScores(advantages=w.advantages, rewards=w.advantages)
    if kind is CreditScores:
        return CreditScores(logprobs=w.q, credit=w.advantages)
    if kind is EvidenceScores:
        return EvidenceScores(logprobs=w.q, plain=w.q - w.advantages)
    if kind is DeviationScores:
        return DeviationScores(logprobs=w.q, **moved(w.advantages))
    if kind is TargetScores:
        ids, probs = torch.cat([w.support, w.support[:1]]), torch.cat([label(w), torch.zeros_like(label(w)[:1])])
        return TargetScores(target_ids=ids.expand(V, -1), target_probs=probs.expand(V, -1), targets=torch.ones(V))
    return TokenScores(logprobs=w.q) if kind is TokenScores else Scores()


def every_token(w: World, scores: Scores) -> Batch[Any]:
    """Row `v`: token `v` was written."""
    every = torch.arange(V)
    return Batch(
        input_ids=every,
        position_ids=every,
        cu_seqlens=torch.tensor([0, V]),
        predict_at=every,
        target_ids=every,
        behavior_logprobs=w.mu,
        weights=w.mu.exp(),
        depth=every,
        scores=scores,
        denominator=1.0,
    )


def outcome(objective: Any, w: World) -> TokenLoss:
    """The objective's loss for every token that could have been written, with diagnostics."""
    student = StudentLogits(logits=w.z.expand(V, V))
    return diagnosed(objective, student, every_token(w, said(objective.consumes, w)))


def gradient(value: Tensor, w: World) -> Tensor:
    (out,) = torch.autograd.grad(value, w.z, retain_graph=True)
    return out


def expected_gradient(objective: Any, w: World) -> Tensor:
    return gradient((w.mu.exp() * outcome(objective, w).loss).sum(), w)


def per_sample(objective: Any, w: World) -> float:
    """The largest gradient that any single written token causes."""
    return max(float(gradient(value, w).abs().max()) for value in outcome(objective, w).loss)


# What is claimed, written once more from the formulas: on probabilities, and on nothing that `opd` computes.


def reverse_kl(w: World) -> Tensor:
    p = w.z.softmax(-1)
    return (p * (p.log() - w.q)).sum()


def forward_kl(w: World) -> Tensor:
    return (w.q.exp() * (w.q - w.z.softmax(-1).log())).sum()


def published_signal(w: World) -> Tensor:
    """With the writer's logprob in the advantage: KL(p||q) - KL(p||mu), which is the reverse KL when mu = p."""
    return reverse_kl(w) - reverse_kl(replace(w, q=w.mu))


def jsd(w: World, beta: float) -> Tensor:
    p, q = w.z.softmax(-1), w.q.exp()
    m = beta * q + (1 - beta) * p
    return beta * (q * (q / m).log()).sum() + (1 - beta) * (p * (p / m).log()).sum()


def coarsened(w: World) -> Tensor:
    p, q = w.z.softmax(-1), w.q.exp()
    outside = torch.ones(V, dtype=torch.bool)
    outside[w.support] = False
    p, q = (torch.cat([x[w.support], x[outside].sum(0, keepdim=True)]) for x in (p, q))
    return (p * (p / q).log()).sum()


def renormalized(w: World) -> Tensor:
    p, q = w.z.softmax(-1)[w.support], w.q.exp()[w.support]
    p, q = p / p.sum(), q / q.sum()
    return (p * (p / q).log()).sum()


def cross_entropy(w: World) -> Tensor:
    return -(w.mu.exp() * w.z.softmax(-1).log()).sum()


def label_kl(w: World) -> Tensor:
    """KL to the label, id by id."""
    p = w.z.softmax(-1)
    pairs = zip(w.support.tolist(), label(w).tolist(), strict=True)
    return torch.stack([y * (log(y) - p[v].log()) for v, y in pairs]).sum()


def surrogate(w: World) -> Tensor:
    """Clipped by hand: outside 0.8 .. 1.2 a ratio counts as the bound, where that is worse for the student."""
    p, mu = w.z.softmax(-1), w.mu.exp()
    total = torch.zeros(())
    for v in range(V):
        r, a = p[v] / mu[v], w.advantages[v]
        bounded = (r > 1.2 and a > 0) or (r < 0.8 and a < 0)
        total = total - mu[v] * (torch.clamp(r.detach(), 0.8, 1.2) if bounded else r) * a
    return total


def promised(objective: Any) -> Callable[[World], Tensor]:
    """What the objective promises (`tests/unit/methods/test_promises.py` checks the promises themselves)."""

    def exact(w: World) -> Tensor:
        members = torch.zeros(V, dtype=torch.bool)
        members[w.support] = True
        several = isinstance(objective.promise, BeyondDeviation)
        credit = torch.stack([*moved(w.advantages).values()], -1) if several else w.advantages
        rows = {
            "teacher": w.q,
            "behavior": w.mu,
            "support": members,
            "credit": credit,
            "target": on_vocabulary(w),
        }
        here = States(student=w.z.log_softmax(-1)[None], **{name: row[None] for name, row in rows.items()})
        return objective.promise(here).sum()

    return exact


@dataclass(frozen=True, kw_only=True)
class Claim:
    """`objective`'s expected gradient is that of `exact`, also when the writer is not the student if `stale`."""

    objective: Any
    exact: Callable[[World], Tensor]
    stale: bool = True
    zero_at_teacher: bool = True
    value: str = ""  # the metric whose expectation is `exact`

    def __str__(self) -> str:
        return str(self.objective)


def per_mass(w: World) -> Tensor:
    """Reverse KL on the student's top 3, its log-ratio and its mass there held constant."""
    p, q = w.z.softmax(-1), w.q
    top = w.z.detach().topk(3).indices
    return (p * (p.log() - q).detach())[top].sum() / p.detach()[top].sum()


CLAIMS: tuple[Claim, ...] = (
    Claim(objective=SampledReverseKL(), exact=reverse_kl, stale=False, value="reverse_kl"),
    Claim(objective=SampledReverseKL(), exact=published_signal),
    Claim(objective=SampledReverseKL(coefficient=0.5), exact=lambda w: 0.5 * reverse_kl(w), stale=False),
    Claim(objective=SampledReverseKL(signal=LogprobSource.STUDENT), exact=reverse_kl),
    Claim(objective=HEAD_TAIL, exact=reverse_kl, value="reverse_kl"),
    Claim(objective=BUCKETED, exact=coarsened, value="reverse_kl"),
    Claim(objective=RENORMALIZED, exact=renormalized, value="reverse_kl"),
    Claim(objective=FullReverseKL(), exact=reverse_kl, value="reverse_kl"),
    Claim(objective=FullForwardKL(), exact=forward_kl, value="forward_kl"),
    Claim(objective=JensenShannon(beta=0.1), exact=lambda w: jsd(w, 0.1), value="jsd"),
    Claim(objective=JensenShannon(), exact=lambda w: jsd(w, 0.5), value="jsd"),
    Claim(objective=Likelihood(), exact=cross_entropy, zero_at_teacher=False),
    Claim(objective=ClippedPolicyGradient(), exact=surrogate),
    Claim(objective=TargetForwardKL(), exact=label_kl, zero_at_teacher=False, value="target_kl"),
)
CLAIMS += tuple(
    Claim(objective=part, exact=exact)
    for part, exact in {
        SquaredReverseKL(): reverse_kl,
        RatioReverseKL(): reverse_kl,
        BASELINED: reverse_kl,
        TOPK_BASELINED: reverse_kl,
        STOPPED: promised(STOPPED),
        PER_MASS: promised(WeightedReverseKL()),
        SupportDivergence(of=FullReverseKL(), support=promises.StudentTop(k=3), outside=Outside.PER_MASS): per_mass,
        GeneralizedReverseKL(): promised(GeneralizedReverseKL()),
        WeightedReverseKL(): promised(WeightedReverseKL()),
        SkewedReverseKL(): promised(SkewedReverseKL()),
        SkewedForwardKL(alpha=0.3): promised(SkewedForwardKL(alpha=0.3)),
        MiniLLM(): promised(MiniLLM()),
        MiniLLM(long_weight=0.0): reverse_kl,
        CreditedReverseKL(weight=0.5): promised(CreditedReverseKL(weight=0.5)),
        CreditedReverseKL(weight=0.0): reverse_kl,
        EntropyAwareKL(k=3): promised(EntropyAwareKL(k=3)),
        EntropyAwareKL(threshold=0.0, k=V, forward_weight=2.0): lambda w: reverse_kl(w) + 2 * forward_kl(w),
        **{
            part: promised(part)
            for support in (promises.Union(k=2), promises.Intersection(k=5), promises.StudentTop(k=2))
            for part in (
                *(SupportDivergence(of=FullReverseKL(), support=support, outside=outside) for outside in Outside),
                SupportDivergence(of=FullForwardKL(), support=support),
                SupportDivergence(of=FullForwardKL(), support=support, outside=Outside.RENORMALIZED),
            )
        },
    }.items()
)


def gain(reward: Callable[[Tensor], Tensor]) -> Callable[[World], Tensor]:
    """-sum_v p reward(log q - log p), rewards held constant."""
    return lambda w: -(w.z.softmax(-1) * reward(w.q - w.z.softmax(-1).log()).detach()).sum()


def unlikely(w: World) -> Tensor:
    p = w.z.softmax(-1)
    return p[p < 0.1].sum() / 2


def beyond(w: World) -> Tensor:
    """The reward by hand, token by token: what is left of a gap without half of the teacher's own movement."""
    p, total = w.z.softmax(-1), torch.zeros(())
    for v in range(V):
        gap, move = float(w.q[v] - p[v].detach().log()), {name: float(x[v]) for name, x in moved(w.advantages).items()}
        left = max(gap - 0.5 * move["falls"], 0.0) if gap > 0 else min(gap + 0.5 * move["rises"], 0.0)
        total = total - p[v] * left
    return total


DROPPED = Floor(mixture=0.4, below=Below.NOTHING)


def bridge(of: Any, teacher_power: float, student_power: float) -> BridgeDivergence:
    return BridgeDivergence(of=of, teacher_power=float(teacher_power), student_power=float(student_power))


def bridged(w: World, teacher_power: float, student_power: float) -> World:
    """The state with the normalized product of both models' powers for a teacher, of which no gradient comes."""
    p, q = w.z.detach().softmax(-1), w.q.exp()
    raw = q**teacher_power * p**student_power
    return replace(w, q=(raw / raw.sum()).log())


def tuned(w: World, *, center: bool = True, agree: bool = True) -> Tensor:
    """The reward by hand, token by token: what tuning changed, where the log-ratio has its sign."""
    p, total = w.z.softmax(-1), torch.zeros(())
    q, mine, delta = w.q.tolist(), p.detach().tolist(), w.advantages.tolist()
    gap, kept = [q[v] - log(mine[v]) for v in range(V)], w.support.tolist()
    means = [sum(mine[v] * x[v] for v in kept) if center else 0.0 for x in (delta, gap)]
    for v in range(V):
        reward, plain = delta[v] - means[0], gap[v] - means[1]
        total = total - p[v] * (reward if reward * plain > 0 or not agree else 0.0)
    return total


CLAIMS += (
    Claim(objective=DeltaReverseKL(), exact=tuned),
    Claim(objective=DeltaReverseKL(center=False), exact=lambda w: tuned(w, center=False)),
    Claim(objective=DeltaReverseKL(agree=False, coefficient=0.1), exact=lambda w: 0.1 * tuned(w, agree=False)),
    Claim(objective=DeltaReverseKL(reward=Reward.LOG_RATIO), exact=reverse_kl),
    Claim(objective=CalibratedReverseKL(relaxation=0.5), exact=beyond),
    Claim(objective=CalibratedReverseKL(relaxation=0.0), exact=reverse_kl),
    Claim(objective=ShapedReverseKL(shape=Clip(limit=0.7)), exact=gain(lambda d: d.clamp(-0.7, 0.7))),
    Claim(objective=ShapedReverseKL(shape=SignLog()), exact=gain(lambda d: d.sign() * (1 + d.abs()).log())),
    Claim(objective=ShapedReverseKL(shape=ProximalTeacher(alpha=0.2)), exact=lambda w: jsd(w, 0.2) / 0.8),
    Claim(objective=ShapedReverseKL(shape=ProximalTeacher(alpha=1.0)), exact=reverse_kl),
    Claim(objective=FixedAdvantage(below=0.1), exact=unlikely, zero_at_teacher=False),
    Claim(objective=ShapedReverseKL(shape=Floor(mixture=0.4)), exact=gain(lambda d: d.clamp(min=log(0.4 / 0.6)))),
    Claim(objective=ShapedReverseKL(shape=DROPPED), exact=gain(lambda d: d * (d >= log(0.4 / 0.6)))),
    Claim(objective=FullShapedReverseKL(shape=DROPPED), exact=gain(lambda d: d * (d >= log(0.4 / 0.6)))),
    Claim(objective=FullShapedReverseKL(shape=Floor(mixture=0.0)), exact=reverse_kl),
    Claim(objective=FullShapedReverseKL(shape=SignLog()), exact=gain(lambda d: d.sign() * (1 + d.abs()).log())),
    Claim(objective=FullShapedReverseKL(shape=ProximalTeacher(alpha=0.2)), exact=lambda w: jsd(w, 0.2) / 0.8),
    Claim(
        objective=bridge(FullForwardKL(), 1, 0.8), exact=lambda w: forward_kl(bridged(w, 1, 0.8)), zero_at_teacher=False
    ),
    Claim(objective=bridge(FullReverseKL(), 1, 1), exact=lambda w: reverse_kl(bridged(w, 1, 1)), zero_at_teacher=False),
    Claim(objective=bridge(FullForwardKL(), 0.4, 0.6), exact=lambda w: forward_kl(bridged(w, 0.4, 0.6))),
    Claim(objective=bridge(JensenShannon(), 0.7, 0.3), exact=lambda w: jsd(bridged(w, 0.7, 0.3), 0.5)),
    Claim(objective=bridge(FullForwardKL(), 1, 0), exact=forward_kl),
)
DIRECTIONS = (FullReverseKL(), FullForwardKL(), JensenShannon(beta=0.1), SkewedReverseKL(alpha=0.2), SkewedForwardKL())
KEPT = (Outside.BUCKET, Outside.RENORMALIZED)
CLAIMS += tuple(
    Claim(objective=part, exact=promised(part))
    for of in DIRECTIONS
    for part in (
        *(SampledDivergence(of=of, baseline=baseline) for baseline in Baseline),
        HeadTailDivergence(of=of),
        *(TopKDivergence(of=of, outside=outside) for outside in KEPT),
        *(
            SupportDivergence(of=of, support=support, outside=outside)
            for support in (promises.Union(k=2), promises.Intersection(k=5))
            for outside in KEPT
        ),
        TruncatedRatio(of=SampledDivergence(of=of), max_ratio=1e6),
    )
)
# Where no ratio exceeds the bound, what it wraps; where some do, see the tests of truncation.
CLAIMS += tuple(
    Claim(objective=TruncatedRatio(of=part, max_ratio=1e6), exact=reverse_kl)
    for part in (
        SquaredReverseKL(),
        RatioReverseKL(),
        HEAD_TAIL,
        SampledReverseKL(signal=LogprobSource.STUDENT),
    )
)


def evident(w: World, *, corrected: bool, threshold: float = 0.0) -> Tensor:
    """Slope of the reverse KL over the tokens with evidence above the threshold, as often as they are written."""
    p = w.z.softmax(-1)
    cost = torch.where(w.advantages > threshold, (p.log() - w.q).detach(), 0.0)
    return (p * cost).sum() if corrected else (w.mu.exp() * cost * p.log()).sum()


def softened(w: World, temperature: float) -> World:
    """The state with student and teacher at another temperature."""
    return replace(w, z=w.z / temperature, q=(w.q / temperature).log_softmax(-1))


def reached(w: World, most: float) -> Tensor:
    """Expected importance ratio, bounded by `most`: held constant."""
    p, mu = w.z.detach().softmax(-1), w.mu.exp()
    return (mu * (p / mu).clamp(max=most)).sum()


CLAIMS += (
    Claim(objective=EvidenceReverseKL(), exact=lambda w: evident(w, corrected=False)),
    Claim(objective=EvidenceReverseKL(corrected=True), exact=lambda w: evident(w, corrected=True)),
    Claim(objective=EvidenceReverseKL(corrected=True, threshold=-100.0), exact=reverse_kl, zero_at_teacher=False),
    Claim(objective=AtTemperature(of=FullReverseKL(), temperature=2.0), exact=lambda w: reverse_kl(softened(w, 2.0))),
    Claim(objective=AtTemperature(of=JensenShannon(), temperature=1.1), exact=lambda w: jsd(softened(w, 1.1), 0.5)),
    Claim(objective=ImportanceWeighted(of=BUCKETED), exact=lambda w: reached(w, 2.0) * coarsened(w)),
    Claim(
        objective=ImportanceWeighted(of=RENORMALIZED, max_ratio=1.0), exact=lambda w: reached(w, 1.0) * renormalized(w)
    ),
)
DRAWING = {MonteCarloDivergence}  # their own noise is enumerated by `opd.certify`
DISTILLING = tuple(claim for claim in CLAIMS if claim.zero_at_teacher)
ON_SUPPORT = tuple(c for c in CLAIMS if c.objective in (HEAD_TAIL, BUCKETED, RENORMALIZED))
FULL = tuple(claim for claim in CLAIMS if claim.objective.consumes is VocabularyScores)


def test_every_objective_of_the_package_has_a_declared_expectation() -> None:
    found = set()
    for module in pkgutil.walk_packages(opd.objectives.__path__, "opd.objectives."):
        for part in vars(importlib.import_module(module.name)).values():
            mine = isinstance(part, type) and is_dataclass(part) and part.__module__ == module.name
            if mine and "__call__" in vars(part):  # what has none is a base of others
                found.add(part)
    assert len(found) >= 9
    missing = found - {type(claim.objective) for claim in CLAIMS} - DRAWING
    assert not missing, f"add what the docstring of {missing} claims to CLAIMS in {__file__}"


@pytest.mark.parametrize("stale", [False, True], ids=["fresh", "stale"])
@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_p2_p11_the_expected_gradient_is_the_exact_one(claim: Claim, stale: bool) -> None:
    for seed in SEEDS:
        w = world(seed, stale=stale)
        exact = gradient(claim.exact(w), w)
        error = float((expected_gradient(claim.objective, w) - exact).abs().max())
        # The likelihood of the student's own samples has an expected gradient of exactly 0: no signal at all.
        assert (float(exact.abs().max()) > 1e-3) == (stale or claim.exact is not cross_entropy)
        assert (error < 1e-12) if claim.stale or not stale else (error > 1e-3)


@pytest.mark.parametrize("claim", [claim for claim in CLAIMS if claim.value], ids=str)
def test_the_reported_divergence_has_the_exact_expectation(claim: Claim) -> None:
    for seed in SEEDS:
        w = world(seed, stale=claim.stale)
        value = (w.mu.exp() * outcome(claim.objective, w).metrics[claim.value]).sum()
        torch.testing.assert_close(value, claim.exact(w).detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("claim", DISTILLING, ids=str)
def test_p1_no_written_token_moves_a_student_that_equals_its_teacher(claim: Claim) -> None:
    for seed in SEEDS:
        writers = {True, False} if claim.exact is not published_signal else {False}
        for stale in writers if claim.stale else {False}:
            assert per_sample(claim.objective, world(seed, stale=stale, at_teacher=True)) <= 1e-12
        assert per_sample(claim.objective, world(seed)) > 1e-3


@pytest.mark.parametrize("claim", ON_SUPPORT, ids=str)
def test_p3_a_support_of_the_whole_vocabulary_is_the_exact_reverse_kl(claim: Claim) -> None:
    for seed in SEEDS:
        w = world(seed, k=V, stale=True)
        losses = (outcome(objective, w).loss for objective in (claim.objective, FullReverseKL()))
        torch.testing.assert_close(*losses, rtol=0, atol=1e-12)
        error = expected_gradient(claim.objective, w) - gradient(reverse_kl(w), w)
        assert float(error.abs().max()) < 1e-12


def test_p4_one_renormalized_token_says_nothing() -> None:
    w = world(0, k=1)
    assert not outcome(RENORMALIZED, w).loss.any()
    assert per_sample(RENORMALIZED, w) == 0


def test_the_tail_bucket_is_a_lower_bound_and_the_renormalized_form_forgets_the_mass() -> None:
    for seed in SEEDS:
        w = world(seed)
        assert outcome(BUCKETED, w).loss.max().item() <= reverse_kl(w).item() + 1e-12
        moved = w.z.detach().clone()
        moved[w.support] += 3.0  # more mass on S, the same proportions within it
        before, after = (outcome(RENORMALIZED, x).loss for x in (w, replace(w, z=moved)))
        torch.testing.assert_close(before, after)


@pytest.mark.parametrize("claim", FULL, ids=str)
def test_p6_the_teacher_receives_no_gradient(claim: Claim) -> None:
    w = world(0)
    head, hidden = torch.randn(V, 4, requires_grad=True), torch.randn(V, 4, requires_grad=True)
    batch = every_token(w, HiddenScores(logprobs=w.q, hidden=hidden))
    claim.objective(StudentLogits(logits=w.z.expand(V, V)), read(batch, head)).loss.sum().backward()
    assert head.grad is None and hidden.grad is None
    assert w.z.grad is not None and float(w.z.grad.abs().max()) > 0


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_p10_a_fresh_writer_has_ratio_one_and_nothing_is_clipped(claim: Claim) -> None:
    metrics = outcome(claim.objective, world(0)).metrics
    assert not any(value.requires_grad for value in metrics.values())
    torch.testing.assert_close(metrics.get("ratio", torch.ones(V).double()), torch.ones(V).double())
    for name in {"probs_diff", "pg_clipfrac"} & set(metrics):
        assert float(metrics[name].abs().max()) < 1e-12
    p = world(0).z.softmax(-1).detach()
    torch.testing.assert_close(metrics["entropy"], -(p * p.log()).sum().expand(V))


BY_DEPTH = ("0_63", "64_255", "256_1023", "1024_up")
OF_THE_STUDENT = {"entropy", *(f"entropy_{bucket}" for bucket in BY_DEPTH)}
OF_BOTH = {
    f"{name}{end}"
    for name in ("entropy_gap", "fidelity", "teacher_entropy")
    for end in ("", *(f"_{b}" for b in BY_DEPTH))
}
OVERLAP = {"overlap_ratio", "overlap_token_advantage", "overlap_student_mass", "overlap_teacher_mass"}
TOLD: dict[type[Scores], set[str]] = {
    VocabularyScores: {"reverse_kl", "forward_kl"} | OF_BOTH | OVERLAP,
    TopKScores: {"student_mass", "teacher_mass", "support_overlap", "support_token_advantage"},
}


@pytest.mark.parametrize(
    "objective", [*(claim.objective for claim in CLAIMS), MonteCarloDivergence(of=FullReverseKL())], ids=str
)
def test_all_that_the_scores_of_an_objective_allow_is_reported(objective: Any) -> None:
    w = world(0)
    metrics = outcome(objective, w).metrics
    told = next((names for kind, names in TOLD.items() if issubclass(objective.consumes, kind)), set[str]())
    assert told | OF_THE_STUDENT <= metrics.keys()
    assert ({"logprob_gap", "probs_diff"} <= metrics.keys()) != isinstance(objective, Likelihood | FixedAdvantage)
    if "reverse_kl" in metrics and objective.consumes is TokenScores and not hasattr(objective, "of"):
        torch.testing.assert_close(metrics["reverse_kl"], (w.z.log_softmax(-1) - w.q).detach())  # at what was written
    if objective.consumes is VocabularyScores:
        torch.testing.assert_close(metrics["reverse_kl"], reverse_kl(w).detach().expand(V))
        torch.testing.assert_close(metrics["forward_kl"], forward_kl(w).detach().expand(V))


@dataclass(frozen=True)
class Given:
    """A support of the user's own: all that the learner offers it."""

    def __call__(self, states: States) -> Tensor:
        return states.support


def test_a_support_of_the_user_s_own_is_offered_the_whole_vocabulary() -> None:
    w, whole = world(3), SupportDivergence(of=FullForwardKL(), support=Given())
    torch.testing.assert_close(outcome(whole, w).loss, outcome(FullForwardKL(), w).loss)
    assert outcome(whole, w).metrics["support_size"].tolist() == [V] * V


@pytest.mark.parametrize(
    "objective",
    [
        SupportDivergence(of=FullReverseKL(), support=promises.Union(k=2), outside=Outside.RENORMALIZED),
        SupportDivergence(of=FullForwardKL(), support=promises.StudentTop(k=3)),
        EntropyAwareKL(k=2),
    ],
    ids=lambda part: type(part).__name__,
)
def test_masses_are_those_of_the_support_at_each_position(objective: Any) -> None:
    """Positions differ here, so that a sum over the wrong axis is another number."""
    z, q = (torch.randn(V, V, generator=torch.Generator().manual_seed(n)).double().log_softmax(-1) for n in (1, 2))
    batch = replace(every_token(w := world(0), said(VocabularyScores, w)), behavior_logprobs=z.diagonal())
    batch = replace(batch, scores=VocabularyScores(logprobs=q.diagonal(), vocabulary_logprobs=q))
    metrics = diagnosed(objective, StudentLogits(logits=z), batch).metrics
    support = getattr(objective, "support", promises.TeacherTop(k=2))
    every = torch.ones(V, V, dtype=torch.bool)
    members = support(States(student=z, teacher=q, behavior=z, support=every, credit=z, target=z))
    for name, p in (("student_mass", z), ("teacher_mass", q)):
        assert metrics[name].tolist() == pytest.approx([float(p[i][members[i]].exp().sum()) for i in range(V)])
    assert metrics["support_size"].tolist() == members.sum(-1).tolist()


# What an objective says of rows that differ. Elsewhere all rows of a batch are one state, so that an expectation is a
# sum over them; a sum over the wrong axis of such a batch is no other number.

ROWS, DEPTHS_OF_ROWS = 5, (0, 4, 64, 300, 2000)


def rows_apart(kind: type[Scores]) -> tuple[StudentLogits, Batch[Any], States]:
    """Five states with a stale writer and the token that each wrote, and the same for a promise."""
    worlds = [world(seed, stale=True) for seed in range(ROWS)]
    written = torch.tensor([0, 6, 3, 3, 1])

    def stacked(rows: Any) -> Tensor:
        return torch.stack(list(rows))

    q, mu, advantages = (stacked(getattr(w, name) for w in worlds) for name in ("q", "mu", "advantages"))
    support = stacked(w.support for w in worlds)
    here = {"logprobs": q[torch.arange(ROWS), written]}
    scores: Scores = TokenScores(**here)
    if issubclass(kind, TopKScores):
        own = {"returns": advantages[:, 0]} if kind is TopKReturnScores else {}
        if kind is DeltaScores:
            changed = advantages[:, :1]  # of every id of the state
            own = {"base": here["logprobs"] - changed[:, 0], "topk_base": q.gather(-1, support) - changed}
        scores = kind(**here, topk_ids=support, topk_logprobs=q.gather(-1, support), **own)
    elif kind is VocabularyScores:
        scores = VocabularyScores(**here, vocabulary_logprobs=q)
    elif kind is EvidenceScores:
        scores = EvidenceScores(**here, plain=here["logprobs"] - advantages[:, 0])
    elif kind is DeviationScores:
        scores = DeviationScores(**here, **moved(advantages[:, 0]))
    elif kind is AdvantageScores:
        scores = AdvantageScores(advantages=advantages[:, 0], rewards=advantages[:, 0])
    elif kind is TargetScores:
        labels = stacked(label(w) for w in worlds)
        scores = TargetScores(target_ids=support, target_probs=labels, targets=torch.ones(ROWS))
    elif kind is CreditScores:
        scores = CreditScores(**here, credit=advantages[:, 0])
    every = torch.arange(ROWS)
    batch = Batch(
        input_ids=every,
        position_ids=every,
        cu_seqlens=torch.tensor([0, ROWS]),
        predict_at=every,
        target_ids=written,
        behavior_logprobs=mu[torch.arange(ROWS), written],
        weights=torch.ones(ROWS).double(),
        depth=torch.tensor(DEPTHS_OF_ROWS),
        scores=scores,
        denominator=1.0,
    )
    members = torch.zeros(ROWS, V, dtype=torch.bool).scatter(-1, support, True)
    z = stacked(w.z.detach() for w in worlds)
    credit = advantages[:, :1].expand(-1, V)
    target = stacked(on_vocabulary(w) for w in worlds)
    states = States(student=z.log_softmax(-1), teacher=q, behavior=mu, support=members, credit=credit, target=target)
    return StudentLogits(logits=z, overlap_k=3), batch, states


EVERY = (*(claim.objective for claim in CLAIMS), *(MonteCarloDivergence(of=of) for of in DIRECTIONS))


@pytest.mark.parametrize("objective", EVERY, ids=str)
def test_what_is_said_of_a_row_depends_on_no_other_row(objective: Any) -> None:
    student, batch, _ = rows_apart(objective.consumes)
    together = diagnosed(objective, student, batch)
    for i in range(ROWS):
        alone = diagnosed(objective, replace(student, logits=student.logits[i : i + 1]), batch.rows(i, i + 1))
        torch.testing.assert_close(together.loss[i : i + 1], alone.loss)
        assert together.metrics.keys() == alone.metrics.keys()
        for name, value in alone.metrics.items():
            torch.testing.assert_close(together.metrics[name][i : i + 1], value, equal_nan=True, msg=name)


def by_hand(objective: Any, states: States, batch: Batch[Any], i: int) -> dict[str, float]:
    """Every metric that any objective reports, of row `i`, as its definition has it: from probabilities, in floats."""
    p, q, mu = (getattr(states, name)[i].exp().tolist() for name in ("student", "teacher", "behavior"))
    y, every = int(batch.target_ids[i]), range(V)
    members = {v for v in every if states.support[i, v]}
    if isinstance(batch.scores, VocabularyScores):
        support = getattr(objective, "support", promises.TeacherTop(k=getattr(objective, "k", V)))
        members = {v for v in every if support(states)[i, v]}
    own, its = ({*sorted(every, key=lambda v, x=x: -x[v])[:3]} for x in (p, q))
    found = {
        "reverse_kl": sum(p[v] * log(p[v] / q[v]) for v in every),
        "forward_kl": sum(q[v] * log(q[v] / p[v]) for v in every),
        "entropy": -sum(p[v] * log(p[v]) for v in every),
        "teacher_entropy": -sum(q[v] * log(q[v]) for v in every),
        "student_mass": sum(p[v] for v in members),
        "teacher_mass": sum(q[v] for v in members),
        "support_size": float(len(members)),
        "ratio": p[y] / mu[y],
        "probs_diff": abs(p[y] - mu[y]),
        "logprob_gap": abs(log(p[y] / mu[y])),
        "ratio_truncated": float(p[y] / mu[y] > getattr(objective, "max_ratio", 1.0)),
        "return": float(states.credit[i, 0]),
        "credit": float(states.credit[i, 0]),
        "target_kl": sum(t * log(t / p[v]) for v, t in enumerate(states.target[i].tolist()) if t > 0),
        "credited_share": float(states.credit[i, 0] != 0),
        "overlap_ratio": len(own & its) / 3,
        "overlap_student_mass": sum(p[v] for v in own & its),
        "overlap_teacher_mass": sum(q[v] for v in own & its),
        "overlap_token_advantage": advantage(p, q, own & its),
        "support_overlap": len(own & members) / 3,
        "support_token_advantage": advantage(p, q, own & members),
    }
    found["entropy_gap"] = abs(found["teacher_entropy"] - found["entropy"])
    found["uncertain_share"] = float(found["teacher_entropy"] > getattr(objective, "threshold", 0.0))
    found["unlikely_share"] = float(p[y] < getattr(objective, "below", 1.0))
    if isinstance(objective, DeltaReverseKL):
        kept, gaps = sorted(members) if objective.center else [], [log(q[v] / p[v]) for v in every]
        delta, gap = found["return"] * (1 - sum(p[v] for v in kept)), gaps[y] - sum(p[v] * gaps[v] for v in kept)
        found.update(delta=found["return"], agreed_share=float(delta * gap > 0))
    if isinstance(objective, CalibratedReverseKL):
        gap, (falls, rises) = log(q[y] / p[y]), (float(x[i]) for x in (batch.scores.falls, batch.scores.rises))
        found["discrepancy"] = abs(gap)
        found["discrepancy_kept"] = max(abs(gap) - objective.relaxation * (falls if gap > 0 else rises), 0.0)
    if isinstance(objective, FullShapedReverseKL):
        ratios = [log(q[v] / p[v]) for v in every]
        rewards = objective.shape.reward(torch.tensor(ratios, dtype=torch.float64)).tolist()
        found["reward_changed"] = sum(p[v] * abs(rewards[v] - ratios[v]) for v in every)
    if isinstance(objective, ShapedReverseKL):
        reward = log(q[y] / p[y])
        changed = abs(float(objective.shape.reward(torch.tensor(reward).double())) - reward)
        found["reward_changed"] = changed if changed > 1e-6 else 0.0  # what was read in float32 is no change
    low, high = 1 - getattr(objective, "clip_low", 0.0), 1 + getattr(objective, "clip_high", 0.0)
    found["evident_share"] = float(found["return"] > getattr(objective, "threshold", 0.0))
    found["pg_clipfrac"] = float(found["ratio"] > high if found["return"] > 0 else found["ratio"] < low)
    found["fidelity"] = max(q)
    for name in ("entropy", "teacher_entropy", "entropy_gap", "fidelity"):
        for bucket, (start, stop) in zip(BY_DEPTH, ((0, 64), (64, 256), (256, 1024), (1024, 10**9)), strict=True):
            found[f"{name}_{bucket}"] = found[name] if start <= DEPTHS_OF_ROWS[i] < stop else float("nan")
    for name in found.keys() & {*OVERLAP, "support_overlap", "support_token_advantage"}:
        found[name] = found[name] if DEPTHS_OF_ROWS[i] % 4 == 0 else float("nan")
    if getattr(objective, "outside", None) in OF_STOPPED:
        mass = sum(p[v] for v in members) if objective.outside is Outside.PER_MASS else 1.0
        found["support_kl"] = sum(p[v] * log(p[v] / q[v]) for v in members) / mass
    if not isinstance(batch.scores, VocabularyScores):
        found.update(reverse_kl=estimate(objective, p, q, mu, members, y), forward_kl=float("inf"))
    return found


def advantage(p: list[float], q: list[float], shared: set[int]) -> float:
    """`sum p' log(q' / p')` of both renormalized on `shared`; NaN where that is empty."""
    own, its = (sum(x[v] for v in shared) for x in (p, q))
    return sum(p[v] / own * log(q[v] / its * own / p[v]) for v in shared) if shared else float("nan")


def estimate(objective: Any, p: list[float], q: list[float], mu: list[float], members: set[int], y: int) -> float:
    """What is reported as the reverse KL where it cannot be known; infinite where it is the loss itself."""
    of = objective.of if isinstance(objective, TruncatedRatio | ImportanceWeighted) else objective
    head, mass = sum(p[v] * log(p[v] / q[v]) for v in members), sum(p[v] for v in members)
    match of:
        case HeadTailDivergence() | MiniLLM():
            return head + (0.0 if y in members else p[y] / mu[y] * log(p[y] / q[y]))
        case WeightedReverseKL() | TopKDivergence(outside=Outside.PER_MASS):
            return head / mass
        case TopKDivergence(outside=Outside.NOTHING):
            return head
        case TopKDivergence() | GeneralizedReverseKL():
            return float("inf")
        case SampledReverseKL(signal=LogprobSource.BEHAVIOR):
            return log(mu[y] / q[y])
    return log(p[y] / q[y])


IS_THE_LOSS = {"jsd", "skewed_kl", "bridge_divergence", "support_kl", "support_divergence"}


@pytest.mark.parametrize("objective", EVERY, ids=str)
def test_every_metric_of_every_objective_is_its_definition(objective: Any) -> None:
    student, batch, states = rows_apart(objective.consumes)
    result = diagnosed(objective, student, batch)
    inner = (
        objective.of if isinstance(objective, ImportanceWeighted) else objective
    )  # whose loss it is that is reported
    loss = inner(student, batch).loss
    for i in range(ROWS):
        defined = by_hand(objective, states, batch, i)
        for name, values in result.metrics.items():
            assert name in defined or name in IS_THE_LOSS, f"define {name} in by_hand"
            expected = defined.get(name, float("inf"))
            if expected == float("inf"):  # the next test has the loss
                expected = float(loss[i])
            assert float(values[i]) == pytest.approx(expected, rel=1e-6, abs=1e-9, nan_ok=True), f"{name} of row {i}"


ESTIMATES = (EvidenceReverseKL, FullShapedReverseKL, Likelihood, MonteCarloDivergence, WeightedReverseKL)
COMPARED = tuple(
    o for o in EVERY if not (o.on_policy or isinstance(o, ESTIMATES)) and getattr(o, "outside", None) not in OF_STOPPED
)


@pytest.mark.parametrize("objective", COMPARED, ids=str)
def test_the_loss_of_a_comparison_of_distributions_is_what_it_promises(objective: Any) -> None:
    """Not its gradient alone: the value, which is reported."""
    student, batch, states = rows_apart(objective.consumes)
    torch.testing.assert_close(objective(student, batch).loss, objective.promise(states))


def formula(of: Any, student: StudentLogits, batch: Batch[Any], states: States, i: int) -> float:
    """The loss of row `i` as the docstring of an estimate has it: its value, which no gradient shows."""
    p, q, mu = (getattr(states, name)[i] for name in ("student", "teacher", "behavior"))
    y, members, credit = int(batch.target_ids[i]), states.support[i], float(states.credit[i, 0])
    ratio, log_ratio = float((p - mu).exp()[y]), float((p - q)[y])
    part = float((p.exp() * (p - q))[members].sum())
    tail = 0.0 if members[y] else ratio * log_ratio
    match of:
        case TruncatedRatio():  # whose bound is above every ratio here
            return formula(of.of, student, batch, states, i)
        case EvidenceReverseKL():
            return (ratio if of.corrected else 1.0) * log_ratio * (credit > of.threshold)
        case ImportanceWeighted():
            return min(ratio, of.max_ratio) * float(of.of.promise(states)[i])
        case SampledReverseKL():
            own = mu if of.signal is LogprobSource.BEHAVIOR else p
            return ratio * of.coefficient * float((own - q)[y])
        case SquaredReverseKL():
            return ratio * log_ratio**2 / 2
        case RatioReverseKL():
            return ratio * (float((q - p).exp()[y]) - 1 + log_ratio)
        case MiniLLM():
            return part + tail - of.long_weight * ratio * credit
        case CreditedReverseKL():
            return ratio * (log_ratio - of.weight * credit)
        case SampledDivergence():
            slope = of.of.slope(p, q)
            among = {Baseline.NONE: [], Baseline.TOPK: members, Baseline.VOCABULARY: members | True}[of.baseline]
            return ratio * (float(slope[y]) - float((p.exp() * slope)[among].sum()))
        case HeadTailDivergence():
            slope = of.of.slope(p, q)
            return float((p.exp() * slope)[members].sum()) + (0.0 if members[y] else ratio * float(slope[y]))
        case MonteCarloDivergence():
            return float(of.of.slope(p, q)[of.draw(student, batch)[i]].mean())
        case EntropyAwareKL():
            forward = replace(of.promise, of=of.promise.of[1:])(states)[i]  # is checked by itself
            return ratio * log_ratio + float(forward)
        case ClippedPolicyGradient():
            return -min(ratio * credit, min(max(ratio, 1 - of.clip_low), 1 + of.clip_high) * credit)
        case ShapedReverseKL():
            return -ratio * float(of.shape.reward((q - p)[y]))
        case FullShapedReverseKL():
            return -float((p.exp() * of.shape.reward(q - p)).sum())
        case DeltaReverseKL():
            mass = float(p.exp()[members].sum())
            delta, gap = (credit * (1 - mass), part - log_ratio) if of.center else (credit, -log_ratio)
            reward = delta if of.reward is Reward.DELTA else gap
            return -ratio * of.coefficient * (reward if reward * gap > 0 or not of.agree else 0.0)
        case CalibratedReverseKL():
            kept = max(abs(log_ratio) - of.relaxation * (0.1 + max(-credit, 0) if log_ratio > 0 else max(credit, 0)), 0)
            return ratio * (kept if log_ratio > 0 else -kept)
        case FixedAdvantage():
            return -of.advantage * ratio * (float(p.exp()[y]) < of.below)
        case Likelihood():
            return -float(p[y])
        case WeightedReverseKL() | TopKDivergence(outside=Outside.PER_MASS):
            return part / float(p.exp()[members].sum())
        case TopKDivergence(outside=Outside.NOTHING):
            return part
    raise AssertionError(f"write the formula of {of}")


@pytest.mark.parametrize(
    "objective", [o for o in EVERY if o.on_policy or isinstance(o, ESTIMATES) or o in (STOPPED, PER_MASS)], ids=str
)
def test_the_loss_of_an_estimate_is_its_formula(objective: Any) -> None:
    """A run reports it, and it decides what is not finite."""
    student, batch, states = rows_apart(objective.consumes)
    expected = [formula(objective, student, batch, states, i) for i in range(ROWS)]
    assert objective(student, batch).loss.tolist() == pytest.approx(expected)


def test_an_estimate_that_is_told_more_than_it_needs_reports_it() -> None:
    """A sampled method logs the overlap if its scorer asks for a top-k."""
    w = world(0)
    batch = every_token(w, said(TopKScores, w))
    metrics = diagnosed(SampledReverseKL(), StudentLogits(logits=w.z.expand(V, V)), batch).metrics
    assert TOLD[TopKScores] | OF_THE_STUDENT | {"reverse_kl"} <= metrics.keys()


def test_a_stale_writer_is_reported_and_clipped() -> None:
    w = world(1, stale=True)
    metrics = outcome(ClippedPolicyGradient(), w).metrics
    torch.testing.assert_close(metrics["ratio"], ratio := (w.z.softmax(-1) / w.mu.exp()).detach())
    clipped = ((ratio > 1.2) & (w.advantages > 0)) | ((ratio < 0.8) & (w.advantages < 0))
    assert clipped.any() and torch.equal(metrics["pg_clipfrac"].bool(), clipped)


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_float32_and_certain_models_give_finite_numbers(claim: Claim) -> None:
    """Sharp distributions put all their mass on the support: 1 - mass is 0 in float32."""
    for seed in range(10):
        w = world(seed, k=4, dtype=torch.float32)
        sharp = replace(w, z=(w.z * 20).detach().requires_grad_(), q=(w.q * 20).log_softmax(-1))
        sharp = replace(sharp, mu=sharp.z.log_softmax(-1).detach(), support=sharp.q.topk(4).indices)
        result = outcome(claim.objective, sharp)
        assert result.loss.isfinite().all() and gradient(result.loss.sum(), sharp).isfinite().all()
        for name, value in result.metrics.items():
            by_place = name.startswith(("entropy_", "teacher_entropy_", "fidelity_"))
            elsewhere = by_place or "overlap" in name or "advantage" in name
            assert value.isfinite().all() or (elsewhere and not value.isinf().any()), name


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_the_numbering_of_the_vocabulary_does_not_matter(claim: Claim) -> None:
    w = world(0, stale=True)
    order = torch.randperm(V)
    z, q, mu, advantages = (x.detach()[order] for x in (w.z, w.q, w.mu, w.advantages))
    support = torch.argsort(order)[w.support]
    other = World(z=z.requires_grad_(), q=q, mu=mu, support=support, advantages=advantages)
    expected = outcome(claim.objective, w).loss[order]
    torch.testing.assert_close(outcome(claim.objective, other).loss, expected, rtol=0, atol=1e-12)


def test_jsd_is_symmetric_bounded_and_tends_to_both_kls() -> None:
    for seed in SEEDS:
        w = world(seed)
        swapped = replace(w, z=w.q.clone().requires_grad_(), q=w.z.detach().log_softmax(-1))
        values = [outcome(JensenShannon(), x).loss for x in (w, swapped)]
        torch.testing.assert_close(values[0], values[1])
        apart = torch.tensor([-60.0] + [0.0] * (V - 1)).double()
        far = replace(w, z=apart.requires_grad_(), q=(-apart).detach().log_softmax(-1))
        bound = outcome(JensenShannon(), far).loss.max().item()
        assert values[0].max().item() < bound <= log(2) + 1e-15
        for beta, limit in ((1e-5, forward_kl), (1 - 1e-5, reverse_kl)):
            scaled = expected_gradient(JensenShannon(beta=beta), w) / 1e-5
            torch.testing.assert_close(scaled, gradient(limit(w), w), rtol=0, atol=1e-3)


def test_likelihood_is_the_forward_kl_of_a_teacher_that_is_certain() -> None:
    one = torch.tensor([0.0] + [-800.0] * (V - 1)).double()
    certain = replace(world(0), q=one, mu=one)
    given = (expected_gradient(objective, certain) for objective in (Likelihood(), FullForwardKL()))
    torch.testing.assert_close(*given)


# Defects that are published or easily written: the checks above must catch every one of them.


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A loss of `p`, `q`, `mu` (logprobs of the written token), `raw` (`sum_S p l`) and `out` (written outside S)."""

    loss: Callable[[SimpleNamespace], Tensor]
    consumes: type[Scores] = TopKScores

    def __call__(self, student: StudentLogits, batch: Batch[Any]) -> TokenLoss:
        on_support = student.at_support(batch.scores.topk_ids)
        terms = SimpleNamespace(
            p=student.at(batch.target_ids),
            q=batch.scores.logprobs,
            mu=batch.behavior_logprobs,
            raw=(on_support.exp() * (on_support - batch.scores.topk_logprobs)).sum(-1),
            out=(batch.scores.topk_ids != batch.target_ids[:, None]).all(-1),
        )
        return TokenLoss(loss=self.loss(terms), metrics={})


def k3(t: SimpleNamespace) -> Tensor:
    return (t.q - t.p).exp() - 1 + t.p - t.q


def rewarded(t: SimpleNamespace, cost: Tensor) -> Tensor:
    return (t.p - t.mu).exp() * cost.detach()


DEFECTS: dict[str, tuple[Callable[[SimpleNamespace], Tensor], str]] = {
    "direct k1": (lambda t: t.p - t.q, "fresh"),
    "direct k3": (k3, "fresh"),
    "k3 as reward": (lambda t: rewarded(t, k3(t)), "fresh"),
    "reward with the wrong sign": (lambda t: rewarded(t, t.q - t.p), "fresh"),
    "reward without a ratio": (lambda t: t.p * (t.p - t.q).detach(), "stale"),
    "reward that is not detached": (lambda t: (t.p - t.mu).exp() * (t.p - t.q), "teacher"),
    "raw top-k sum": (lambda t: t.raw, "teacher"),
    "raw top-k sum and sampled tail": (lambda t: t.raw + t.out * rewarded(t, t.p - t.q), "fresh"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_planted_defects_are_caught(name: str) -> None:
    loss, caught_by = DEFECTS[name]
    for seed in SEEDS:
        w = world(seed, stale=caught_by == "stale", at_teacher=caught_by == "teacher")
        error = expected_gradient(Planted(loss=loss), w) - gradient(reverse_kl(w), w)
        found = per_sample(Planted(loss=loss), w) if caught_by == "teacher" else float(error.abs().max())
        assert found > 1e-3


def test_p5_the_raw_sum_is_wrong_by_the_gradient_of_the_mass_on_the_support() -> None:
    """And direct k3 is no reverse KL at all: in expectation it is the forward one."""
    for seed in SEEDS:
        w = world(seed)
        raw, biased = (Planted(loss=DEFECTS["raw top-k sum" + end][0]) for end in ("", " and sampled tail"))
        mass = gradient(w.z.softmax(-1)[w.support].sum(), w)
        torch.testing.assert_close(expected_gradient(biased, w) - gradient(reverse_kl(w), w), mass)
        at_teacher = world(seed, at_teacher=True)
        mass = gradient(at_teacher.z.softmax(-1)[at_teacher.support].sum(), at_teacher)
        torch.testing.assert_close(expected_gradient(raw, at_teacher), mass)
        torch.testing.assert_close(expected_gradient(Planted(loss=k3), w), gradient(forward_kl(w), w))


def test_the_stop_gradient_and_mopds_correction_have_one_gradient_per_sample() -> None:
    """And k2 and ratio times k3, which share the gradient `p/mu l grad log p`."""
    for pair in ((STOPPED, GeneralizedReverseKL()), (SquaredReverseKL(), RatioReverseKL())):
        w = world(0, stale=True)
        for losses in zip(*(outcome(objective, w).loss for objective in pair), strict=True):
            torch.testing.assert_close(*(gradient(loss, w) for loss in losses), rtol=0, atol=1e-12)


def test_rethinkings_code_and_its_equation_5_differ_by_the_mean_log_ratio_times_the_gradient_of_the_mass() -> None:
    for seed in SEEDS:
        w = world(seed)
        code, equation = (expected_gradient(part, w) for part in (WeightedReverseKL(), RENORMALIZED))
        p = w.z.softmax(-1)[w.support]
        mean = (p / p.sum() * (p.log() - w.q[w.support])).sum().detach()
        torch.testing.assert_close(code - equation, mean * gradient(p.sum().log(), w), rtol=0, atol=1e-12)
        assert float((code - equation).abs().max()) > 1e-3
    one = world(0, k=1)
    assert per_sample(RENORMALIZED, one) == 0 and per_sample(WeightedReverseKL(), one) > 1e-3


def spread(objective: Any, w: World) -> float:
    """Trace of the covariance of the gradient over written tokens."""
    each = torch.stack([gradient(loss, w) for loss in outcome(objective, w).loss])
    weight = w.mu.exp()[:, None]
    return float((weight * (each - (weight * each).sum(0)) ** 2).sum())


SAME = {
    SampledDivergence(of=FullReverseKL()): SampledReverseKL(signal=LogprobSource.STUDENT),
    HEAD_TAIL: MiniLLM(long_weight=0.0),
}


@pytest.mark.parametrize(("general", "named"), SAME.items(), ids=str)
def test_the_named_kls_are_the_general_forms_of_their_direction(general: Any, named: Any) -> None:
    w = world(0, stale=True)
    assert torch.equal(outcome(general, w).loss, outcome(named, w).loss)


@pytest.mark.parametrize("of", DIRECTIONS, ids=str)
def test_a_slope_is_the_derivative_of_the_sum_and_zero_where_student_and_teacher_agree(of: Any) -> None:
    w = world(1)
    p, q = w.z.detach().log_softmax(-1), w.q
    probabilities = p.exp().requires_grad_()
    (gradient,) = torch.autograd.grad(of.between(probabilities.log(), q), probabilities)
    off = gradient - of.slope(p, q)
    torch.testing.assert_close(off, off[:1].expand(V))
    assert of.slope(q, q).abs().max() < 1e-12 and of.between(q, q).abs() < 1e-12
    nothing = torch.full((200_000,), ABSENT)
    assert of.between(nothing, nothing).abs() < 1e-25


def test_a_sum_over_a_part_of_the_vocabulary_is_refused_where_it_is_no_divergence() -> None:
    for part, given in ((TopKDivergence, DIRECTIONS[1:2]), (SupportDivergence, DIRECTIONS[1:2]), (EntropyAwareKL, ())):
        for form in OF_STOPPED:
            said = rf"{part.__name__} needs outside=RENORMALIZED or BUCKET, got {form.name}: summed"
            with pytest.raises(ConfigurationError, match=said):
                part(**({"of": given[0]} if given else {}), outside=form)


@pytest.mark.parametrize("part", [part for part in EVERY if getattr(part, "limits", ())], ids=str)
def test_what_an_objective_becomes_at_the_ends_of_its_fields_is_what_it_lists(part: Any) -> None:
    for limit in part.limits:
        assert type(limit.objective) is type(part) and limit.objective.consumes is part.consumes
        for seed in SEEDS if type(part) not in DRAWING else ():
            w = world(seed)
            got = limit.scale * expected_gradient(limit.objective, w)
            wanted = gradient(promised(limit)(w), w)
            assert float((got - wanted).abs().max()) <= limit.tolerance * float(wanted.abs().max())
            assert float(wanted.abs().max()) > 1e-3


@pytest.mark.parametrize("objective", [part for part in EVERY if type(part) not in DRAWING], ids=str)
def test_every_objective_keeps_the_promise_that_it_gives_also_with_a_stale_writer(objective: Any) -> None:
    w = world(1, stale=True)
    exact = gradient(promised(objective)(w), w)
    torch.testing.assert_close(expected_gradient(objective, w), exact, rtol=0, atol=1e-12)
    own = CreditedReverseKL | CalibratedReverseKL | DeltaReverseKL | ShapedReverseKL
    own |= FullShapedReverseKL | BridgeDivergence
    at_theirs = MiniLLM | own | EvidenceReverseKL | AtTemperature | ImportanceWeighted
    tolerance = 1e-6 if isinstance(objective, at_theirs) else 1e-3  # the others are 1e-6 of a field away from theirs
    assert all(limit.tolerance == tolerance for limit in getattr(objective, "limits", ()))


def test_an_estimator_of_a_direction_has_the_direction_s_limits() -> None:
    of = JensenShannon()
    for part in (
        SampledDivergence(of=of),
        TopKDivergence(of=of),
        SupportDivergence(of=of),
        MonteCarloDivergence(of=of),
    ):
        assert [limit.name for limit in part.limits] == [limit.name for limit in of.limits]
        assert [limit.objective for limit in part.limits] == [replace(part, of=end.objective) for end in of.limits]


def test_a_teacher_at_the_threshold_is_not_uncertain() -> None:
    """Its entropy must exceed the threshold; that of a certain one is exactly 0."""
    certain = torch.tensor([0.0] + [-800.0] * (V - 1)).double()
    w = replace(world(0, stale=True), q=certain)
    result = outcome(EntropyAwareKL(threshold=0.0, k=2), w)
    assert result.metrics["uncertain_share"].tolist() == [0.0] * V
    torch.testing.assert_close(result.loss, outcome(SampledReverseKL(signal=LogprobSource.STUDENT), w).loss)


def test_a_baseline_changes_the_variance_and_not_the_expectation() -> None:
    plain, exact, topk = SampledReverseKL(), BASELINED, TOPK_BASELINED
    mean = {part: sum(spread(part, world(seed, k=5)) for seed in range(20)) for part in (plain, exact, topk)}
    assert mean[exact] < mean[plain] and mean[topk] < mean[plain]


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.2, -1.0, float("nan")])
def test_meaningless_fields_are_refused(alpha: float) -> None:
    for part in (SkewedReverseKL, SkewedForwardKL):
        assert part(alpha=1e-6) and part(alpha=1 - 1e-6)
        with pytest.raises(ConfigurationError, match=rf"{part.__name__}\.alpha needs a number .*, got"):
            part(alpha=alpha)
    with pytest.raises(ConfigurationError, match=r"NOTHING: summed over a part .*FullForwardKL is no .* choose BUCKET"):
        SupportDivergence(of=FullForwardKL(), outside=Outside.NOTHING)
    with pytest.raises(ConfigurationError, match=r"EntropyAwareKL\.k needs a whole number from 1"):
        EntropyAwareKL(k=0)
    with pytest.raises(ConfigurationError, match=r"MonteCarloDivergence\.samples needs a whole number.*, got 0"):
        MonteCarloDivergence(of=FullReverseKL(), samples=0)
    with pytest.raises(ConfigurationError, match=r"teacher-mixed sampling \(alpha=0.2\).*decoding loop.*set alpha=0"):
        MiniLLM(alpha=0.2)


def test_drawn_tokens_follow_the_current_student_and_depend_on_the_row_alone() -> None:
    w, n = world(1), 20_000
    rows = torch.arange(n)
    batch = replace(
        every_token(w, VocabularyScores(logprobs=w.q, vocabulary_logprobs=w.q.expand(V, -1))),
        input_ids=rows,
        position_ids=rows % 97,
        predict_at=rows,
        target_ids=rows % V,
        behavior_logprobs=-torch.rand(n),
        weights=torch.ones(n),
        depth=rows % 97,
        scores=VocabularyScores(logprobs=torch.zeros(n), vocabulary_logprobs=w.q.expand(n, V)),
    )
    student = StudentLogits(logits=w.z.detach().expand(n, V))
    ids = MonteCarloDivergence(of=FullReverseKL(), samples=3).draw(student, batch)
    p = student.logprobs[0].exp()
    for column in ids.T:
        share = torch.bincount(column, minlength=V) / n
        assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()
    pairs = (
        torch.bincount(ids[:, 0] * V + ids[:, 1], minlength=V * V).reshape(V, V) / n
    )  # one draw says nothing of the next
    assert ((pairs - p[:, None] * p).abs() < 5 * (p[:, None] * p / n).sqrt() + 1e-3).all()
    noise = uniform(batch, 3, 0)
    assert torch.equal(noise[50:90], uniform(batch.rows(50, 90), 3, 0)) and not torch.equal(noise, uniform(batch, 3, 1))
    assert noise.min().item() >= 0 and noise.max().item() < 1


def test_draws_on_one_text_differ_by_step_and_sample_and_by_nothing_else(make: Any) -> None:
    """Fixed text comes again and again; what is drawn on it does not. Packing and resuming change nothing."""
    shape = [([1, 2], [3, 4, 5])] * 2 + [([2, 2, 1], [6, 4])]
    texts = [make.scored(*ids, sample=i) for i, ids in enumerate(shape)]
    weights = [np.ones(3), np.ones(3), np.ones(2)]

    def noise(turn: str, tokens: int = 99, seed: int = 0) -> dict[tuple[str, int], list[float]]:
        batches = pack(texts, weights, Layout(ranks=1, tokens_per_microbatch=tokens), TokenMean(), turn=turn)[0]
        found = {}
        for batch in (b.to("cpu", lambda x: x) for b in batches):
            owners = torch.searchsorted(batch.cu_seqlens[1:].contiguous(), batch.predict_at, right=True).tolist()
            rows = uniform(batch, 2, seed).tolist()
            for owner, depth, row in zip(owners, batch.depth.tolist(), rows, strict=True):
                found[batch.names[owner].partition(" at ")[0], depth] = row
        return found

    first = noise(" at step 1")
    assert first == noise(" at step 1", tokens=4) and len(first) == 8
    several = [
        first,
        noise(" at step 2"),
        noise(" at step 11"),
        noise(" in an evaluation"),
        noise(" at step 1", seed=1),
    ]
    values = [x for one in several for row in one.values() for x in row]
    assert len(set(values)) == len(values) == 5 * 8 * 2, "two samples, steps or seeds share a number"


def splitmix64(z: int) -> int:
    """On unsigned words, as it was published (Steele et al. 2014)."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_draws_are_mixed_by_splitmix64() -> None:
    words = [0, 1, 2**63 - 1, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15, 0xC0FFEE00DEADBEEF, 0x8000_0001_8000_0001]
    mixed = mix_(torch.from_numpy(np.array(words, dtype=np.uint64).view(np.int64)))
    assert mixed.numpy().view(np.uint64).tolist() == [splitmix64(word) for word in words]


@pytest.mark.parametrize("names", [(), ("a sample", "another")], ids=str)
def test_the_numbers_of_a_row_are_those_of_its_key_and_its_counter(names: tuple[str, ...]) -> None:
    """A run that goes on under another release draws what it would have drawn. Two sequences; the first has a row at
    its last place, the second at its first."""
    golden, seed = 0x9E3779B97F4A7C15, 3
    logprobs = torch.tensor([-0.5, -1.25, -80.0])
    batch = replace(
        every_token(world(0), Scores()),
        input_ids=torch.arange(5),
        position_ids=torch.tensor([0, 1, 2, 0, 1]),
        cu_seqlens=torch.tensor([0, 3, 5]),
        predict_at=torch.tensor([1, 2, 3]),
        target_ids=torch.tensor([6, 0, 5]),
        behavior_logprobs=logprobs,
        weights=torch.ones(3),
        depth=torch.arange(3),
        names=names,
    )
    bits = logprobs.numpy().view(np.int32).tolist()
    for row, (owner, place) in enumerate([(0, 1), (0, 2), (1, 0)]):
        key = seed
        name = xxhash.xxh3_64_intdigest(names[owner].encode()) if names else 0
        for part in (name, place, int(batch.target_ids[row]), bits[row]):
            key = splitmix64(((key ^ part % 2**64) + golden) % 2**64)
        expected = [(splitmix64((key + i * golden) % 2**64) >> 11) / 2**53 for i in (1, 2, 3)]
        assert uniform(batch, 3, seed)[row].tolist() == expected


@pytest.mark.parametrize(("number", "drawn"), [(0.0, 1), (0.24, 1), (0.25, 3), (0.99, 3), (1.0, 4)])
def test_a_token_without_probability_is_drawn_only_where_rounding_left_no_other(
    monkeypatch: pytest.MonkeyPatch, number: float, drawn: int
) -> None:
    """The cumulative distribution is inverted: a token has the numbers from the sum before it up to its own."""
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).double()
    monkeypatch.setattr("opd.objectives.montecarlo.uniform", lambda batch, n, seed: torch.full((1, n), number).double())
    student = StudentLogits(logits=p.log().clamp(min=-800) + 7)
    ids = MonteCarloDivergence(of=FullReverseKL(), samples=2).draw(student, every_token(world(0), Scores()))
    assert ids.tolist() == [[drawn, drawn]]


@pytest.mark.parametrize("of", [FullReverseKL(), FullForwardKL(), JensenShannon()], ids=str)
def test_the_gradient_on_drawn_tokens_is_the_slope_times_that_of_their_probability(of: Any) -> None:
    w = world(2)
    batch = every_token(w, said(VocabularyScores, w))
    student = StudentLogits(logits=w.z.expand(V, V))
    ids = torch.arange(V).expand(V, V).roll(1, 0)[:, :3].contiguous()
    given = MonteCarloDivergence(of=of, samples=3).given(ids, student, batch).loss.sum()
    p, q = student.at_support(ids), batch.scores.vocabulary_logprobs.gather(-1, ids)
    by_hand = (of.slope(p.detach(), q) * p).mean(-1).sum()
    torch.testing.assert_close(gradient(given, w), gradient(by_hand, w))


def test_many_drawn_tokens_average_to_few() -> None:
    """The loss of several draws is the mean of the losses of each: what lets a certificate enumerate one."""
    w = world(0)
    batch = every_token(w, said(VocabularyScores, w))
    student = StudentLogits(logits=w.z.expand(V, V))
    ids = torch.randint(0, V, (V, 4))
    several = MonteCarloDivergence(of=FullReverseKL(), samples=4).given(ids, student, batch).loss
    single = [
        MonteCarloDivergence(of=FullReverseKL(), samples=1).given(ids[:, i : i + 1], student, batch).loss
        for i in range(4)
    ]
    torch.testing.assert_close(several, torch.stack(single).mean(0))


@pytest.mark.parametrize("cap", [1.0, 1.5])
@pytest.mark.parametrize(
    "part",
    [SampledReverseKL(signal=LogprobSource.STUDENT), SquaredReverseKL(), RatioReverseKL(), BASELINED],
    ids=str,
)
def test_a_truncated_ratio_scales_the_tokens_above_the_bound_and_no_other(part: Any, cap: float) -> None:
    """Per written token: the gradient is `min(p/mu, cap) / (p/mu)` of the whole one."""
    for seed in SEEDS:
        w = world(seed, stale=True)
        ratio = (w.z.detach().log_softmax(-1) - w.mu).exp()
        whole, bounded = (outcome(o, w) for o in (part, TruncatedRatio(of=part, max_ratio=cap)))
        for v in range(V):
            expected = gradient(whole.loss[v], w) * float(min(1.0, cap / ratio[v]))
            torch.testing.assert_close(gradient(bounded.loss[v], w), expected, rtol=0, atol=1e-12)
        assert bounded.metrics["ratio_truncated"].tolist() == (ratio > cap).double().tolist()
        torch.testing.assert_close(bounded.metrics["ratio"], whole.metrics["ratio"])
        assert (ratio > cap).any() and (ratio < cap).any()


def test_the_exact_part_of_an_objective_is_not_truncated() -> None:
    """Only the sampled tail of a head-and-tail objective has a ratio."""
    for seed in SEEDS:
        w = world(seed, stale=True)
        whole, bounded = (outcome(o, w).loss for o in (HEAD_TAIL, TruncatedRatio(of=HEAD_TAIL)))
        for v in w.support.tolist():
            torch.testing.assert_close(bounded[v], whole[v], rtol=0, atol=0)


def test_truncation_is_refused_where_it_means_nothing() -> None:
    with pytest.raises(ConfigurationError, match="FullReverseKL has none"):
        TruncatedRatio(of=FullReverseKL())
    with pytest.raises(ConfigurationError, match="signal=STUDENT"):
        TruncatedRatio(of=SampledReverseKL())
    with pytest.raises(ConfigurationError, match=r"max_ratio needs a number from 1 to .*, got 0\.5"):
        TruncatedRatio(of=SquaredReverseKL(), max_ratio=0.5)
