"""Capped losses where the teacher goes on as the student does: which tokens, by how much, and what stays as it was."""

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launch.config.run_config import run_config
from opd.certify.engines import RequestLog, engines
from opd.certify.enumeration import enumerated
from opd.certify.worlds import make_world
from opd.errors import ConfigurationError
from opd.loss.readings import VocabularyReverseKL
from opd.method.method import Method
from opd.objectives.vocabulary import FullReverseKL
from opd.ports import Role
from opd.rollouts.student import StudentRollout
from opd.scorers.near_future import FutureDistances, NearFuture, SampledLogRatio
from opd.scorers.teacher import TeacherHidden
from opd.scorers.transport import Assignment, TokenIdentity
from opd.token_weights.far_futures import CapAtMedian, Part
from opd.types import FutureScores, Scored
from tests.unit.loop.test_loop import Bench
from tests.unit.loop.test_reading_pass import ReadingLearner

WORLD = make_world(0)
PARTS: dict[str, Any] = {"loss": SampledLogRatio(), "cost": TokenIdentity(), "transport": Assignment(), "fraction": 1.0}
TEXTS = enumerated(StudentRollout(max_tokens=3), FutureDistances(**PARTS), WORLD).scored
LONGEST = max(TEXTS, key=lambda item: len(item.trajectory))
NUMBERS = st.lists(st.floats(0, 30, width=32), min_size=12, max_size=12)


def text_of(losses: list[float], ahead: list[float], mask: list[bool] | None = None, seed: int = 0) -> Scored[Any]:
    """A text with the given loss and distance at each of its tokens."""
    n = len(losses)
    drawn = np.random.default_rng(seed).integers(3, 9, n).astype(np.int32)
    behavior = LONGEST.trajectory.behavior.take(np.zeros(n, int))
    trajectory = replace(
        LONGEST.trajectory,
        token_ids=drawn,
        behavior=behavior,
        loss_mask=np.asarray([True] * n if mask is None else mask),
        versions=np.zeros(n, np.int32),
    )
    scores = replace(LONGEST.scores.take(np.zeros(n, int)), ahead=np.asarray(ahead, np.float32))
    return Scored(
        trajectory=trajectory, scores=scores, readings={VocabularyReverseKL(): np.asarray(losses, np.float32)}
    )


def weighed(part: CapAtMedian, *texts: Scored[Any]) -> list[np.ndarray]:
    return part(texts, engines(WORLD, RequestLog()))


@given(st.lists(NUMBERS, min_size=1, max_size=3), st.data(), st.sampled_from(Part), st.floats(0, 1))
def test_a_capped_loss_is_at_most_the_median_and_all_others_stay(
    losses: list[list[float]], data: st.DataObject, part: Part, share: float
) -> None:
    """Distances are few different ones, so many are equal; the order of a step does not matter."""
    distances = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 1.5]), min_size=12, max_size=12)
    step = [text_of(row, data.draw(distances), seed=i) for i, row in enumerate(losses)]
    capped = CapAtMedian(share=share, part=part)
    for text, weights, chosen in zip(step, weighed(capped, *step), capped.chosen(step), strict=True):
        loss = np.asarray(text.readings[VocabularyReverseKL()], np.float64)
        assert (weights[~chosen] == 1).all() and ((weights >= 0) & (weights <= 1)).all()
        assert not chosen[np.asarray(text.scores.ahead) < 0].any()
        np.testing.assert_array_less(weights[chosen] * loss[chosen], np.median(loss) * (1 + 1e-6) + 1e-9)
    turned = weighed(capped, *step[::-1])[::-1]
    assert all((a == b).all() for a, b in zip(weighed(capped, *step), turned, strict=True))


def test_near_continuations_are_low_and_as_many_far_ones_are_high() -> None:
    ahead = [-1, 0.5, 0.1, 0.4, 0.2, 0.9, 0.8, 0.7, 0.6, 0.3]
    low, high = CapAtMedian(share=0.34), CapAtMedian(share=0.34, part=Part.HIGH)
    drawn = set()
    for seed in range(20):
        text = text_of([1.0] * 10, ahead, seed=seed)
        assert [np.flatnonzero(mask).tolist() for mask in low.chosen([text])] == [[2, 4, 9]]
        far = tuple(np.flatnonzero(high.chosen([text])[0]).tolist())
        assert len(far) == 3 and set(far) <= {1, 5, 6, 7, 8}
        drawn.add(far)
    assert len(drawn) > 3, "every text draws its own"


def test_short_texts_are_compared_with_those_of_the_step() -> None:
    """A text of one candidate: three tenths of it are none, of ten such texts they are three."""
    step = [text_of([1.0, 5.0], [-1.0, 0.1 * i], seed=i) for i in range(10)]
    assert [float(w[1]) for w in weighed(CapAtMedian(), *step)] == [0.6] * 3 + [1.0] * 7
    assert weighed(CapAtMedian(), step[0])[0].tolist() == [1.0, 1.0]


def test_others_words_are_neither_candidates_nor_in_the_median() -> None:
    mask = [True, False, True, True]
    (weights,) = weighed(CapAtMedian(share=1.0), text_of([1.0, float("nan"), 2.0, 8.0], [0.1, 0.0, 0.1, 0.1], mask))
    assert weights.tolist() == [1.0, 1.0, 1.0, 0.25]


def test_distances_are_those_that_decide_on_forks() -> None:
    """Tokens at distance 0 are no forks of `NearFuture`, and all others are at its quantile 0."""
    texts = [item.trajectory for item in TEXTS[:40]]
    found = asyncio.run(NearFuture(**PARTS, quantile=0.0, window=1)(texts, engines(WORLD, RequestLog())))
    ahead = asyncio.run(FutureDistances(**PARTS, window=1)(texts, engines(WORLD, RequestLog())))
    for labels, far in zip(found, ahead, strict=True):
        assert isinstance(far, FutureScores) and not isinstance(far.ahead, torch.Tensor)
        np.testing.assert_array_equal(labels.targets > 0, far.ahead > 0)  # type: ignore[attr-defined]
        assert set(np.unique(far.ahead)) <= {0.0, 1.0}


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_nothing_is_plain_bit_for_bit(make: Any, share: float) -> None:
    tables = []
    for parts in (
        {"scorer": TeacherHidden()},
        {"scorer": FutureDistances(**PARTS), "weights": {"capped": CapAtMedian(share=share)}},
    ):
        bench = Bench(make)
        fields = ("table", "teacher", "lr", "wait")
        bench.learner = ReadingLearner(**{name: getattr(bench.learner, name) for name in fields})
        method = Method(name="m", rollout=StudentRollout(max_tokens=8), objective=FullReverseKL(), **parts)  # type: ignore[arg-type]
        asyncio.run(bench.run(method, 3))
        tables.append(bench.learner.table)
    assert torch.equal(*tables) == (share == 0)


def test_the_shipped_method_asks_for_distances_and_weights_without_them_are_refused() -> None:
    method = run_config(["experiment=shop", "method=topd_downweight"]).method
    assert {need.role for need in method.scorer.needs_engines} == {Role.READER, Role.WRITER, Role.EMBEDDINGS}
    with pytest.raises(ConfigurationError, match=r"weight 'capped' CapAtMedian needs FutureScores, but scorer Teacher"):
        replace(method, scorer=TeacherHidden())
