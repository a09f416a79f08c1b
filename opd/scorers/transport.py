"""Optimal transport between two short texts: costs between tokens, solvers, and the soft labels that a plan makes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int

from opd.ports import Context, Need, Role
from opd.settings.ranges import In
from opd.settings.validation import settings
from opd.types import TargetScores

_CHECKED = 10  # iterations between two looks at whether a problem is solved
Ids = Int[np.ndarray, " _n"]
Costs = Float[np.ndarray, "_n _m"]


class GroundCost(Protocol):
    """Part that gives the cost of transporting one token to another."""

    @property
    def needs_engines(self) -> frozenset[Need]:
        """Engines that it calls."""
        ...

    def between(self, own: Sequence[Ids], others: Sequence[Ids], context: Context) -> list[Costs]:
        """Costs `[student, teacher]`, all >= 0, of every pair of windows."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingCosine:
    """`1 - cos` of the student's input embeddings, in [0, 2]; they are those of its folder and stay so in training."""

    needs_engines: ClassVar[frozenset[Need]] = frozenset({Need(Role.EMBEDDINGS)})

    def between(self, own: Sequence[Ids], others: Sequence[Ids], context: Context) -> list[Costs]:
        known, index = np.unique(np.concatenate([*own, *others]), return_inverse=True)
        rows = context.embeddings.rows(known.astype(np.int32)).astype(np.float64)
        rows /= np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-30)
        parts = np.split(index, np.cumsum([len(ids) for ids in (*own, *others)])[:-1])
        pairs = zip(parts[: len(own)], parts[len(own) :], strict=True)
        return [_apart(rows, mine, theirs) for mine, theirs in pairs]


def _apart(rows: Float[np.ndarray, "u H"], mine: Ids, theirs: Ids) -> Costs:
    cost = np.clip(1 - rows[mine] @ rows[theirs].T, 0.0, 2.0)
    cost[mine[:, None] == theirs[None, :]] = 0.0  # exactly, whatever was rounded
    return cost


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenIdentity:
    """0 between equal tokens and 1 between all others: how much two windows differ as bags of tokens."""

    needs_engines: ClassVar[frozenset[Need]] = frozenset()

    def between(self, own: Sequence[Ids], others: Sequence[Ids], context: Context) -> list[Costs]:
        pairs = zip(own, others, strict=True)
        return [(mine[:, None] != theirs[None, :]).astype(np.float64) for mine, theirs in pairs]


