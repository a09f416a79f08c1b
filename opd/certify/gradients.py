"""Expected training gradient of a method in a world, and the gradient of its promise there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.certify.credit import credit_at_positions
from opd.certify.enumeration import Enumeration, enumerated
from opd.certify.models import TinyModel
from opd.certify.targets import mean_targets
from opd.certify.worlds import World
from opd.loss.chunked import StudentLogits, flat_loss
from opd.loss.chunked import read as read_teacher
from opd.loss.metrics import diagnosed
from opd.loss.packing import Normalizer, TokenMean, pack
from opd.loss.readings import token_readings
from opd.method.method import Method, readings_of, weigh, with_readings
from opd.method.promises import Promise
from opd.method.readings import reading_pass
from opd.method.reward_promises import Nothing
from opd.method.schedules import with_values
from opd.method.terms import MAIN
from opd.ports import Layout
from opd.types import Batch, Scored, TokenLoss

EXACT = 1e-6  # behavior log-probabilities and weights travel in float32
SAME = 1e-9  # two sums of the same float64 numbers
NEARLY = 0.02  # of a gradient: a formula that is off by less is right, and its numbers are not
NOTICED = 1e-3  # what a defect must change to be seen
UNLIMITED = 2**30
ONE_RANK = Layout(ranks=1, tokens_per_microbatch=UNLIMITED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A method in a world, with the enumeration of its trajectories."""

    method: Method
    enumeration: Enumeration

    @property
    def world(self) -> World:
        return self.enumeration.world

    def weights(self) -> list[Float[np.ndarray, " _T"]]:
        """Weight of every token that could be sampled: its probability times the method's own token weight."""
        enumeration = self.enumeration
        # What selects by readings selects among the enumerated tokens: else it might leave out all of them.
        items = self.read(enumeration.alone()) if readings_of(*self.method.weights.values()) else enumeration.scored
        factors = weigh(self.method.weights, items, enumeration.context)
        own = [w[p] for w, p in zip(factors, enumeration.position, strict=True)]
        return enumeration.weights(enumeration.probabilities * np.asarray(own))

    def trains(self) -> bool:
        """Whether any token has a weight."""
        return any(weights.any() for weights in self.weights())

    def read(self, items: Sequence[Scored[Any]]) -> Sequence[Scored[Any]]:
        """Trajectories of the world with the readings that the method's token weights declare."""
        asked = reading_pass(self.method.one_term(MAIN), items, ONE_RANK)
        if asked is None:
            return items
        world = self.world

        def answer(batch: Batch[Any]) -> np.ndarray:
            here = batch.to("cpu", lambda rows: rows)
            hidden = world.student.hidden(here.input_ids, here.position_ids)[here.predict_at]
            return token_readings(
                hidden,
                world.student.head,
                lambda *rows: read_teacher(here.rows(*rows), world.heads()),
                asked.asked,
            ).numpy()

        found = asked.values([[answer(batch) for batch in rank] for rank in asked.batches])
        return with_readings(items, found.by_term[MAIN])

    def training(self, objective: Any = None) -> Float[Tensor, " D"]:
        """Expected training gradient."""
        chosen = enumerable(objective or self.method.objective)
        return gradient(self.enumeration, self.weights(), chosen, self.method.normalizer)

    def exact(
        self, promise: Promise | None = None, teachers: Mapping[str, TinyModel] | None = None
    ) -> Float[Tensor, " D"]:
        """Gradient of the promise over the same states in float64, weighted and divided as training does."""
        weights, world = self.weights(), self.world.to(torch.float64)
        student = _leaf(world.student)
        taught_by = teachers or world.teachers
        counted = np.asarray([w[p] for w, p in zip(weights, self.enumeration.position, strict=True)])
        states = self.enumeration.states(
            student,
            taught_by,
            credit_at_positions(self.enumeration, taught_by),
            mean_targets(self.enumeration, teachers or self.world.teachers, counted),
        )
        counted = torch.from_numpy(counted.reshape(-1, world.vocabulary).sum(-1))
        value = ((promise or self.method.objective.promise)(states) * counted).sum() / self.method.normalizer(weights)
        return _flat(torch.autograd.grad(value, (student.embedding, student.head), allow_unused=True), student)


def make_case(method: Method, world: World) -> Case:
    """Case of `method` in `world`: its own rollout and scorer are run, and its objective is that of the world's step.

    A rollout that leaves whole texts out is run with nothing left out (`everything`): what it drops decides which
    states count, and changes no gradient there.
    """
    rollout = getattr(method.rollout, "everything", method.rollout)
    enumeration = enumerated(rollout, method.scorer, world)
    there = replace(method, objective=with_values(method.objective, enumeration.context))
    return Case(method=there, enumeration=enumeration)


def _leaf(model: TinyModel) -> TinyModel:
    return replace(model, embedding=model.embedding.clone().requires_grad_(), head=model.head.clone().requires_grad_())


def _flat(gradients: tuple[Tensor | None, ...], model: TinyModel) -> Tensor:
    both = zip(gradients, (model.embedding, model.head), strict=True)
    return torch.cat([(torch.zeros_like(m) if g is None else g).flatten() for g, m in both]).double()


