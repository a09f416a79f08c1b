"""The central loop: prompts -> rollout -> scorer -> weights -> objective -> update, one step after another."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from jaxtyping import Float

from opd.ledger import Ledger
from opd.method import Method, weigh
from opd.packing import pack
from opd.ports import Engines, Learner, Observer, PromptSource, PublishReport, Sources
from opd.spans import Role, Span
from opd.types import Prompt, Scored, StepReport

_EMPTY_STEPS = 3  # so many in a row with nothing to train are no accident of a filter


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Collected:
    scored: list[Scored[Any]]
    spans: list[Span]
    rollout_s: float
    score_s: float


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
    max_staleness: int = 0,
    ledger: Ledger | None = None,
) -> Ledger:
    """Train from step `start` (0 = new) to `steps`; returns the account of all trajectories.

    Collecting may run ahead of training by `max_staleness` steps; 0 is strictly on-policy. A slot is freed only
    when the new weights are live, so no rollout starts staler than allowed. A step without a token to train is
    skipped, several in a row are an error. A failure anywhere stops everything. `ledger` is the account to go on with.
    """
    now = asyncio.get_running_loop().time  # a simulation brings its own
    slots, ledger, empty = asyncio.Semaphore(1 + max_staleness), ledger or Ledger(), 0
    ready: asyncio.Queue[asyncio.Task[_Collected]] = asyncio.Queue()

    async with asyncio.TaskGroup() as tasks:

        async def collect() -> None:
            for step in range(start, steps):
                await slots.acquire()
                asked = prompts(step, sources)
                ready.put_nowait(tasks.create_task(_rollout_and_score(step + 1, method, asked, engines, ledger)))

        # The engines repeat the learner's weights before the first token is written, not only after the first update.
        await learner.publish(engines.student, start)
        tasks.create_task(collect())
        for step in range(start, steps):
            began = now()
            collected = await (await ready.get())  # admitted by ordinal, not by who finished first
            waited = now()
            weights = weigh(method.weights, collected.scored)  # 0 = not trained
            empty = 0 if any(w.any() for w in weights) else empty + 1
            if 0 < empty < _EMPTY_STEPS:  # a filter took everything: the student stays as it is
                report = StepReport(loss=0.0, grad_norm=0.0, lr=0.0, tokens=0, trained_tokens=0, metrics={})
            else:
                batches = pack(collected.scored, weights, learner.layout, method.normalizer)
                report = await method.update(learner, batches, method.objective)
            updated = now()
            published = await learner.publish(engines.student, step + 1)  # new weights are live ...
            ended = now()
            _account(ledger, weights)
            record = StepRecord(
                step=step + 1,
                scored=collected.scored,
                weights=weights,
                report=report,
                published=published,
                ledger=ledger.summary(),
                seconds=_seconds(collected, began, waited, updated, ended),
                spans=[
                    *collected.spans,
                    Span(role=Role.LEARNER, step=step + 1, start=waited, end=updated),
                    Span(role=Role.PUBLISH, step=step + 1, start=updated, end=ended),
                ],
            )
            for observer in observers:  # an evaluation must not share engines, or its bill, with training
                await observer(record)
            slots.release()  # ... before the next rollout may start
    return ledger


def _seconds(collected: _Collected, began: float, waited: float, updated: float, ended: float) -> dict[str, float]:
    """See `StepRecord.seconds`."""
    return {
        "rollout": collected.rollout_s,
        "score": collected.score_s,
        "wait": waited - began,
        "train": updated - waited,
        "publish": ended - updated,
        "step": ended - began,
    }


async def _rollout_and_score(
    step: int, method: Method, asked: Sequence[Prompt], engines: Engines, ledger: Ledger
) -> _Collected:
    """Every group is rolled out, then scored at once, in a task of its own."""
    now = asyncio.get_running_loop().time
    began = now()
    spans: list[Span] = []
    ledger.issued += len(asked)

    async def one(group: list[Prompt]) -> list[Scored[Any]]:
        trajectories = await method.rollout(group, engines)
        ledger.generated += len(trajectories)
        written = now()
        scores = await method.scorer(trajectories, engines)
        ledger.scored += len(trajectories)
        spans.append(Span(role=Role.ROLLOUT, step=step, start=began, end=written))
        spans.append(Span(role=Role.TEACHER, step=step, start=written, end=now()))
        return [Scored(trajectory=t, scores=s) for t, s in zip(trajectories, scores, strict=True)]

    groups = [list(group) for _, group in groupby(asked, key=lambda prompt: prompt.id)]
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(one(group)) for group in groups]
    scored = [item for task in running for item in task.result()]
    written = max((span.end for span in spans if span.role is Role.ROLLOUT), default=began)
    return _Collected(scored=scored, spans=spans, rollout_s=written - began, score_s=now() - written)


def _account(ledger: Ledger, weights: Sequence[Float[np.ndarray, " _T"]]) -> None:
    trained = sum(bool(w.any()) for w in weights)
    ledger.trained += trained
    if trained < len(weights):
        ledger.dropped["weight 0"] += len(weights) - trained
