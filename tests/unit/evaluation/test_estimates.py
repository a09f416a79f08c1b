"""Estimates are what enumeration says, and their intervals hold the truth as often as they promise."""

from itertools import combinations, product
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.evaluation.estimates import REPEATS, Estimate, bootstrap, majority_at, pass_at

REWARDS = {"right": 1.0, "half": 0.5, "wrong": 0.0, "other": 0.0, "": 0.0}
votes = st.lists(st.sampled_from(sorted(REWARDS)), min_size=1, max_size=8)


def majority_by_enumeration(answers: list[str], k: int) -> float:
    """Mean over all k of the samples of the mean reward of the answers with most votes."""
    total = 0.0
    for chosen in combinations(answers, k):
        counts = {answer: chosen.count(answer) for answer in chosen if answer}
        best = [REWARDS[answer] for answer, count in counts.items() if count == max(counts.values())]
        total += sum(best) / len(best) if best else 0.0
    return total / comb(len(answers), k)


@given(votes, st.data())
@settings(max_examples=200, deadline=None)
def test_majority_is_that_of_all_draws(answers: list[str], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(answers)))
    rewards = [REWARDS[answer] for answer in answers]
    assert majority_at(answers, rewards, k) == pytest.approx(majority_by_enumeration(answers, k), abs=1e-12)


@given(votes)
def test_one_vote_is_the_mean_reward(answers: list[str]) -> None:
    rewards = [REWARDS[answer] for answer in answers]
    assert majority_at(answers, rewards, 1) == pytest.approx(np.mean(rewards))


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_pass_is_the_share_of_draws_with_a_right_one(solved: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(solved)))
    draws = [any(chosen) for chosen in combinations(solved, k)]
    (found,) = pass_at(np.array([solved]), k)
    assert found == pytest.approx(np.mean(draws), abs=1e-12)


def test_pass_is_unbiased() -> None:
    """Over all outcomes of five samples with their chances it is the chance that two samples have a right one."""
    p, outcomes = 0.3, np.array(list(product([False, True], repeat=5)))
    chances = np.prod(np.where(outcomes, p, 1 - p), axis=1)
    assert (chances * pass_at(outcomes, 2)).sum() == pytest.approx(1 - (1 - p) ** 2)


def test_ties_are_drawn_and_silence_does_not_vote() -> None:
    assert majority_at(["right", "wrong"], [1.0, 0.0], 2) == 0.5
    assert majority_at(["right", "", "", ""], [1.0, 0.0, 0.0, 0.0], 4) == 1.0
    assert majority_at(["", ""], [0.0, 0.0], 2) == 0.0
    assert majority_at(["wrong", "wrong", "right"], [0.0, 0.0, 1.0], 3) == 0.0
    with pytest.raises(ValueError, match="from 1 to 2, got 3"):
        majority_at(["right", "wrong"], [1.0, 0.0], 3)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_an_interval_is_a_function_of_scores_and_seed(scores: list[float], seed: int) -> None:
    values = np.array(scores)
    found = bootstrap(values, seed)
    assert found == bootstrap(values, seed)
    assert values.min() - 1e-12 <= found.low <= found.high <= values.max() + 1e-12
    assert found.value == pytest.approx(values.mean())


def test_many_problems_are_drawn_in_parts() -> None:
    """More numbers than are drawn at once; the interval is that of a normal mean of so many."""
    scores = np.random.default_rng(0).random(5000)
    found = bootstrap(scores, 0)
    assert scores.size * REPEATS > 1 << 22
    assert found.high - found.low == pytest.approx(2 * 1.96 * scores.std() / np.sqrt(scores.size), rel=0.05)
    assert bootstrap(np.ones(7), 0) == Estimate(value=1.0, low=1.0, high=1.0)


@pytest.mark.parametrize("problems", [30, 200])
def test_intervals_cover_the_truth_in_95_of_100_repeats(problems: int) -> None:
    """Problems from a population, eight samples each; the truth is the population's."""
    hits = {"mean": 0, "pass": 0}
    for repeat in range(200):
        draw = np.random.default_rng(repeat)
        chances = draw.beta(1, 1, size=problems)
        solved = draw.random((problems, 8)) < chances[:, None]
        for name, scores, truth in (("mean", solved.mean(axis=1), 1 / 2), ("pass", pass_at(solved, 4), 4 / 5)):
            found = bootstrap(scores, 0)
            hits[name] += found.low <= truth <= found.high
    assert all(0.91 <= count / 200 <= 0.99 for count in hits.values()), hits