def gradient(
    enumeration: Enumeration,
    weights: list[np.ndarray],
    objective: Any,
    normalizer: Normalizer,
    *,
    layout: Layout = ONE_RANK,
    chunk: int = UNLIMITED,
    order: np.ndarray | None = None,
) -> Float[Tensor, " D"]:
    """Gradient that a learner would compute, through the real packing and the real loss."""
    order = np.arange(len(weights)) if order is None else order
    scored: list[Scored[Any]] = [enumeration.scored[i] for i in order]
    return microbatch_gradient(
        pack(scored, [weights[i] for i in order], layout, normalizer), objective, enumeration.world, chunk
    )


def microbatch_gradient(
    packed: Sequence[Sequence[Batch[Any]]], objective: Any, world: World, chunk: int = UNLIMITED
) -> Float[Tensor, " D"]:
    """Gradient of micro-batches `[rank][i]`, through the real loss."""
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


def every_token(enumeration: Enumeration) -> Batch[Any]:
    """Batch of all tokens that could be sampled, each with weight 1, as a learner has it."""
    ((batch,),) = pack(
        enumeration.scored,
        enumeration.weights((enumeration.probabilities > 0).astype(np.float64)),
        ONE_RANK,
        TokenMean(),
    )
    here = batch.to("cpu", lambda rows: rows)
    return read_teacher(here.rows(0, len(here)), enumeration.world.heads())


def logits(enumeration: Enumeration, batch: Batch[Any]) -> Float[Tensor, "L V"]:
    """Logits of the current student at the trained tokens of a batch; no gradient."""
    student = enumeration.world.student
    return student.logits(student.hidden(batch.input_ids, batch.position_ids)[batch.predict_at])


def logit_gradients(
    objective: Any, at: Float[Tensor, "L V"], batch: Batch[Any], *, overlap_k: int | None = None
) -> Float[Tensor, "L V"]:
    """Gradient of every token's loss with respect to its own logits `at`; with `overlap_k` as a learner evaluates it,
    diagnostics included.
    """
    leaf = at.detach().clone().requires_grad_()
    student = StudentLogits(logits=leaf, overlap_k=overlap_k or 0)
    found = objective(student, batch) if overlap_k is None else diagnosed(objective, student, batch)
    return torch.autograd.grad(found.loss.sum(), leaf)[0]


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference over the largest magnitude, or over 1e-3 where both are smaller."""
    scale = max(float(a.abs().max()), float(b.abs().max()), 1e-3)
    return float((a - b).abs().max()) / scale


def promises_nothing(objective: Any) -> bool:
    """Whether an objective's expected gradient is declared to be 0 everywhere."""
    return isinstance(getattr(objective, "promise", None), Nothing)


def departure(case: Case) -> float:
    """Relative difference between the expected training gradient and that of the promise; NaN if nothing is trained.

    Two gradients of 0 have no size of their own: where nothing is promised, what did not cancel out is compared with
    the gradient of every other token alone, where nothing cancels.
    """
    if not case.trains():
        return float("nan")
    trained, exact = case.training(), case.exact()
    if not promises_nothing(case.method.objective):
        return relative_difference(trained, exact)
    kept = [w * (s.trajectory.token_ids % 2) for w, s in zip(case.weights(), case.enumeration.scored, strict=True)]
    size = gradient(case.enumeration, kept, enumerable(case.method.objective), case.method.normalizer).abs().max()
    return float(trained.abs().max() / size) if size > 0 else 1.0


def how_it_departs(case: Case) -> str:
    """Likeness of the expected training gradient to that of the promise, as words; "" if there is none."""
    if not case.trains() or promises_nothing(case.method.objective):
        return ""
    trained, exact = case.training(), case.exact()
    if not trained.any():
        return "it is 0: nothing in the loss is differentiated, or its parts cancel out"
    factor = float(trained @ exact / (exact @ exact).clamp(min=1e-300))
    off, rest = (float((trained - times * exact).norm() / exact.norm().clamp(min=1e-300)) for times in (1.0, factor))
    if off < NEARLY:
        return f"it is off by {off:.1g} of its size: rounding, a cast, a small number added, a clamp"
    if rest < NOTICED * abs(factor):
        why = "the base of a logarithm, a mean in place of a sum, something counted twice" if factor > 0 else "the sign"
        return f"it is {factor:.4g} times that of the promise: {why}"
    return ""


class Drawing(Protocol):
    """Objective that draws tokens itself, independently and from the current student, and averages over them."""

    samples: int

    def draw(self, student: StudentLogits, batch: Batch[Any]) -> Int[Tensor, "n m"]:
        """`samples` ids per state: a function of the row's content alone, wherever the row was packed."""
        ...

    def given(self, ids: Int[Tensor, "n m"], student: StudentLogits, batch: Batch[Any]) -> TokenLoss:
        """Loss if `ids` were drawn."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _EveryDraw:
    """Expectation of a drawing objective: all draws that it could make, weighted by their probability."""

    of: Drawing

    def __call__(self, student: StudentLogits, batch: Batch[Any]) -> TokenLoss:
        probabilities = student.logprobs.detach().exp()
        total = torch.zeros_like(probabilities[:, 0])
        for token in range(probabilities.shape[1]):
            ids = torch.full((len(total), self.of.samples), token)
            total = total + probabilities[:, token] * self.of.given(ids, student, batch).loss
        return TokenLoss(loss=total, metrics={})


def draws(objective: Any) -> bool:
    """Whether an objective draws tokens itself."""
    return hasattr(objective, "given") and hasattr(objective, "draw")


def enumerable(objective: Any) -> Any:
    """The objective without draws of its own: their expectation."""
    return _EveryDraw(of=objective) if draws(objective) else objective
