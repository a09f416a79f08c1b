"""Checks of a method's update on a learner of four numbers, whose loss is a parabola."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from opd.certify.awaited import awaited
from opd.certify.certificate import Finding, Row, Skipped, at_least
from opd.certify.checks.invariances import uneven_step
from opd.certify.checks.purity import content_of
from opd.certify.engines import RequestLog, engines
from opd.certify.fitting import other_settings
from opd.certify.gradients import SAME, Case
from opd.certify.worlds import World
from opd.loss.packing import pack
from opd.ports import Context, Layout
from opd.types import StepReport
from opd.updates.extrapolated import ExtrapolatedStep, Origin
from opd.updates.optimizer import OptimizerStep
from opd.updates.slow_weights import SlowWeights

STEPPED = "an update takes one step on the whole batch"
KEPT = "an update keeps nothing between steps"
WEIGHTS = "an update ends with the weights that it is defined to"
DOWNHILL = "updates bring the loss down"
LITTLE = 1e-4  # of what as many plain steps bring: slow weights may be as slow as they like
NAMES = ("layers.0.self_attn.q_proj.weight", "layers.0.mlp.up_proj.weight", "layers.0.norm.weight", "embed.weight")
GOAL, CURVATURE, RATE = np.array([1.0, -2.0, 0.5, 3.0]), np.array([1.0, 0.3, 0.6, 0.1]), 0.03
UPDATES = 33  # steps 1, 2, 4, 8, 16 and 32 among them
LATER = (50, 99, 999, 99_999)  # in a longer run
_LAYOUT = Layout(ranks=2, tokens_per_microbatch=64)
Weights = Float[np.ndarray, " P"]
Known = OptimizerStep | ExtrapolatedStep | SlowWeights


class _EveryMetric(Mapping[str, float]):
    """Metrics of which each has the same value, under any name, and lists none."""

    def __init__(self, value: float) -> None:
        self._value = value

    def __getitem__(self, name: str) -> float:
        return self._value

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def loss_of(weights: Weights) -> float:
    """Loss of a learner's weights."""
    return float((CURVATURE * (weights - GOAL) ** 2).sum()) / 2


def stepped(weights: Weights) -> Weights:
    """Weights after a step of gradient descent."""
    return weights - RATE * CURVATURE * (weights - GOAL)


class _NoVerbError(AttributeError):
    """A verb of a learner that this one does not have."""


@dataclass(slots=True, kw_only=True)
class _Learner:
    """Learner of few numbers with the verbs that an update may use; it notes the batches that it steps on."""

    weights: Weights = field(default_factory=lambda: np.zeros(len(NAMES)))
    snapshots: dict[str, Weights] = field(default_factory=dict)
    batches: list[Any] = field(default_factory=list)
    layout: Layout = _LAYOUT

    def __getattr__(self, name: str) -> Any:
        raise _NoVerbError(f"the update asks the learner for `{name}`, which the one of the certificate does not have")

    async def step(self, batches: Any, objective: Any) -> StepReport:
        self.batches.append((batches, objective))
        self.weights = stepped(self.weights)
        return StepReport(loss=0.0, grad_norm=0.0, lr=RATE, tokens=1, trained_tokens=1, metrics={})

    async def evaluate(self, batches: Any, objective: Any) -> Mapping[str, float]:
        return _EveryMetric(loss_of(self.weights))

    async def snapshot(self, name: str, *, optimizer: bool = False, keep_older: bool = False) -> None:
        if not (keep_older and name in self.snapshots):
            self.snapshots[name] = self.weights.copy()

    async def restore(self, name: str) -> None:
        self.weights = self.snapshots[name].copy()

    async def extrapolate(self, name: str, factor: float, *, only: str = "") -> None:
        moved = np.array([bool(re.search(only, parameter)) for parameter in NAMES])
        self.weights = self.weights + moved * factor * (self.weights - self.snapshots[name])


def check_updates(case: Case) -> Iterator[Finding]:
    """An update steps once on what it is given, is a function of step and learner, and ends where it should."""
    try:
        yield from list(_findings(case))
    except _NoVerbError as error:
        yield from (Skipped(name=name, why=str(error)) for name in (STEPPED, DOWNHILL, KEPT, WEIGHTS))


