"""The gradient certificate: does a composed method train what its name says?

`certify` runs the method's own rollout, scorer, packing and loss on an enumerable world (`opd.enumeration`) in
float64 and compares. Supports are cut down to a few of its dozen ids: no property depends on their size, and
enumerating is quadratic in the vocabulary. Every row is a property with a measured number, a bound and a verdict.
Nothing is left to chance, so a certificate is the same on every machine.
"""

import asyncio
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from opd.divergences import Promise, whole
from opd.enumeration import Enumerated, World, enumerate_world, make_world, stale
from opd.logits import StudentLogits, chunked_loss, read
from opd.method import Method, weigh
from opd.packing import Normalizer, TokenMean, pack
from opd.ports import Layout
from opd.types import Batch, Scored, TokenLoss
from opd.weights.special import look_up

EXACT = 1e-6  # behavior log-probabilities and weights travel in float32
SAME = 1e-9  # two sums of the same float64 numbers
NOTICED = 1e-3  # what a defect must change to be seen
SEEDS = (0, 1)
VOCABULARY = 12
_SUPPORT_FIELDS = ("k", "record_topk")
_SUPPORT = 4  # the most ids a support may have
_ALL = 2**30
_ONE = Layout(ranks=1, tokens_per_microbatch=_ALL)


class Bound(Enum):
    """On which side of its bound a measured number must lie."""

    AT_MOST = "<="
    AT_LEAST = ">="


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One property. Example: `Row(name="ranks", measured=3e-16, bound=Bound.AT_MOST, tolerance=1e-9)`."""

    name: str
    measured: float
    tolerance: float
    bound: Bound = Bound.AT_MOST

    @property
    def passed(self) -> bool:
        """A number that is not finite never passes."""
        if not math.isfinite(self.measured):
            return False
        above = self.measured >= self.tolerance
        return above if self.bound is Bound.AT_LEAST else self.measured <= self.tolerance


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What was found. `skipped` says which properties do not apply, and why."""

    method: str
    promise: str
    rows: tuple[Row, ...]
    skipped: Mapping[str, str]

    @property
    def passed(self) -> bool:
        return bool(self.rows) and all(row.passed for row in self.rows)

    @property
    def failures(self) -> list[str]:
        """Names of the properties that do not hold."""
        return [row.name for row in self.rows if not row.passed]


def certify(method: Method) -> Certificate:
    """Check every property that applies to `method`. Raises what its parts raise."""
    promise = getattr(method.objective, "promise", None)
    if promise is None:
        return Certificate(
            method=method.name,
            promise="nothing: the objective has no `promise`",
            rows=(Row(name="a promise is declared", measured=0.0, tolerance=1.0, bound=Bound.AT_LEAST),),
            skipped={},
        )
    rows, skipped = [], {}
    said, method = str(promise), _with_k(method, lambda k: min(k, _SUPPORT))
    method = replace(method, weights=look_up(method.weights, {}))  # the ids of an enumerable world have no names
    promise = method.objective.promise
    worlds = [make_world(seed, VOCABULARY) for seed in SEEDS]
    cases = [_Case(method=method, promise=promise, world=w, fresh=_read(method, w)) for w in worlds]
    several: tuple[Callable[[_Case], Iterator[Finding]], ...] = (_gradient, _teacher)
    for check in (*several, _invariance, _mask, _limits, _draws):
        found = [list(check(case)) for case in (cases if check in several else cases[:1])]
        for same in zip(*found, strict=True):
            if isinstance(same[0], Row):
                rows.append(_worst([row for row in same if isinstance(row, Row)]))
            else:
                skipped |= dict([same[0]])
    return Certificate(method=method.name, promise=said, rows=tuple(rows), skipped=skipped)


def _read(method: Method, world: World) -> Enumerated:
    """Everything that can be written in `world`, with what the method's scorer says about it."""
    found: list[Enumerated] = []

    async def look() -> None:  # returns nothing, because asyncio prints the result of the task it runs
        found.append(await enumerate_world(method.rollout, method.scorer, world))

    asyncio.run(look())
    return found[0]


Finding = Row | tuple[str, str]


