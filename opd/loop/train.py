"""The central loop: prompts -> rollout -> scorer -> weights -> objective -> update, one step after another."""

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from opd.loop.ledger import Ledger, State
from opd.loop.rollout_buffer import BufferedStep, RolloutBuffer, names_of, rejected
from opd.loop.staleness import StalenessSchedule
from opd.loss.packing import pack
from opd.method.method import Method, weigh
from opd.observability.spans import Span, Stage
from opd.ports import Engines, Learner, Observer, PromptSource, PublishReport, Sources
from opd.types import Scored, StepReport

_EMPTY_STEPS = 3  # so many in a row with nothing to train are no accident of a filter
_ON_POLICY = StalenessSchedule()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """Everything about a finished step; `step` counts from 1 and equals the published version.

    `seconds` has `rollout` (first request to last completion), `score` (what scoring took beyond that),
    `wait` (learner idle), `train` (with packing), `publish` and `step` (all of it). `spans` says who worked for this
    step when: one span of rollout and teacher per group, one of learner and publish. `live` is False where the run
    breaks off: the student has learned this step, but its weights reached no engine, and none should be asked now.
    """

    step: int
    scored: Sequence[Scored[Any]]
    weights: Sequence[Float[np.ndarray, " _T"]]
    report: StepReport
    published: PublishReport
    ledger: Mapping[str, int]
    seconds: Mapping[str, float]
    spans: Sequence[Span] = ()
    live: bool = True


async def train(
    method: Method,
    prompts: PromptSource,
    sources: Sources,
    engines: Engines,
    learner: Learner,
    observers: Sequence[Observer],
    *,
    start: int,
    steps: int,
    pipeline: StalenessSchedule = _ON_POLICY,
    ledger: Ledger | None = None,
) -> Ledger:
    """Train from step `start` (0 = new) to `steps`; returns the account of all trajectories.

    `pipeline` says how far collecting may run ahead of training; the default is strictly on-policy. `ledger` is that of
    the run that is gone on with. A step without a token to train is skipped, several in a row are an error. A failure
    anywhere stops everything, but no update in the middle: observers hear of every step that the student has learned.
    """
    now = asyncio.get_running_loop().time  # a simulation brings its own
    ledger, empty = ledger or Ledger(), 0
    ledger.begin(start)
    collector = RolloutBuffer(method, prompts, sources, engines, ledger, pipeline, start, steps)
    # The engines repeat the learner's weights before the first token is written, not only after the first update.
    published = await learner.publish(engines.student, start)
    digests = {published.version: published.digest}

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(collector.run())
        for step in range(start, steps):
            began = now()
            collected = await collector.take(step)
            await _lease(collector, collected, pipeline, digests, ledger)
            waited = now()
            weights = weigh(method.weights, collected.scored)  # 0 = not trained
            empty = 0 if any(w.any() for w in weights) else empty + 1
            update = asyncio.ensure_future(_update(method, learner, collected.scored, weights, empty, step + 1))
            taken = _LearnedStep(step=step, collected=collected, weights=weights, began=began, waited=waited)
            try:
                live = await _go_live(update, collector, learner, engines, step + 1)
            except BaseException:
                # Whatever has failed meanwhile: a step that the student has learned is accounted for and told of.
                await _tell(observers, ledger, taken, await update, _Publication.nowhere(step + 1))
                raise
            digests[live.published.version] = live.published.digest
            await _tell(observers, ledger, taken, await update, live)  # the update has long ended
            await collector.advance(step + 1, collected)
    return ledger


@dataclass(frozen=True, slots=True, kw_only=True)
class _LearnedStep:
    """A step that is handed to the learner; times are of the loop's clock."""

    step: int
    collected: BufferedStep
    weights: Sequence[Float[np.ndarray, " _T"]]
    began: float
    waited: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Publication:
    """When a step's update, the text before it and its publication had ended; did its weights reach the engines?"""

    published: PublishReport
    updated: float
    drained: float
    ended: float
    reached: bool = True

    @classmethod
    def nowhere(cls, version: int) -> "_Publication":
        """They are in no engine."""
        now = asyncio.get_running_loop().time()
        report = PublishReport(version=version, gap=math.nan, nbytes=0)
        return cls(published=report, updated=now, drained=now, ended=now, reached=False)


