"""Estimators of mean@k, pass@k and maj@k from n samples a problem, with bootstrap intervals over the problems."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float

REPEATS = 2000  # resamples of the problems
LEVEL = 0.95  # of an interval
MOST_VOTES = 1000  # samples a problem, up to which binomial coefficients are finite in float64
_AT_ONCE = 1 << 22  # numbers that are drawn at once
_LEAST = 0.05  # of a denominator, which a few very skewed scores would make negative
_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Estimate of a mean over problems, with the ends of its interval.

    Example: `Estimate(value=0.61, low=0.57, high=0.65)`.
    """

    value: float
    low: float
    high: float


def bootstrap(scores: Float[np.ndarray, " problems"], seed: int) -> Estimate:
    """Mean of the problems' scores, and its bootstrap interval over `REPEATS` resamples of the problems.

    A pure function of both. The problems are taken for a random sample of all that could be asked; how much the samples
    of one problem differ is in its score, and so in the interval. It is the interval BCa (Efron 1987), which minds that
    scores near 0 or 1 are skewed, widened for few problems as Student's t and the n - 1 of a variance ask for
    (Hesterberg, arXiv 1411.5279). Scores that are all equal have an interval of no width.
    """
    if len(scores) == 0:
        raise ValueError("no problem has a score")
    mean, count = float(scores.mean()), len(scores)
    deviations = scores - mean
    spread = float((deviations**2).sum())
    if np.ptp(scores) == 0:
        return Estimate(value=mean, low=mean, high=mean)
    means = _resampled(scores, seed)
    skew = float((deviations**3).sum()) / (6 * spread**1.5)  # the acceleration of BCa, of a mean
    below = float(((means < mean).mean() + (means <= mean).mean()) / 2)
    bias = _NORMAL.inv_cdf(min(max(below, 1 / REPEATS), 1 - 1 / REPEATS))
    width = _quantile(count)
    low, high = (bias + (bias + z) / max(1 - skew * (bias + z), _LEAST) for z in (-width, width))
    ends = np.percentile(means, [100 * _NORMAL.cdf(low), 100 * _NORMAL.cdf(high)])
    return Estimate(value=mean, low=float(ends[0]), high=float(ends[1]))


def _resampled(scores: Float[np.ndarray, " problems"], seed: int) -> Float[np.ndarray, " repeats"]:
    """Means of resamples; so few at once that memory stays small."""
    draw, rows = np.random.default_rng(seed), max(1, _AT_ONCE // len(scores))
    sizes = [min(rows, REPEATS - first) for first in range(0, REPEATS, rows)]
    return np.concatenate([scores[draw.integers(len(scores), size=(size, len(scores)))].mean(axis=1) for size in sizes])


def _quantile(count: int) -> float:
    """Standard deviations from the mean to an end, for so many problems (at least 2)."""
    z = _NORMAL.inv_cdf((1 + LEVEL) / 2)
    t = z * (1 + (z * z + 1) / (4 * (count - 1)))  # Student's quantile, to the first order in 1 / (n - 1)
    return t * math.sqrt(count / (count - 1))


def pass_at(solved: Bool[np.ndarray, "problems samples"], k: int) -> Float[np.ndarray, " problems"]:
    """Unbiased pass@k of every problem: chance that k of its n samples, drawn without repeats, have a right one.

    `1 - C(n - c, k) / C(n, k)` with c right ones (arXiv 2107.03374 eq. 1), by a product that does not overflow.
    """
    total = solved.shape[1]
    _check(k, total)
    right = solved.sum(axis=1)
    missed = np.ones(len(solved))
    for i in range(k):
        missed *= np.clip(total - right - i, 0, None) / (total - i)
    return 1 - missed


def majority_at(answers: Sequence[str], rewards: Sequence[float], k: int) -> float:
    """Expected reward of the majority's answer among k of a problem's n samples, drawn without repeats: exact.

    Equal answers have one name; "" is none, and does not vote. Answers that tie for most votes win by lot, each with
    the same chance; where none of the k names an answer the reward is 0. An answer is worth the mean of its samples.
    """
    _check(k, len(answers))
    votes: dict[str, list[float]] = {}
    for answer, reward in zip(answers, rewards, strict=True):
        if answer:
            votes.setdefault(answer, []).append(reward)
    counts = [len(given) for given in votes.values()]
    worth = [sum(given) / len(given) for given in votes.values()]
    if k == len(answers):  # all samples: one draw
        best = [w for w, count in zip(worth, counts, strict=True) if count == max(counts)]
        return sum(best) / len(best) if best else 0.0
    if len(answers) > MOST_VOTES:
        raise ValueError(f"maj@k of fewer than all samples needs at most {MOST_VOTES} samples, got {len(answers)}")
    silent = len(answers) - sum(counts)
    most = range(1, min(k, max(counts, default=0)) + 1)
    return sum(_won_with(v, counts, worth, silent, k) for v in most) / math.comb(len(answers), k)


def _won_with(most: int, counts: Sequence[int], worth: Sequence[float], silent: int, k: int) -> float:
    """Sum, over all draws in which the winner has `most` votes, of the mean reward of the answers that have them.

    `ways[m, t]` counts the draws of m samples with t answers at `most` votes and none above, `sums` adds the rewards of
    those t over the same draws; answers are added one by one.
    """
    tied = k // most
    ways, sums = np.zeros((k + 1, tied + 1)), np.zeros((k + 1, tied + 1))
    for m in range(min(silent, k) + 1):
        ways[m, 0] = math.comb(silent, m)
    for count, reward in zip(counts, worth, strict=True):
        before, earned = ways, sums
        ways, sums = before.copy(), earned.copy()  # none of this answer
        for m in range(1, min(count, most - 1) + 1):
            chosen = float(math.comb(count, m))
            ways[m:] += chosen * before[:-m]
            sums[m:] += chosen * earned[:-m]
        if count >= most:
            chosen = float(math.comb(count, most))
            ways[most:, 1:] += chosen * before[:-most, :-1]
            sums[most:, 1:] += chosen * (earned[:-most, :-1] + reward * before[:-most, :-1])
    return float((sums[k, 1:] / np.arange(1, tied + 1)).sum())


def _check(k: int, total: int) -> None:
    if not 1 <= k <= total:
        raise ValueError(f"k needs a number of samples from 1 to {total}, got {k}")