def _worst(rows: list[Row]) -> Row:
    """Of the same property in several worlds: the one that fails, or is nearest to it."""
    broken = [row for row in rows if not row.passed]
    sign = 1 if rows[0].bound is Bound.AT_LEAST else -1
    return broken[0] if broken else min(rows, key=lambda row: sign * row.measured)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """A method in a world."""

    method: Method
    promise: Promise
    world: World
    fresh: Enumerated

    def training(self, seen: Enumerated, objective: Any = None) -> Tensor:
        """The expected training gradient: every token that could be written, weighted with its chance."""
        weights = seen.weights(seen.chances)
        return gradient(seen, weights, _enumerable(objective or self.method.objective), self.method.normalizer)

    def exact(self, seen: Enumerated, promise: Promise | None = None, teacher: Any = None) -> Tensor:
        """The gradient of the promise over the same states, divided as training divides."""
        student = _leaf(seen.world)
        states = seen.states(student, teacher or seen.world.teacher)
        value = (promise or self.promise)(states).sum() / self.method.normalizer(seen.weights(seen.chances))
        return _flat(torch.autograd.grad(value, (student.embedding, student.head), allow_unused=True), student)


def _leaf(world: World) -> Any:
    model = world.student
    return replace(model, embedding=model.embedding.clone().requires_grad_(), head=model.head.clone().requires_grad_())


def _flat(gradients: tuple[Tensor | None, ...], model: Any) -> Tensor:
    both = zip(gradients, (model.embedding, model.head), strict=True)
    return torch.cat([(torch.zeros_like(m) if g is None else g).flatten() for g, m in both])


def gradient(
    seen: Enumerated,
    weights: list[np.ndarray],
    objective: Any,
    normalizer: Normalizer,
    *,
    layout: Layout = _ONE,
    chunk: int = _ALL,
    order: np.ndarray | None = None,
) -> Tensor:
    """The gradient that a learner would step along, through the real packing and the real loss."""
    order = np.arange(len(weights)) if order is None else order
    student = _leaf(seen.world)
    total = torch.zeros((), dtype=torch.float64)
    scored: list[Scored[Any]] = [seen.scored[i] for i in order]
    for batches in pack(scored, [weights[i] for i in order], layout, normalizer):
        for batch in batches:
            here = batch.to("cpu", lambda rows: rows)
            hidden = student.hidden(here.input_ids, here.position_ids)[here.predict_at]
            evaluate = _evaluation(objective, here, seen.world)
            total = total + chunked_loss(hidden, student.head, here.weights, evaluate, chunk)[0] / batch.denominator
    return _flat(torch.autograd.grad(total, (student.embedding, student.head)), student)


