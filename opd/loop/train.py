"""The training loop: collect, score, read, weigh, pack, learn, publish, one step after another."""

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from opd.loop.counted_learner import ReadTokens
from opd.loop.ledger import Ledger, State
from opd.loop.rollout_buffer import BufferedStep, RolloutBuffer, names_of
from opd.loop.staleness import StalenessSchedule
from opd.loop.step_clock import StepClock
from opd.loss.packing import WeighedTerm
from opd.method.method import Method, packed, weighed
from opd.method.readings import read_step
from opd.method.terms import MAIN
from opd.observability.spans import Span
from opd.ports import Context, Engines, Learner, Observer, PromptSource, PublishReport, Sources
from opd.types import Scored, StepReport

TokenWeights = Sequence[Float[np.ndarray, " _T"]]

_EMPTY_STEPS = 3  # so many in a row without a trainable token are no accident of a filter
_ON_POLICY = StalenessSchedule()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """Record of a finished step, for observers; `step` counts from 1 and equals the published version.

    `seconds` has `rollout` (first request to last completion), `score` (what scoring took beyond that),
    `wait` (learner idle), `train` (with the reading pass and packing), `publish` and `step` (all of it). `spans` has
    one span of rollout and one of teacher per group, one of learner and one of publishing. `live` is False where the
    run breaks off: the student was updated by this step, but its weights reached no engine, and no engine should be
    called now.
    `weights` are those of the method's own term, or of several terms the largest, per token. `read_tokens` went through
    the student without a gradient: where a token weight declares readings (`opd.method.readings`), or an update probes.
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
    read_tokens: int = 0


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
    seed: int = 0,
    schedule: StalenessSchedule = _ON_POLICY,
    ledger: Ledger | None = None,
) -> Ledger:
    """Train from step `start` (0 = new) to `steps`; returns the ledger of all trajectories.

    `schedule` bounds how far rollouts may run ahead of training; the default is strictly on-policy. `ledger` is that of
    the run that is resumed. A step without a trainable token is skipped, several in a row are an error. A failure
    anywhere stops everything, but no update in the middle: observers get the record of every update that was made.
    """
    ledger = ledger or Ledger()
    ledger.begin(start)
    context = Context.of(engines, step=start, steps=steps, seed=seed)
    buffer = RolloutBuffer(method, prompts, sources, context, ledger, schedule)
    # The sentinel compares the engines with the learner before the first token is sampled, not only after an update.
    digests = _Digests.of(await learner.publish(engines.student, start))
    empty_steps = 0

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(buffer.run())
        for step in range(start, steps):
            clock = StepClock.begin()
            rollouts = await buffer.take(step, digests.by_version)
            clock.mark_rollouts()
            reads = ReadTokens(learner)
            read = await read_step(method, rollouts.scored, reads.as_learner)
            terms = weighed(method, rollouts.scored, context.at(step), read.by_term)
            weights = _largest(terms)  # 0 = not trained
            empty_steps = 0 if any(w.any() for w in weights) else empty_steps + 1
            update = asyncio.ensure_future(
                _update(method, reads.as_learner, rollouts.scored, terms, empty_steps, context.at(step))
            )
            done = _Trained(rollouts=rollouts, weights=weights, reads=reads, clock=clock)
            try:
                published = await _publish(update, buffer, learner, engines, step + 1, clock)
            except BaseException:
                # Whatever has failed meanwhile: an update that was made is accounted for, and observers get its record.
                await _record(observers, ledger, done, await update, _unpublished(step + 1), live=False)
                raise
            digests.add(published)
            await _record(observers, ledger, done, await update, published, live=True)  # the update has long ended
            await buffer.advance(step + 1, rollouts)
    return ledger


@dataclass(frozen=True, slots=True)
class _Digests:
    """Digests of the published versions of a run."""

    by_version: dict[int, str]

    @classmethod
    def of(cls, first: PublishReport) -> "_Digests":
        return cls({first.version: first.digest})

    def add(self, published: PublishReport) -> None:
        self.by_version[published.version] = published.digest


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trained:
    """Rollouts, weights and clock of a step that the learner has."""

    rollouts: BufferedStep
    weights: TokenWeights
    reads: ReadTokens
    clock: StepClock


def _largest(terms: Mapping[str, WeighedTerm]) -> TokenWeights:
    """Largest weight that any term gives, per token."""
    if len(terms) == 1:
        return terms[MAIN].weights
    return [np.max(each, axis=0) for each in zip(*(term.weights for term in terms.values()), strict=True)]


async def _update(
    method: Method,
    learner: Learner,
    scored: Sequence[Scored[Any]],
    terms: Mapping[str, WeighedTerm],
    empty: int,
    context: Context,
) -> StepReport:
    if 0 < empty < _EMPTY_STEPS:  # a filter removed everything: the student stays as it is
        return StepReport(loss=0.0, grad_norm=0.0, lr=0.0, tokens=0, trained_tokens=0, metrics={})
    batches = packed(method, scored, terms, learner.layout, turn=f" at step {context.step + 1}")
    return await method.update(learner, batches, method.loss_at(context), context)


async def _publish(
    update: "asyncio.Future[StepReport]",
    buffer: RolloutBuffer,
    learner: Learner,
    engines: Engines,
    version: int,
    clock: StepClock,
) -> PublishReport:
    """Publish after the update, and after completions of older weights where the schedule drains them."""
    await asyncio.shield(update)
    clock.mark_update()
    await buffer.drained(version)
    clock.mark_drained()
    published = await learner.publish(engines.student, version)
    clock.mark_end()
    return published


def _unpublished(version: int) -> PublishReport:
    """Report about weights that reached no engine."""
    return PublishReport(version=version, gap=math.nan, nbytes=0)


async def _record(
    observers: Sequence[Observer],
    ledger: Ledger,
    done: _Trained,
    report: StepReport,
    published: PublishReport,
    *,
    live: bool,
) -> None:
    """Settle a step in the ledger, and send its record to all observers."""
    rollouts = done.rollouts
    if not live:
        done.clock.mark_unpublished()
    _settle(ledger, rollouts.step, rollouts.scored, done.weights)
    record = StepRecord(
        step=rollouts.step + 1,
        scored=rollouts.scored,
        weights=done.weights,
        read_tokens=done.reads.read_tokens,
        report=report,
        published=published,
        ledger=ledger.summary(),
        seconds=done.clock.seconds(rollouts),
        spans=done.clock.spans(rollouts),
        live=live,
    )
    for observer in observers:  # in turn: an evaluation must not share engines, or its costs, with training
        await observer(record)


def _settle(
    ledger: Ledger, step: int, scored: Sequence[Scored[Any]], weights: Sequence[Float[np.ndarray, " _T"]]
) -> None:
    names = names_of(step, scored)
    has_weight = [np.count_nonzero(w) > 0 for w in weights]
    ledger.move([name for name, has in zip(names, has_weight, strict=True) if has], State.TRAINED)
    ledger.move([name for name, has in zip(names, has_weight, strict=True) if not has], State.DROPPED, "weight 0")
    ledger.check()
