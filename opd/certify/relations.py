"""What must hold whatever is promised: relations between a method's own results."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd.certify.gradients import (
    ALL,
    EXACT,
    NOTICED,
    SAME,
    Case,
    case,
    distance,
    enumerable,
    every_token,
    gradient,
    logits,
    slopes,
)
from opd.certify.page import Finding, Row, Skipped, at_least
from opd.certify.states import Enumerated
from opd.method import promises
from opd.method.method import weigh
from opd.ports import Layout
from opd.types import Batch, VocabularyScores

TEACHER = ("the teacher matters", "zero where the student equals its teacher", "a shifted teacher is noticed")
TOWARDS = "a step moves the student towards its teacher"
ALONE = "a promise without a teacher asks none"
EVALUATIONS = 100


def with_teacher(found: Case) -> Iterator[Finding]:
    """The teacher matters, its equal is left alone, and an answer about another position is not mistaken for one.

    Where the promise compares with no teacher, it must not matter who reads.
    """
    world, exact, trained = found.world, found.exact(), found.training()
    other = case(found.method, world.taught_by(world.strangers))
    moved = distance(trained, other.training())
    if distance(exact, found.exact(teachers=world.strangers)) < NOTICED:
        why = "the promise compares with no teacher"
        yield from (Skipped(name=name, why=why) for name in (*TEACHER, TOWARDS))
        yield Row(name=ALONE, measured=moved, tolerance=0.0)
        return
    yield Skipped(name=ALONE, why="the promise compares with a teacher")
    yield at_least(TEACHER[0], moved, NOTICED)
    equal = case(found.method, world.equal())
    yield Row(name=TEACHER[1], measured=_per_token(equal), tolerance=EXACT)
    wrong = distance(case(found.method, replace(world, shift=1)).training(), exact)
    measured = min(_per_token(case(found.method, replace(world.equal(), shift=1))), wrong)
    yield at_least(TEACHER[2], measured, NOTICED)
    directions = (promises.ReverseKL(), promises.ForwardKL())
    yield at_least(TOWARDS, max(_cosine(trained, found.exact(d)) for d in directions), 0.1)


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def _per_token(found: Case) -> float:
    """The largest gradient with respect to the logits that any single written token causes."""
    batch = every_token(found.seen)
    return float(slopes(enumerable(found.method.objective), logits(found.seen, batch), batch).abs().max())


def of_steps(found: Case) -> Iterator[Finding]:
    """The same step cut, spread and ordered in other ways has the same gradient."""
    seen, weights = some(found)
    longest = max(len(s.trajectory.prompt.student_ids) + len(s.trajectory) for s in seen.scored)
    objective, normalizer = found.method.objective, found.method.normalizer
    expected = gradient(seen, weights, objective, normalizer)

    def differs(ranks: int = 1, tokens: int = ALL, **how: Any) -> float:
        layout = Layout(ranks=ranks, tokens_per_microbatch=tokens)
        return distance(gradient(seen, weights, objective, normalizer, layout=layout, **how), expected)

    order = np.random.default_rng(0).permutation(len(weights))
    measured = {
        "micro-batch size": max(differs(tokens=longest * n) for n in (2, 5)),
        "packing and padding (every trajectory alone)": differs(tokens=longest),
        "number of ranks": max(differs(ranks=n, tokens=longest * 3) for n in (2, 3)),
        "ranks without work": differs(ranks=len(weights) + 3),
        "scale of the weights": _scaled(found, expected, weights, seen),
        "chunks of the loss": max(differs(chunk=n) for n in (1, 7)),
        "order of the trajectories": differs(order=order),
        "evaluated before": _repeated(found, expected, weights, seen),
    }
    yield from (Row(name=f"invariance: {name}", measured=x, tolerance=SAME) for name, x in measured.items())


def _scaled(found: Case, expected: Tensor, weights: list[np.ndarray], seen: Enumerated) -> float:
    """A step's sum grows as its weights do; what it is divided by may."""
    more, divisor = [4.0 * w for w in weights], found.method.normalizer
    scaled = gradient(seen, more, found.method.objective, divisor) * divisor(more)
    return distance(scaled, 4.0 * expected * divisor(weights))


def _repeated(found: Case, expected: Tensor, weights: list[np.ndarray], seen: Enumerated) -> float:
    """Nothing is kept between evaluations, and no random number is taken from, or given to, anybody else."""
    batch, before = every_token(found.seen), torch.get_rng_state()
    few = batch.rows(0, 3)
    at = logits(found.seen, batch)[:3]
    first = slopes(found.method.objective, at, few)
    later = [slopes(found.method.objective, at, few) for _ in range(EVALUATIONS)]
    again = gradient(seen, weights, found.method.objective, found.method.normalizer)
    drawn = float(not torch.equal(before, torch.get_rng_state()))
    return max(*(distance(first, one) for one in later), distance(again, expected), drawn)


def some(found: Case) -> tuple[Enumerated, list[np.ndarray]]:
    """A step of some fifteen trajectories with the method's own weights, made uneven."""
    seen = found.seen
    pick = [i for i in range(0, len(seen.scored), 7) if seen.chances[i] > 0][:12]
    pick += [i for i in range(len(seen.scored) - 1, 0, -11) if seen.chances[i] > 0][:5]  # of another prompt
    few = replace(seen, scored=[seen.scored[i] for i in pick], place=seen.place[pick], chances=seen.chances[pick])
    own = weigh(found.method.weights, few.scored, few.context)
    factors = (0.5, 1.0, 2.0)
    uneven = [w * [factors[(i + t) % 3] for t in range(len(w))] for i, w in enumerate(own)]
    likely = [np.isfinite(s.trajectory.behavior.logprobs) for s in few.scored]
    return few, [w * mask for w, mask in zip(uneven, likely, strict=True)]