def _evaluation(objective: Any, here: Batch[Any], world: World) -> Callable[[StudentLogits, int, int], TokenLoss]:
    def evaluate(student: StudentLogits, start: int, stop: int) -> TokenLoss:
        return objective(student, read(here.rows(start, stop), world.teacher.head))

    return evaluate


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest difference relative to the largest number, or to a thousandth where both are smaller."""
    scale = max(float(a.abs().max()), float(b.abs().max()), 1e-3)
    return float((a - b).abs().max()) / scale


def _gradient(case: _Case) -> Iterator[Finding]:
    """The expected gradient is that of the promise, whoever wrote."""
    fresh = case.fresh
    yield Row(name="gradient of the promise", measured=_distance(*_both(case, fresh)), tolerance=EXACT)
    name = "gradient of the promise, stale writer"
    if getattr(case.method.rollout, "on_policy", False):
        old = _read(case.method, stale(case.world, 1))
        yield Row(name=name, measured=_distance(*_both(case, old)), tolerance=EXACT)
    else:
        yield name, "the student is not the writer"
    broken = float(not fresh.support_is_fixed())
    yield Row(name="the support does not depend on the written token", measured=broken, tolerance=0.0)


def _both(case: _Case, seen: Enumerated) -> tuple[Tensor, Tensor]:
    return case.training(seen), case.exact(seen)


def _teacher(case: _Case) -> Iterator[Finding]:
    """The teacher matters, its equal is left alone, and an answer about another position is not mistaken for one."""
    names = ("the teacher matters", "zero where the student equals its teacher", "a shifted teacher is noticed")
    fresh = case.fresh
    exact = case.exact(fresh)
    if _distance(exact, case.exact(fresh, teacher=case.world.stranger)) < NOTICED:
        yield from ((name, "the promise compares with no teacher") for name in names)
        return
    other = _read(case.method, replace(case.world, teacher=case.world.stranger))
    moved = _distance(case.training(fresh), case.training(other))
    yield Row(name=names[0], measured=moved, tolerance=NOTICED, bound=Bound.AT_LEAST)
    equal = replace(case.world, teacher=case.world.student)
    yield Row(name=names[1], measured=_per_token(case, _read(case.method, equal)), tolerance=EXACT)
    shifted = _read(case.method, replace(equal, shift=1))
    wrong = _distance(case.training(_read(case.method, replace(case.world, shift=1))), exact)
    measured = min(_per_token(case, shifted), wrong)
    yield Row(name=names[2], measured=measured, tolerance=NOTICED, bound=Bound.AT_LEAST)


def _per_token(case: _Case, seen: Enumerated) -> float:
    """The largest gradient with respect to the logits that any single written token causes."""
    weights = seen.weights((seen.chances > 0).astype(np.float64))
    ((batch,),) = pack(seen.scored, weights, _ONE, TokenMean())
    here = batch.to("cpu", lambda rows: rows)
    model = seen.world.student
    logits = model.hidden(here.input_ids, here.position_ids)[here.predict_at] @ model.head.T
    leaf = logits.detach().requires_grad_()
    loss = _evaluation(case.method.objective, here, seen.world)(StudentLogits(logits=leaf), 0, len(here)).loss
    (slope,) = torch.autograd.grad(loss.sum(), leaf)
    return float(slope.abs().max())


def _invariance(case: _Case) -> Iterator[Finding]:
    """The same step cut, spread and ordered in other ways has the same gradient."""
    seen, weights = _some(case)
    longest = max(len(s.trajectory.prompt.student_ids) + len(s.trajectory) for s in seen.scored)
    objective, normalizer = case.method.objective, case.method.normalizer
    expected = gradient(seen, weights, objective, normalizer)

    def differs(ranks: int = 1, tokens: int = _ALL, **how: Any) -> float:
        layout = Layout(ranks=ranks, tokens_per_microbatch=tokens)
        return _distance(gradient(seen, weights, objective, normalizer, layout=layout, **how), expected)

    order = np.random.default_rng(0).permutation(len(weights))
    found = {
        "micro-batch size": max(differs(tokens=longest * n) for n in (2, 5)),
        "packing and padding (every trajectory alone)": differs(tokens=longest),
        "number of ranks": max(differs(ranks=n, tokens=longest * 3) for n in (2, 3)),
        "chunks of the loss": max(differs(chunk=n) for n in (1, 7)),
        "order of the trajectories": differs(order=order),
    }
    yield from (Row(name=f"invariance: {name}", measured=x, tolerance=SAME) for name, x in found.items())


def _some(case: _Case) -> tuple[Enumerated, list[np.ndarray]]:
    """A step of some twenty trajectories with the method's own weights, made uneven."""
    seen = case.fresh
    pick = [i for i in range(0, len(seen.scored), 5) if seen.chances[i] > 0][:24]
    pick += [i for i in range(len(seen.scored) - 1, 0, -7) if seen.chances[i] > 0][:8]  # of another prompt
    few = replace(seen, scored=[seen.scored[i] for i in pick], place=seen.place[pick], chances=seen.chances[pick])
    own = weigh(case.method.weights, few.scored)
    factors = (0.5, 1.0, 2.0)
    uneven = [w * [factors[(i + t) % 3] for t in range(len(w))] for i, w in enumerate(own)]
    likely = [np.isfinite(s.trajectory.behavior.logprobs) for s in few.scored]
    return few, [w * mask for w, mask in zip(uneven, likely, strict=True)]


def _mask(case: _Case) -> Iterator[Finding]:
    """What is said about a masked token is never heard."""
    seen, weights = _some(case)
    masked = [w * (np.arange(len(w)) % 2 == i % 2) for i, w in enumerate(weights)]
    spoiled = []
    for item, weight in zip(seen.scored, masked, strict=True):
        kept = np.flatnonzero(weight) if weight.any() else np.arange(1)
        index = np.where(weight > 0, np.arange(len(weight)), kept[0])
        spoiled.append(replace(item, scores=item.scores.take(index)))
    objective, normalizer = case.method.objective, case.method.normalizer
    before = gradient(seen, masked, objective, normalizer)
    after = gradient(replace(seen, scored=spoiled), masked, objective, normalizer)
    yield Row(name="masked tokens give zero", measured=_distance(before, after), tolerance=0.0)