class Transport(Protocol):
    """Part that solves a transport problem between windows whose tokens all have the same mass."""

    def plans(self, costs: Sequence[Costs]) -> list[Costs]:
        """A plan of every problem: masses `[student, teacher]` that sum to 1, rows to `1/n`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class Assignment:
    """Exact transport between windows of one length: every token is assigned to one other (a linear assignment).

    Of equally cheap ones, that with the least `|i - j|` (`tie` is added for each). Of two windows of different lengths
    the longer loses its end: its tokens beyond the shorter one have no mass.
    """

    # cost of a place that two assigned tokens are apart, which decides between equally cheap assignments
    tie: Annotated[float, In(0, 1)] = 1e-6

    def plans(self, costs: Sequence[Costs]) -> list[Costs]:
        return [self._one(cost) for cost in costs]

    def _one(self, cost: Costs) -> Costs:
        n = min(cost.shape)
        places = np.arange(n)
        plan = np.zeros_like(cost)
        plan[places, assigned(cost[:n, :n] + self.tie * np.abs(places[:, None] - places[None, :]))] = 1 / n
        return plan


def assigned(cost: Float[np.ndarray, "n n"]) -> Int[np.ndarray, " n"]:
    """Column of each row in the cheapest assignment (Hungarian method with potentials, O(n^3))."""
    n = len(cost)
    of_row, of_column = np.zeros(n), np.zeros(n + 1)  # potentials; column n stands for "none yet"
    row_of = np.full(n + 1, -1)
    for row in range(n):
        row_of[n], column = row, n
        least, before = np.full(n, np.inf), np.full(n, n)
        done = np.zeros(n + 1, dtype=bool)
        while row_of[column] >= 0:
            done[column] = True
            reduced = cost[row_of[column]] - of_row[row_of[column]] - of_column[:n]
            better = ~done[:n] & (reduced < least)
            least[better], before[better] = reduced[better], column
            following = int(np.where(done[:n], np.inf, least).argmin())
            step = least[following]
            of_row[row_of[done]] += step
            of_column[done] -= step
            least[~done[:n]] -= step
            column = following
        while column != n:
            row_of[column] = row_of[before[column]]
            column = int(before[column])
    columns = np.empty(n, dtype=np.int64)
    columns[row_of[:n]] = np.arange(n)
    return columns


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class Sinkhorn:
    """Transport with entropic regularization (Sinkhorn's iteration on logarithms), whose plans are soft.

    It ends once no column's mass is off by more than `tolerance` of what it should be, or after `iterations`; the mass
    of a row is exact. A plan does not depend on the other problems that are solved with it.
    """

    # strength of the regularization, in units of the cost: near 0 plans are those of Assignment
    regularization: Annotated[float, In(1e-4, 100)] = 0.05
    # most iterations
    iterations: Annotated[int, In(1, 1_000_000)] = 1000
    # relative error of a column's mass at which it ends
    tolerance: Annotated[float, In(1e-12, 1)] = 1e-5

    def plans(self, costs: Sequence[Costs]) -> list[Costs]:
        made: list[Costs] = list(costs)
        for shape in dict.fromkeys(cost.shape for cost in costs):  # problems of one shape together
            chosen = [i for i, cost in enumerate(costs) if cost.shape == shape]
            for i, plan in zip(chosen, self._together(np.stack([costs[i] for i in chosen])), strict=True):
                made[i] = plan
        return made

    def _together(self, costs: Float[np.ndarray, "B n m"]) -> Float[np.ndarray, "B n m"]:
        logits = torch.from_numpy(costs).double() / -self.regularization
        n, m = logits.shape[1:]
        plans, open_, rows = torch.empty_like(logits), torch.arange(len(logits)), logits.new_zeros(len(logits), n, 1)
        for turn in range(self.iterations):
            columns = -(logits + rows).logsumexp(1, keepdim=True) - np.log(m)
            rows = -(logits + columns).logsumexp(2, keepdim=True) - np.log(n)
            if turn % _CHECKED and turn < self.iterations - 1:
                continue
            found = (logits + rows + columns).exp()
            plans[open_] = found
            going = (found.sum(1) * m - 1).abs().amax(-1) > self.tolerance
            open_, logits, rows = open_[going], logits[going], rows[going]
            if not len(open_):
                break
        return plans.numpy()


def distance(plan: Costs, cost: Costs) -> float:
    """Transport distance: the cost of a plan, without what a solver added to it."""
    return float((plan * cost).sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """Soft labels of the tokens `start`, `start + 1`, ... of a text: `probs[i, j]` is that of the id `ids[j]`."""

    start: int
    ids: Ids
    probs: Float[np.ndarray, "n m"]


def labels(start: int, plan: Costs, ids: Ids, least: float = 0.0) -> Labels:
    """Soft labels of a window that begins at `start`: `n * plan`, and rows that have mass divided by it.

    Of a row, what is below `least` is left out and the rest renormalized.
    """
    mass = plan.sum(-1, keepdims=True)
    probs = plan / np.where(mass > 0, mass, 1.0)
    probs = np.where(probs >= np.minimum(least, probs.max(-1, keepdims=True)), probs, 0.0)
    kept = probs.sum(-1, keepdims=True)
    return Labels(start=start, ids=ids, probs=probs / np.where(kept > 0, kept, 1.0))


def averaged(tokens: int, found: Sequence[Labels]) -> TargetScores:
    """Targets of a text of `tokens` tokens: at each, the mean of all labels that it has."""
    place = [np.repeat(np.arange(len(one.probs)) + one.start, len(one.ids)) for one in found]
    ids = [np.tile(one.ids, len(one.probs)) for one in found]
    probs = np.concatenate([np.zeros(0), *(one.probs.ravel() for one in found)])
    where = np.stack([np.concatenate([np.zeros(0, np.int64), *x]) for x in (place, ids)], axis=1)[probs > 0]
    pairs, index = np.unique(where, axis=0, return_inverse=True)
    mass = np.bincount(index.ravel(), weights=probs[probs > 0], minlength=len(pairs))
    counts = np.zeros(tokens)
    for one in found:
        counts[one.start : one.start + len(one.probs)] += one.probs.any(-1)
    sizes = np.bincount(pairs[:, 0], minlength=tokens)
    column = np.arange(len(pairs)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    shape = (tokens, max(int(sizes.max(initial=0)), 1))
    target_ids, target_probs = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.float32)
    target_ids[pairs[:, 0], column] = pairs[:, 1]
    target_probs[pairs[:, 0], column] = mass / counts[pairs[:, 0]]
    return TargetScores(target_ids=target_ids, target_probs=target_probs, targets=counts.astype(np.float32))