def of_masks(found: Case) -> Iterator[Finding]:
    """What is said about a masked token is never heard."""
    seen, weights = some(found)
    masked = [w * (np.arange(len(w)) % 2 == i % 2) for i, w in enumerate(weights)]
    spoiled = []
    for item, weight in zip(seen.scored, masked, strict=True):
        kept = np.flatnonzero(weight) if weight.any() else np.arange(1)
        index = np.where(weight > 0, np.arange(len(weight)), kept[0])
        spoiled.append(replace(item, scores=item.scores.take(index)))
    objective, normalizer = found.method.objective, found.method.normalizer
    before = gradient(seen, masked, objective, normalizer)
    after = gradient(replace(seen, scored=spoiled), masked, objective, normalizer)
    yield Row(name="masked tokens give zero", measured=distance(before, after), tolerance=0.0)
    yield from _normalizer(found, masked)


def _normalizer(found: Case, weights: list[np.ndarray]) -> Iterator[Finding]:
    """What a step is divided by does not depend on what is not trained, nor on order or earlier steps."""
    divisor, (scaled, *_) = found.method.normalizer, weights
    expected = divisor(weights)
    others = {
        "order": divisor(weights[::-1]),
        "texts without weight": divisor([*weights, np.zeros(400), np.zeros(1)]),
        "masked tokens": divisor([np.concatenate([w, np.zeros(i)]) for i, w in enumerate(weights)]),
        "earlier steps": [divisor([scaled]), divisor(weights)][1],
    }
    doubled = divisor([*weights, *weights]) / expected  # a sum is divided by a constant, a mean by what it counts
    measured = max(*(abs(value / expected - 1) for value in others.values()), min(abs(doubled - n) for n in (1, 2)))
    yield Row(name="the divisor of a step counts what is trained", measured=measured, tolerance=SAME)


SHIFTS = (1, 64, 300, 5000, 1_000_000)
PADDED = 2**15  # ids of a vocabulary, nearly all of them of probability 0
DEAD = -1e4  # the log-probability of those: 0 in float64
CROWD = 64  # times the tokens of a small world: thousands


def of_tokens(found: Case) -> Iterator[Finding]:
    """The loss of a token depends on its state and what was said about it: not on where it stands or what it weighs."""
    batch, objective = every_token(found.seen), enumerable(found.method.objective)
    at = logits(found.seen, batch)
    expected = slopes(objective, at, batch)

    def differs(changed: Batch[Any]) -> float:
        return distance(slopes(objective, at, changed), expected)

    moved = [
        replace(batch, depth=batch.depth + down, position_ids=batch.position_ids + down + ahead)
        for n in SHIFTS
        for down, ahead in ((n, 0), (0, n))  # in a longer text, after a longer prompt
    ]
    name = "invariance: position in the text"
    yield Row(name=name, measured=max(map(differs, moved)), tolerance=SAME)
    heavier = replace(batch, weights=batch.weights * 3, denominator=batch.denominator * 7)
    yield Row(name="invariance: weight and divisor", measured=differs(heavier), tolerance=SAME)
    yield Row(name="invariance: other tokens of the batch", measured=_neighbors(objective, at, batch), tolerance=SAME)
    yield Row(name="invariance: ids of probability 0", measured=_padded(found, at, batch), tolerance=SAME)
    watched = slopes(objective, at, batch, overlap_k=16)
    yield Row(name="invariance: what is reported", measured=distance(watched, expected), tolerance=SAME)


def _neighbors(objective: Any, at: Tensor, batch: Batch[Any]) -> float:
    """Rows one by one, and thousands together, have the slopes that they have among others."""
    expected = slopes(objective, at, batch)
    rows = range(0, len(batch), 5)
    alone = torch.cat([slopes(objective, at[i : i + 1], batch.rows(i, i + 1)) for i in rows])
    many = torch.arange(len(batch)).repeat(CROWD)
    crowd = _taken(batch, many)
    return max(distance(alone, expected[list(rows)]), distance(slopes(objective, at[many], crowd), expected[many]))


def _taken(batch: Batch[Any], rows: Tensor) -> Batch[Any]:
    """The trained tokens `rows` of a batch, in that order and as often."""
    of_tokens = ("predict_at", "target_ids", "behavior_logprobs", "weights", "depth", "route")
    fields = {name: getattr(batch, name) for name in of_tokens}
    taken = {name: values[rows] for name, values in fields.items() if len(values)}
    return replace(batch, **taken, scores=batch.scores.take(rows.numpy()))


def _padded(found: Case, at: Tensor, batch: Batch[Any]) -> float:
    """A vocabulary padded to thousands of ids, as those of checkpoints are, has the slopes of its living ids."""
    rows = torch.arange(0, len(batch), 6)
    few, objective = _taken(batch, rows), found.method.objective  # as it is: dead ids are never drawn
    expected = slopes(objective, at[rows], few)

    def wide(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, PADDED - x.shape[1]), value=DEAD)

    if isinstance(few.scores, VocabularyScores):
        few = replace(few, scores=replace(few.scores, vocabulary_logprobs=wide(few.scores.vocabulary_logprobs)))
    measured = slopes(objective, wide(at[rows]), few)
    return distance(measured, torch.nn.functional.pad(expected, (0, PADDED - expected.shape[1])))
