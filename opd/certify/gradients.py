"""The gradient that a method trains with in a world, and the gradient of what it promises there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.certify.credit import at_places
from opd.certify.models import TinyModel
from opd.certify.states import Enumerated, read
from opd.certify.worlds import World
from opd.loss.chunked import StudentLogits, flat_loss
from opd.loss.chunked import read as read_teacher
from opd.loss.metrics import diagnosed
from opd.loss.packing import Normalizer, TokenMean, pack
from opd.method.method import Method, weigh
from opd.method.promises import Promise
from opd.ports import Layout
from opd.types import Batch, Scored, TokenLoss

EXACT = 1e-6  # behavior log-probabilities and weights travel in float32
SAME = 1e-9  # two sums of the same float64 numbers
NOTICED = 1e-3  # what a defect must change to be seen
ALL = 2**30
ONE = Layout(ranks=1, tokens_per_microbatch=ALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A method in a world, and everything it reads there."""

    method: Method
    seen: Enumerated

    @property
    def world(self) -> World:
        return self.seen.world

    def weights(self) -> list[Float[np.ndarray, " _T"]]:
        """Every token that could be written, by its chance times the weight that the method gives it."""
        own = [
            w[p]
            for w, p in zip(
                weigh(self.method.weights, self.seen.scored, self.seen.context), self.seen.place, strict=True
            )
        ]
        return self.seen.weights(self.seen.chances * np.asarray(own))

    def training(self, objective: Any = None) -> Float[Tensor, " D"]:
        """The expected training gradient."""
        chosen = enumerable(objective or self.method.objective)
        return gradient(self.seen, self.weights(), chosen, self.method.normalizer)

    def exact(
        self, promise: Promise | None = None, teachers: Mapping[str, TinyModel] | None = None
    ) -> Float[Tensor, " D"]:
        """The gradient of the promise over the same states in float64, weighted and divided as training does."""
        weights, world = self.weights(), self.world.to(torch.float64)
        student = _leaf(world.student)
        readers = teachers or world.teachers
        states = self.seen.states(student, readers, at_places(self.seen, readers))
        counted = np.asarray([w[p] for w, p in zip(weights, self.seen.place, strict=True)])
        counted = torch.from_numpy(counted.reshape(-1, world.vocabulary).sum(-1))
        value = ((promise or self.method.objective.promise)(states) * counted).sum() / self.method.normalizer(weights)
        return _flat(torch.autograd.grad(value, (student.embedding, student.head), allow_unused=True), student)


def case(method: Method, world: World) -> Case:
    """`method` at work in `world`."""
    return Case(method=method, seen=read(method.rollout, method.scorer, world))


def _leaf(model: TinyModel) -> TinyModel:
    return replace(model, embedding=model.embedding.clone().requires_grad_(), head=model.head.clone().requires_grad_())


def _flat(gradients: tuple[Tensor | None, ...], model: TinyModel) -> Tensor:
    both = zip(gradients, (model.embedding, model.head), strict=True)
    return torch.cat([(torch.zeros_like(m) if g is None else g).flatten() for g, m in both]).double()


def gradient(
    seen: Enumerated,
    weights: list[np.ndarray],
    objective: Any,
    normalizer: Normalizer,
    *,
    layout: Layout = ONE,
    chunk: int = ALL,
    order: np.ndarray | None = None,
) -> Float[Tensor, " D"]:
    """The gradient that a learner would step along, through the real packing and the real loss."""
    order = np.arange(len(weights)) if order is None else order
    scored: list[Scored[Any]] = [seen.scored[i] for i in order]
    return descent(pack(scored, [weights[i] for i in order], layout, normalizer), objective, seen.world, chunk)


def descent(
    packed: Sequence[Sequence[Batch[Any]]], objective: Any, world: World, chunk: int = ALL
) -> Float[Tensor, " D"]:
    """The gradient of micro-batches `[rank][i]`, through the real loss."""
    student = _leaf(world.student)
    total = torch.zeros((), dtype=torch.float64)
    for batches in packed:
        for batch in batches:
            here = batch.to("cpu", lambda rows: rows)
            hidden = student.hidden(here.input_ids, here.position_ids)[here.predict_at]
            evaluate = _evaluation(objective, here, world)
            loss, _ = flat_loss(hidden, student.head, here.weights, lambda *_, e=evaluate: e, chunk=chunk, overlap_k=0)
            total = total + loss / batch.denominator
    return _flat(torch.autograd.grad(total, (student.embedding, student.head)), student)


def _evaluation(objective: Any, here: Batch[Any], world: World) -> Callable[[StudentLogits, int, int], TokenLoss]:
    def evaluate(student: StudentLogits, start: int, stop: int) -> TokenLoss:
        return objective(student, read_teacher(here.rows(start, stop), world.heads()))

    return evaluate


def every_token(seen: Enumerated) -> Batch[Any]:
    """One batch with every token that could be written, each with weight 1, as a learner has it."""
    ((batch,),) = pack(seen.scored, seen.weights((seen.chances > 0).astype(np.float64)), ONE, TokenMean())
    here = batch.to("cpu", lambda rows: rows)
    return read_teacher(here.rows(0, len(here)), seen.world.heads())


def logits(seen: Enumerated, batch: Batch[Any]) -> Float[Tensor, "L V"]:
    """Those of the current student at the trained tokens of a batch; no gradient."""
    student = seen.world.student
    return student.logits(student.hidden(batch.input_ids, batch.position_ids)[batch.predict_at])


def slopes(objective: Any, at: Float[Tensor, "L V"], batch: Batch[Any], *, overlap_k: int = 0) -> Float[Tensor, "L V"]:
    """The gradient of every token's loss with respect to its own logits `at`."""
    leaf = at.detach().clone().requires_grad_()
    # As a learner evaluates it, diagnostics included.
    loss = diagnosed(objective, StudentLogits(logits=leaf, overlap_k=overlap_k), batch).loss
    return torch.autograd.grad(loss.sum(), leaf)[0]


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference relative to the largest number, or to a thousandth where both are smaller."""
    scale = max(float(a.abs().max()), float(b.abs().max()), 1e-3)
    return float((a - b).abs().max()) / scale


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


def draws(objective: Any) -> bool:
    """Whether an objective draws tokens itself."""
    return hasattr(objective, "given") and hasattr(objective, "draw")


def enumerable(objective: Any) -> Any:
    """The objective without noise of its own."""
    return _EveryDraw(of=objective) if draws(objective) else objective
