"""The central loop: prompts -> rollout -> scorer -> weights -> objective -> update, one step after another."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from opd.collecting import Collected, Collector, names_of, refused
from opd.ledger import Ledger, State
from opd.method import Method, weigh
from opd.packing import pack
from opd.pipeline import Pipeline
from opd.ports import Engines, Learner, Observer, PromptSource, PublishReport, Sources
from opd.spans import Role, Span
from opd.types import Scored, StepReport

_EMPTY_STEPS = 3  # so many in a row with nothing to train are no accident of a filter
_ON_POLICY = Pipeline()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """Everything about a finished step; `step` counts from 1 and equals the published version.

    `seconds` has `rollout` (first request to last completion), `score` (what scoring took beyond that),
    `wait` (learner idle), `train` (with packing), `publish` and `step` (all of it). `spans` says who worked for this
    step when: one span of rollout and teacher per group, one of learner and publish.
    """

    step: int
    scored: Sequence[Scored[Any]]
    weights: Sequence[Float[np.ndarray, " _T"]]
    report: StepReport
    published: PublishReport
    ledger: Mapping[str, int]
    seconds: Mapping[str, float]
    spans: Sequence[Span] = ()


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
    pipeline: Pipeline = _ON_POLICY,
    ledger: Ledger | None = None,
) -> Ledger:
    """Train from step `start` (0 = new) to `steps`; returns the account of all trajectories.

    `pipeline` says how far collecting may run ahead of training; the default is strictly on-policy. `ledger` is that of
    the run that is gone on with. A step without a token to train is skipped, several in a row are an error. A failure
    anywhere stops everything.
    """
    now = asyncio.get_running_loop().time  # a simulation brings its own
    ledger, empty = ledger or Ledger(), 0
    ledger.begin(start)
    collector = Collector(method, prompts, sources, engines, ledger, pipeline, start, steps)
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
            report = await _update(method, learner, collected.scored, weights, empty)
            updated = now()
            await collector.drained(step + 1)
            drained = now()
            published = await learner.publish(engines.student, step + 1)
            digests[published.version] = published.digest
            ended = now()
            _account(ledger, step, collected.scored, weights)
            record = StepRecord(
                step=step + 1,
                scored=collected.scored,
                weights=weights,
                report=report,
                published=published,
                ledger=ledger.summary(),
                seconds=_seconds(collected, began, waited, updated, drained, ended),
                spans=_spans(collected, waited, updated, drained, ended),
            )
            for observer in observers:  # an evaluation must not share engines, or its bill, with training
                await observer(record)
            await collector.advance(step + 1, collected)
    return ledger


def _seconds(
    collected: Collected, began: float, waited: float, updated: float, drained: float, ended: float
) -> dict[str, float]:
    """See `StepRecord.seconds`."""
    return {
        "rollout": collected.written - collected.began,
        "score": max(collected.read - collected.written, 0.0),
        "wait": waited - began + drained - updated,
        "train": updated - waited,
        "publish": ended - drained,
        "step": ended - began,
    }


def _spans(collected: Collected, waited: float, updated: float, drained: float, ended: float) -> list[Span]:
    """See `StepRecord.spans`."""
    step = collected.step + 1
    return [
        *collected.spans,
        Span(role=Role.LEARNER, step=step, start=waited, end=updated),
        Span(role=Role.PUBLISH, step=step, start=drained, end=ended),
    ]


async def _lease(
    collector: Collector, collected: Collected, pipeline: Pipeline, digests: Mapping[int, str], ledger: Ledger
) -> None:
    """Hand a step to the learner: text that is too old, or of weights nobody published, is written again, once.

    With the pipeline's own schedule there is none; it takes an engine that missed an update. What comes back like that
    a second time is dropped.
    """
    reasons = refused(collected, pipeline, digests)
    which = [i for i, g in enumerate(collected.groups) if any(n in reasons for n in names_of(collected.step, g))]
    for i in which:
        names = names_of(collected.step, collected.groups[i])
        ledger.requeue(names, next(reasons[name] for name in names if name in reasons))
    if which:
        await collector.again(collected, which)
        reasons = refused(collected, pipeline, digests)
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
) -> StepReport:
    if 0 < empty < _EMPTY_STEPS:  # a filter took everything: the student stays as it is
        return StepReport(loss=0.0, grad_norm=0.0, lr=0.0, tokens=0, trained_tokens=0, metrics={})
    return await method.update(learner, pack(scored, weights, learner.layout, method.normalizer), method.objective)


def _account(
    ledger: Ledger, step: int, scored: Sequence[Scored[Any]], weights: Sequence[Float[np.ndarray, " _T"]]
) -> None:
    names = names_of(step, scored)
    has_weight = [np.count_nonzero(w) > 0 for w in weights]
    ledger.move([name for name, has in zip(names, has_weight, strict=True) if has], State.TRAINED)
    ledger.move([name for name, has in zip(names, has_weight, strict=True) if not has], State.DROPPED, "weight 0")
    ledger.check()