async def _go_live(
    update: "asyncio.Future[StepReport]", collector: RolloutBuffer, learner: Learner, engines: Engines, version: int
) -> _Publication:
    now = asyncio.get_running_loop().time
    await asyncio.shield(update)
    updated = now()
    await collector.drained(version)
    drained = now()
    published = await learner.publish(engines.student, version)
    return _Publication(published=published, updated=updated, drained=drained, ended=now())


async def _tell(
    observers: Sequence[Observer], ledger: Ledger, taken: _LearnedStep, report: StepReport, live: _Publication
) -> None:
    """Account for a step, and tell everybody of it."""
    _account(ledger, taken.step, taken.collected.scored, taken.weights)
    record = StepRecord(
        step=taken.step + 1,
        scored=taken.collected.scored,
        weights=taken.weights,
        report=report,
        published=live.published,
        ledger=ledger.summary(),
        seconds=_seconds(taken, live),
        spans=_spans(taken, live),
        live=live.reached,
    )
    for observer in observers:  # an evaluation must not share engines, or its bill, with training
        await observer(record)


def _seconds(taken: _LearnedStep, live: _Publication) -> dict[str, float]:
    """See `StepRecord.seconds`."""
    collected = taken.collected
    return {
        "rollout": collected.written - collected.began,
        "score": max(collected.read - collected.written, 0.0),
        "wait": taken.waited - taken.began + live.drained - live.updated,
        "train": live.updated - taken.waited,
        "publish": live.ended - live.drained,
        "step": live.ended - taken.began,
    }


def _spans(taken: _LearnedStep, live: _Publication) -> list[Span]:
    """See `StepRecord.spans`."""
    step = taken.step + 1
    return [
        *taken.collected.spans,
        Span(role=Stage.LEARNER, step=step, start=taken.waited, end=live.updated),
        Span(role=Stage.PUBLISH, step=step, start=live.drained, end=live.ended),
    ]


async def _lease(
    collector: RolloutBuffer,
    collected: BufferedStep,
    pipeline: StalenessSchedule,
    digests: Mapping[int, str],
    ledger: Ledger,
) -> None:
    """Hand a step to the learner: text that is too old, or of weights nobody published, is written again, once.

    With the pipeline's own schedule there is none; it takes an engine that missed an update. What comes back like that
    a second time is dropped.
    """
    reasons = rejected(collected, pipeline, digests)
    which = [i for i, g in enumerate(collected.groups) if any(n in reasons for n in names_of(collected.step, g))]
    for i in which:
        names = names_of(collected.step, collected.groups[i])
        ledger.requeue(names, next(reasons[name] for name in names if name in reasons))
    if which:
        await collector.again(collected, which)
        reasons = rejected(collected, pipeline, digests)
        for name, reason in reasons.items():
            ledger.move([name], State.DROPPED, reason)
        collected.groups = [
            [item for name, item in zip(names_of(collected.step, group), group, strict=True) if name not in reasons]
            for group in collected.groups
        ]
    ledger.move(names_of(collected.step, collected.scored), State.LEASED)


async def _update(
    method: Method,
    learner: Learner,
    scored: Sequence[Scored[Any]],
    weights: Sequence[Float[np.ndarray, " _T"]],
    empty: int,
    step: int,
) -> StepReport:
    if 0 < empty < _EMPTY_STEPS:  # a filter took everything: the student stays as it is
        return StepReport(loss=0.0, grad_norm=0.0, lr=0.0, tokens=0, trained_tokens=0, metrics={})
    batches = pack(scored, weights, learner.layout, method.normalizer, turn=f" at step {step}")
    return await method.update(learner, batches, method.objective)


def _account(
    ledger: Ledger, step: int, scored: Sequence[Scored[Any]], weights: Sequence[Float[np.ndarray, " _T"]]
) -> None:
    names = names_of(step, scored)
    has_weight = [np.count_nonzero(w) > 0 for w in weights]
    ledger.move([name for name, has in zip(names, has_weight, strict=True) if has], State.TRAINED)
    ledger.move([name for name, has in zip(names, has_weight, strict=True) if not has], State.DROPPED, "weight 0")
    ledger.check()
