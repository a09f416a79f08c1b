"""Selection and weights of a step's tokens: exact counts, ties, limits, and statistics of the whole step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.certify.engines import RequestLog, engines
from opd.certify.worlds import make_world
from opd.errors import ConfigurationError
from opd.loss.readings import Compatibility, StudentEntropy, StudentTopEntropy, TeacherEntropy, UnionForwardKL
from opd.method.method import Method, weigh
from opd.objectives.sampled import SampledReverseKL
from opd.ports import Context
from opd.rollouts.student import StudentRollout
from opd.scorers.teacher import TeacherHidden
from opd.token_weights.confidence import PlausibleTrajectories, Scope, SureTeacherUnsureStudent
from opd.token_weights.selection import ByReading, Signal, Teachability, TopFraction
from opd.token_weights.special_tokens import SkipFirst
from opd.types import Prompt, Scored, Scores, StopReason, TokenScores, Trajectory

BOX = engines(make_world(0), RequestLog())
D, C, H = UnionForwardKL(k=16), Compatibility(k=16), StudentTopEntropy(k=16)
EVERY = (D, C, H, StudentEntropy(), TeacherEntropy())
ENTROPY = ByReading(reading=StudentEntropy())


def item(values: Mapping[Any, Any], mask: Any, logprobs: Any, teacher: str = "default") -> Scored[Any]:
    n = len(mask)
    ids, scores = np.arange(n, dtype=np.int32), TokenScores(logprobs=np.asarray(logprobs, dtype=np.float32))
    trajectory = Trajectory(
        prompt=Prompt(id="p", student_ids=ids, teacher_ids=ids, teacher=teacher),
        sample=0,
        token_ids=ids,
        behavior=scores,
        loss_mask=np.asarray(mask, dtype=bool),
        versions=np.zeros(n, dtype=np.int32),
        stop=StopReason.END,
    )
    read = {r: np.where(mask, v, np.nan).astype(np.float32) for r, v in values.items()}
    return Scored(trajectory=trajectory, scores=scores, readings=read)


@st.composite
def steps(draw: st.DrawFn) -> list[Scored[Any]]:
    """Steps in which equal values are common and some tokens, or all of a trajectory, are context."""
    random = np.random.default_rng(draw(st.integers(0, 10_000)))
    found = []
    for _ in range(draw(st.integers(1, 7))):
        n = int(random.integers(1, 8))
        mask = random.random(n) < random.choice([0.0, 0.7, 1.0])
        values = {r: random.integers(0, 9, n) / 8 for r in EVERY}
        found.append(item(values, mask, -random.integers(0, 5, n) / 4, str(random.choice(["a", "b"]))))
    return found


def plain(part: Any, step: list[Scored[Any]]) -> list[np.ndarray]:
    return weigh({"part": part}, step, BOX)


def sampled(step: list[Scored[Any]]) -> int:
    return sum(int(s.trajectory.loss_mask.sum()) for s in step)


@settings(deadline=None)
@given(step=steps(), fraction=st.floats(1e-6, 1), least=st.integers(0, 3))
def test_exactly_the_highest_are_selected_and_of_equal_ones_the_first(
    step: list[Scored[Any]], fraction: float, least: int
) -> None:
    weights = plain(TopFraction(by=ENTROPY, fraction=fraction, per_trajectory=least), step)
    ranked = [
        (-float(s.readings[StudentEntropy()][t]), i, t)
        for i, s in enumerate(step)
        for t in np.flatnonzero(s.trajectory.loss_mask)
    ]
    first = {(i, t) for j in range(len(step)) for _, i, t in sorted(r for r in ranked if r[1] == j)[:least]}
    number = max(ceil(fraction * len(ranked) - 1e-9), len(first))
    rest = [(i, t) for _, i, t in sorted(ranked) if (i, t) not in first]
    expected = first | {*rest[: number - len(first)]}
    got = {(i, int(t)) for i, w in enumerate(weights) for t in np.flatnonzero(w)}
    assert got == {(i, int(t)) for i, t in expected} and len(got) == number
    assert {float(x) for w in weights for x in w} <= {0.0, 1.0}


@pytest.mark.parametrize(("fraction", "tokens", "selected"), [(0.1, 30, 3), (0.1, 31, 4), (0.2, 5, 1), (0.05, 1, 1)])
def test_a_product_that_is_whole_is_not_rounded_up(fraction: float, tokens: int, selected: int) -> None:
    (weights,) = plain(
        TopFraction(by=ENTROPY, fraction=fraction),
        [item({StudentEntropy(): np.arange(tokens)}, np.ones(tokens), np.zeros(tokens))],
    )
    assert weights.sum() == selected and weights[-selected:].all()


@settings(deadline=None)
@given(step=steps())
def test_limits_weigh_every_sampled_token_alike_bit_for_bit(step: list[Scored[Any]]) -> None:
    masks = [s.trajectory.loss_mask.astype(np.float64) for s in step]
    parts = [
        TopFraction(by=ENTROPY),
        TopFraction(by=Teachability()),
        PlausibleTrajectories(),
        SureTeacherUnsureStudent(),
    ]
    for limit in [limit for part in parts for limit in part.limits]:
        found = plain(limit.weight, step)
        assert all(np.array_equal(a, b) for a, b in zip(found, masks, strict=True)), limit.name


@settings(deadline=None)
@given(step=steps(), seed=st.integers(0, 99))
def test_statistics_are_of_the_step_and_not_of_its_order(step: list[Scored[Any]], seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(step))
    for part in (PlausibleTrajectories(drop=0.4), PlausibleTrajectories(per_teacher=True), SureTeacherUnsureStudent()):
        here, there = plain(part, step), plain(part, [step[i] for i in order])
        assert all(np.allclose(here[i], w, rtol=1e-12) for i, w in zip(order, there, strict=True))
    kept = np.ones(sampled(step), dtype=bool)
    values = np.concatenate([np.zeros(0), *(s.readings[D][s.trajectory.loss_mask] for s in step)])
    turned = np.random.default_rng(seed).permutation(len(values))
    normal = Teachability().normalized
    assert np.array_equal(normal(values, kept)[turned], normal(values[turned], kept))


@settings(deadline=None)
@given(step=steps())
def test_a_signal_splits_disagreement_and_lies_between_0_and_1(step: list[Scored[Any]]) -> None:
    flat = {r: np.concatenate([np.zeros(0), *(s.readings[r][s.trajectory.loss_mask] for s in step)]) for r in EVERY}
    kept = np.ones(sampled(step), dtype=bool)
    scores = {signal: Teachability(signal=signal)(flat, kept) for signal in Signal}
    both = scores[Signal.LEARNABLE] + scores[Signal.INCOMPATIBLE]
    np.testing.assert_allclose(both, scores[Signal.DISAGREEMENT], atol=1e-12)
    np.testing.assert_allclose(
        scores[Signal.LEARNABLE], scores[Signal.DISAGREEMENT] * scores[Signal.COMPATIBILITY], atol=1e-12
    )
    for signal in (Signal.DISAGREEMENT_OR_ENTROPY, Signal.LEARNABLE_OR_ENTROPY):
        assert (scores[signal] >= flat[H] - 1e-12).all()
    assert all(((s >= 0) & (s <= 1 + 1e-12)).all() for s in scores.values())
    for signal in Signal:
        assert {*Teachability(signal=signal).readings} <= {D, C, H}


def test_values_beyond_the_quantiles_are_0_and_1_and_equal_ones_are_0() -> None:
    values, kept = np.arange(101.0), np.ones(101, dtype=bool)
    normal = Teachability().normalized(values, kept)
    assert (normal[:6] == 0).all() and (normal[6:95] > 0).all() and np.allclose(normal[95:], 1)
    assert (Teachability().normalized(np.zeros(5), np.ones(5, dtype=bool)) == 0).all()


def test_where_the_models_agree_everywhere_the_first_tokens_are_selected() -> None:
    same = item({D: np.zeros(10), C: np.ones(10)}, np.ones(10), np.zeros(10))
    weights = plain(TopFraction(by=Teachability(), fraction=0.15), [same, same])
    assert np.concatenate(weights).tolist() == [1.0] * 3 + [0.0] * 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Half:
    """Every other token at half its weight, the rest left out."""

    consumes: ClassVar[type[Scores]] = Scores
    reads_sampled_tokens: ClassVar[bool] = False

    def __call__(self, scored: Sequence[Scored[Any]], context: Context) -> list[np.ndarray]:
        return [np.arange(len(s.trajectory)) % 2 * 0.5 for s in scored]


@settings(deadline=None)
@given(step=steps(), fraction=st.floats(0.01, 1))
def test_a_fraction_is_of_what_filters_leave(step: list[Scored[Any]], fraction: float) -> None:
    weights = plain(TopFraction(by=Teachability(), fraction=fraction, filters={"half": Half()}), step)
    left = sum(int((s.trajectory.loss_mask & (np.arange(len(s.trajectory)) % 2 == 1)).sum()) for s in step)
    assert sum(int(w.sum() * 2) for w in weights) == ceil(fraction * left - 1e-9)
    assert not any(w[::2].any() for w in weights)


def test_filters_that_name_tokens_are_looked_up() -> None:
    part = TopFraction(by=ENTROPY, filters={"special": SkipFirst(tokens=("x",))})
    assert part.known({"x": 3}).filters == {"special": SkipFirst(token_ids=(3,))}


@settings(deadline=None)
@given(step=steps(), drop=st.floats(0, 1), per_teacher=st.booleans())
def test_the_least_plausible_trajectories_are_left_out_and_ties_stay(
    step: list[Scored[Any]], drop: float, per_teacher: bool
) -> None:
    weights = plain(PlausibleTrajectories(drop=drop, per_teacher=per_teacher), step)
    means = {
        i: float(s.scores.logprobs[s.trajectory.loss_mask].astype(np.float64).mean())
        for i, s in enumerate(step)
        if s.trajectory.loss_mask.any()
    }
    for name in {s.trajectory.prompt.teacher for s in step} if per_teacher else {""}:
        mine = {i: m for i, m in means.items() if not name or step[i].trajectory.prompt.teacher == name}
        out = {i for i in mine if not weights[i].any()}
        assert len(out) <= floor(drop * len(mine) + 1e-9) and (len(out) < len(mine) or not mine)
        if out:
            assert max(mine[i] for i in out) < min(mine[i] for i in mine.keys() - out)
        if len({*mine.values()}) == len(mine) and mine:
            assert len(out) == min(floor(drop * len(mine) + 1e-9), len(mine) - 1)


@settings(deadline=None)
@given(step=steps(), a=st.floats(0, 9), b=st.floats(0, 9), scope=st.sampled_from(Scope))
def test_soft_weights_are_on_average_1_in_every_trajectory_and_in_their_range(
    step: list[Scored[Any]], a: float, b: float, scope: Scope
) -> None:
    part = SureTeacherUnsureStudent(teacher=a, student=b, scope=scope)
    weights = plain(part, step)
    greatest = {
        r: max([float(np.nanmax(s.readings[r], initial=0)) for s in step if s.trajectory.loss_mask.any()], default=0)
        for r in part.readings
    }
    for s, w in zip(step, weights, strict=True):
        mask = s.trajectory.loss_mask
        if not mask.any():
            assert not w.any()
            continue
        assert w[mask].mean() == pytest.approx(1) and not w[~mask].any()
        taught, own = (s.readings[r][mask].astype(np.float64) for r in part.readings)
        t, o = (greatest[r] if scope is Scope.BATCH else float(s.readings[r][mask].max()) for r in part.readings)
        raw = (1 + a * (1 - (taught / t if t else 0))) * (1 + b * (own / o if o else 0 * own))
        assert ((raw >= 1 - 1e-12) & (raw <= (1 + a) * (1 + b) + 1e-9)).all()
        np.testing.assert_allclose(w[mask], raw / raw.mean(), rtol=1e-12)


def test_equal_entropies_weigh_every_token_alike_also_where_they_are_0() -> None:
    for level in (0.0, 2.5):
        step = [item({r: np.full(4, level) for r in EVERY}, np.ones(4), np.zeros(4)) for _ in range(2)]
        assert all((w == 1).all() for w in plain(SureTeacherUnsureStudent(), step))


@pytest.mark.parametrize("part", [TopFraction(by=ENTROPY), PlausibleTrajectories(), SureTeacherUnsureStudent()])
def test_what_looks_at_the_whole_step_is_refused_with_an_estimate_from_samples(part: Any) -> None:
    rollout, objective = StudentRollout(max_tokens=4), SampledReverseKL()
    with pytest.raises(ConfigurationError, match="depends on what was sampled"):
        Method(name="m", rollout=rollout, scorer=TeacherHidden(), objective=objective, weights={"part": part})


def test_the_lowest_come_first_where_that_is_asked() -> None:
    step = [item({StudentEntropy(): [3.0, 1.0, 2.0]}, np.ones(3), np.zeros(3))]
    (weights,) = plain(TopFraction(by=replace(ENTROPY, lowest=True), fraction=0.3), step)
    assert weights.tolist() == [0.0, 1.0, 0.0]