def _limits(case: _Case) -> Iterator[Finding]:
    """Limiting cases: a support of everything, and those that objective and rollout list themselves."""
    grown = _with_k(case.method, lambda _: case.world.vocabulary)
    if grown != case.method:
        method = grown
        seen = _read(method, case.world)
        trained = replace(case, method=method).training(seen)
        error = _distance(trained, case.exact(seen, whole(method.objective.promise)))
        yield Row(name="limit: k = V is the whole vocabulary", measured=error, tolerance=EXACT)
    for limit in getattr(case.method.objective, "limits", ()):
        method = replace(case.method, objective=limit.objective)
        seen = _read(method, case.world)
        error = _distance(limit.scale * case.training(seen, limit.objective), case.exact(seen, limit.promise))
        yield Row(name=f"limit: {limit.name}", measured=error, tolerance=limit.tolerance)
    for limit in getattr(case.method.rollout, "limits", ()):
        seen = _read(replace(case.method, rollout=limit.rollout), case.world)
        plain = _read(replace(case.method, rollout=limit.equals), case.world)
        same = [
            np.array_equal(a.trajectory.behavior.logprobs, b.trajectory.behavior.logprobs)
            for a, b in zip(seen.scored, plain.scored, strict=True)
        ]
        yield Row(name=f"limit: {limit.name}", measured=float(len(same) - sum(same)), tolerance=0.0)


def _with_k(part: Any, size: Callable[[int], int]) -> Any:
    """The same part with every support's number of ids changed."""
    if not is_dataclass(part) or isinstance(part, type):
        return part
    changed = {}
    for f in fields(part):
        value = getattr(part, f.name)
        new = size(value) if f.name in _SUPPORT_FIELDS and value else _with_k(value, size)
        if new != value:
            changed[f.name] = new
    return replace(part, **changed) if changed else part


class Drawing(Protocol):
    """An objective that draws tokens itself, independently and from the current student, and averages over them."""

    samples: int

    def draw(self, student: StudentLogits, batch: Batch[Any]) -> Int[Tensor, "n m"]:
        """`samples` ids per state: a function of the row's content alone, wherever the row was packed."""
        ...

    def given(self, ids: Int[Tensor, "n m"], student: StudentLogits, batch: Batch[Any]) -> TokenLoss:
        """The loss if `ids` were drawn."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _EveryDraw:
    """A drawing objective with every draw it could make, weighted with its chance."""

    of: Drawing

    def __call__(self, student: StudentLogits, batch: Batch[Any]) -> TokenLoss:
        chances = student.logprobs.detach().exp()
        total = torch.zeros_like(chances[:, 0])
        for token in range(chances.shape[1]):
            ids = torch.full((len(total), self.of.samples), token)
            total = total + chances[:, token] * self.of.given(ids, student, batch).loss
        return TokenLoss(loss=total, metrics={})


def _enumerable(objective: Any) -> Any:
    return _EveryDraw(of=objective) if hasattr(objective, "given") else objective


def _draws(case: _Case) -> Iterator[Finding]:
    """Tokens that the objective itself draws come from the current student."""
    objective: Any = case.method.objective
    if not hasattr(objective, "given"):
        return
    seen = case.fresh
    weights = seen.weights((seen.chances > 0).astype(np.float64))
    ((batch,),) = pack(seen.scored, weights, _ONE, TokenMean())
    here = batch.to("cpu", lambda rows: rows)
    model = seen.world.student
    student = StudentLogits(logits=model.hidden(here.input_ids, here.position_ids)[here.predict_at] @ model.head.T)
    ids = objective.draw(student, read(here.rows(0, len(here)), seen.world.teacher.head))
    p = student.logprobs.exp()
    drawn = torch.zeros_like(p).scatter_add(-1, ids, torch.ones_like(ids, dtype=p.dtype)).sum(0)
    expected, spread = ids.shape[1] * p.sum(0), (ids.shape[1] * (p * (1 - p)).sum(0)).sqrt()
    worst = float(((drawn - expected) / spread).abs().max())
    yield Row(name="draws follow the student (standard errors)", measured=worst, tolerance=5.0)