def _findings(case: Case) -> Iterator[Finding]:
    update, batches, objective = case.method.update, _batches(case), object()
    learner, content = _Learner(), content_of(batches)
    path = _path(update, learner, case.world, batches, objective)
    for step in LATER:
        _path(update, learner, case.world, batches, objective, start=step, stop=step + 1)
    wrong = abs(len(learner.batches) - UPDATES - len(LATER)) + (content_of(batches) != content)
    wrong += sum(got is not batches or loss is not objective for got, loss in learner.batches)
    yield Row(name=STEPPED, measured=float(wrong), tolerance=0.0)
    yield at_least(DOWNHILL, _progress(path[-1]), LITTLE)
    half = _Learner()
    first = _path(update, half, case.world, batches, objective, stop=3)
    resumed = _Learner(weights=half.weights.copy(), snapshots={k: v.copy() for k, v in half.snapshots.items()})
    rest = _path(update, resumed, case.world, batches, objective, start=3)
    yield Row(name=KEPT, measured=float(np.abs(np.stack([*first, *rest]) - np.stack(path)).max()), tolerance=0.0)
    if not isinstance(update, Known):
        yield Skipped(name=WEIGHTS, why="no definition is known for this update; the other rows hold without one")
        return
    off = [_off(one, case.world) for one in (update, *other_settings(update))]
    yield Row(name=WEIGHTS, measured=max(off), tolerance=SAME)


def _batches(case: Case) -> list[list[Any]]:
    """Micro-batches of two ranks, several each, which an update must leave as they are."""
    enumeration, weights = uneven_step(case)
    longest = max(len(s.trajectory.prompt.student_ids) + len(s.trajectory) for s in enumeration.scored)
    layout = Layout(ranks=2, tokens_per_microbatch=3 * longest)
    return pack(enumeration.scored, weights, layout, case.method.normalizer)


def _progress(end: Weights) -> float:
    """Fall of the loss, over that which as many plain steps bring."""
    start = plain = np.zeros(len(NAMES))
    for _ in range(UPDATES):
        plain = stepped(plain)
    return (loss_of(start) - loss_of(end)) / (loss_of(start) - loss_of(plain))


def _path(
    update: Any, learner: _Learner, world: World, batches: Any, objective: Any, *, start: int = 0, stop: int = UPDATES
) -> list[Weights]:
    """Weights after every step."""
    made: list[Weights] = []

    async def run() -> None:
        context = Context.of(engines(world, RequestLog()), step=0, steps=10**6, seed=0)
        for step in range(start, stop):
            await update(learner, batches, objective, context.at(step))
            made.append(learner.weights.copy())

    awaited(run())
    return made


def _off(update: Known, world: World) -> float:
    path = _path(update, _Learner(), world, [[object()]], object())
    return float(np.abs(np.stack(path) - np.stack(_defined(update))).max())


def _defined(update: Known) -> Sequence[Weights]:
    """Weights after every step by definition: the farthest candidate up to the first that is not better."""
    now, origin, made = np.zeros(len(NAMES)), np.zeros(len(NAMES)), []
    for number in range(1, UPDATES + 1):
        now = stepped(now)
        if isinstance(update, ExtrapolatedStep) and update.trials and number & (number - 1) == 0:
            now, before = _searched(update, now, origin), now
            origin = now if update.origin is Origin.ACCEPTED else before
        if isinstance(update, SlowWeights) and number % update.period == 0:
            now = origin = origin + update.fraction * (now - origin)
        made.append(now)
    return made


def _searched(update: ExtrapolatedStep, here: Weights, origin: Weights) -> Weights:
    moved = np.array([bool(re.search(update.parameters, name)) for name in NAMES])
    best = here
    for k in range(1, update.trials + 1):
        candidate = here + moved * update.stride * k * (here - origin)
        better = loss_of(candidate) < loss_of(best)
        if not (better or (update.accept_equal and loss_of(candidate) == loss_of(best))):
            break
        best = candidate
    return best
