"""Rollout buffer: groups are generated and scored as far ahead of training as the staleness schedule allows."""

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from opd.errors import OpdError
from opd.loop.ledger import Entry, Ledger, State, entries_of
from opd.loop.staleness import StalenessSchedule
from opd.method.method import Method, scored
from opd.observability.spans import Span, Stage
from opd.ports import Context, PromptSource, Sources
from opd.types import Prompt, Scored, Trajectory, nbytes

Group = list[Scored[Any]]


@dataclass(slots=True)
class BufferedStep:
    """A step's groups in the order of its prompts, with the spans of engines that made them (`loop.time()` seconds)."""

    step: int
    began: float
    prompts: list[list[Prompt]]
    groups: list[Group] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    nbytes: int = 0

    @property
    def scored(self) -> Group:
        """All scored trajectories of the step."""
        return [item for group in self.groups for item in group]

    @property
    def generated_at(self) -> float:
        """Time of the last completion."""
        return self._last(Stage.ROLLOUT)

    @property
    def scored_at(self) -> float:
        """Time of the last scores."""
        return self._last(Stage.TEACHER)

    def _last(self, role: Stage) -> float:
        return max((span.end for span in self.spans if span.role is role), default=self.began)


class RolloutBuffer:
    """Producer of scored rollouts, step by step: `run` in a task, `take` what is ready, `advance` with new weights."""

    def __init__(
        self,
        method: Method,
        prompts: PromptSource,
        sources: Sources,
        context: Context,
        ledger: Ledger,
        schedule: StalenessSchedule,
    ) -> None:
        start, steps = context.step, context.steps
        self._method, self._prompts, self._sources, self._context = method, prompts, sources, context
        self._ledger, self._schedule, self._start, self._steps = ledger, schedule, start, steps
        self._live, self._swapping = start, False
        self._held = self._largest = self._in_flight = 0  # bytes ready, bytes of the largest step, steps not yet ready
        self._changed = asyncio.Condition()
        self._scoring = asyncio.Lock()
        self._generated: defaultdict[int, asyncio.Event] = defaultdict(asyncio.Event)
        self._ready: defaultdict[int, asyncio.Future[BufferedStep]] = defaultdict(
            asyncio.get_running_loop().create_future
        )

    async def run(self) -> None:
        """Generate and score all steps; a failure anywhere ends it."""
        async with asyncio.TaskGroup() as tasks:
            for step in range(self._start, self._steps):
                async with self._changed:
                    await self._changed.wait_for(lambda s=step: self._may_begin(s))
                tasks.create_task(self._collect(self._begin(step)))

    async def take(self, step: int, published: Mapping[int, str]) -> BufferedStep:
        """Rollouts of a step, generated, scored and admitted to training; steps are taken by number.

        Text that is too old, or of weights that were not `published` (digests by version), is generated again, once.
        With the schedule's own order there is none; it takes an engine that missed an update. What is rejected a second
        time is dropped.
        """
        rollouts = await self._ready[step]
        reasons = rejected(rollouts, self._schedule, published)
        which = [i for i, g in enumerate(rollouts.groups) if any(n in reasons for n in names_of(step, g))]
        for i in which:
            names = names_of(step, rollouts.groups[i])
            self._ledger.requeue(names, next(reasons[name] for name in names if name in reasons))
        if which:
            await self._regenerate(rollouts, which)
            reasons = rejected(rollouts, self._schedule, published)
            for name, reason in reasons.items():
                self._ledger.move([name], State.DROPPED, reason)
            rollouts.groups = [
                [item for name, item in zip(names_of(step, group), group, strict=True) if name not in reasons]
                for group in rollouts.groups
            ]
        self._ledger.move(names_of(step, rollouts.scored), State.LEASED)
        return rollouts

    async def _regenerate(self, rollouts: BufferedStep, which: Sequence[int]) -> None:
        """Generate and score the groups `which` once more, by the weights that are live now."""
        fresh = await _all([self._generate_and_score(rollouts, rollouts.prompts[i]) for i in which])
        for i, group in zip(which, fresh, strict=True):
            rollouts.groups[i] = group

    async def drained(self, version: int) -> None:
        """Wait, before `version` goes live, for the completions that older weights must finish (and have scored)."""
        if not self._schedule.drains:
            return
        if self._schedule.deterministic:
            due = [s for s in range(version, self._steps) if self._schedule.min_version(s, self._start) < version]
        else:
            self._swapping = True  # nothing new is begun until `advance`
            due = list(self._generated)
        for step in due:
            await self._generated[step].wait()
            if self._schedule.deterministic and self._schedule.teacher_follows:
                await asyncio.wait({self._ready[step]})

    async def advance(self, version: int, trained: BufferedStep) -> None:
        """Note that `version` is live, and release the text of `trained`."""
        async with self._changed:
            self._live, self._swapping = version, False
            self._held -= trained.nbytes
            for kept in (self._generated, self._ready):
                kept.pop(trained.step, None)
            self._changed.notify_all()

    def _may_begin(self, step: int) -> bool:
        if self._swapping or self._live < self._schedule.min_version(step, self._start):
            return False
        # A step in flight is taken to become as large as the largest so far.
        expected = self._held + self._in_flight * self._largest
        return self._schedule.deterministic or expected < self._schedule.max_buffer_bytes

    def _begin(self, step: int) -> BufferedStep:
        prompts = [list(g) for _, g in groupby(self._prompts(step, self._sources), key=lambda prompt: prompt.id)]
        self._ledger.issue(step, [entry for group in entries_of(step, prompts) for entry in group])
        self._generated[step].clear()
        self._in_flight += 1
        return BufferedStep(step=step, began=asyncio.get_running_loop().time(), prompts=prompts)

    async def _collect(self, rollouts: BufferedStep) -> None:
        """Score every group as soon as it is generated; if deterministic, as one batch when all are."""
        step = rollouts.step
        if self._schedule.deterministic:
            generated = await _all([self._generate(rollouts, group) for group in rollouts.prompts])
            self._generated[step].set()
            async with self._scoring:  # two steps never share a forward pass of the teacher, whatever the timing
                rollouts.groups = await _all([self._score(rollouts, group) for group in generated])
        else:
            rollouts.groups = await self._stream(rollouts)
        rollouts.nbytes = sum(nbytes(item) for item in rollouts.scored)
        self._held, self._in_flight = self._held + rollouts.nbytes, self._in_flight - 1
        self._largest = max(self._largest, rollouts.nbytes)
        self._ready[step].set_result(rollouts)

    async def _stream(self, rollouts: BufferedStep) -> list[Group]:
        left = len(rollouts.prompts)
        if not left:
            self._generated[rollouts.step].set()

        async def one(group: list[Prompt]) -> Group:
            nonlocal left
            generated = await self._generate(rollouts, group)
            left -= 1
            if not left:
                self._generated[rollouts.step].set()
            return await self._score(rollouts, generated)

        return await _all([one(group) for group in rollouts.prompts])

    async def _generate_and_score(self, rollouts: BufferedStep, group: list[Prompt]) -> Group:
        return await self._score(rollouts, await self._generate(rollouts, group))

    async def _generate(self, rollouts: BufferedStep, group: list[Prompt]) -> list[Trajectory]:
        began = asyncio.get_running_loop().time()
        generated = await self._method.rollout(group, self._context.at(rollouts.step))
        rollouts.spans.append(self._span(Stage.ROLLOUT, rollouts.step, began))
        names = _names(rollouts.step, generated)
        due = entries_of(rollouts.step, [group])[0]
        self._ledger.move(names, State.GENERATED)
        self._ledger.move(sorted(set(due) - set(names)), State.DROPPED, "not written")
        return generated

    async def _score(self, rollouts: BufferedStep, generated: list[Trajectory]) -> Group:
        began = asyncio.get_running_loop().time()
        items = await scored(self._method, generated, self._context.at(rollouts.step))
        rollouts.spans.append(self._span(Stage.TEACHER, rollouts.step, began))
        self._ledger.move(_names(rollouts.step, generated), State.SCORED)
        return items

    def _span(self, role: Stage, step: int, began: float) -> Span:
        return Span(role=role, step=step + 1, start=began, end=asyncio.get_running_loop().time())


def names_of(step: int, group: Sequence[Scored[Any]]) -> list[Entry]:
    """Ledger entries of a group's trajectories."""
    return _names(step, [item.trajectory for item in group])


def _names(step: int, trajectories: Sequence[Trajectory]) -> list[Entry]:
    return [Entry(step, t.prompt.id, t.sample) for t in trajectories]


def rejected(rollouts: BufferedStep, schedule: StalenessSchedule, published: Mapping[int, str]) -> dict[Entry, str]:
    """Trajectories of a step that may not be trained at it, each with the reason."""
    reasons = {
        name: schedule.reject_reason(item.trajectory, rollouts.step, published)
        for group in rollouts.groups
        for name, item in zip(names_of(rollouts.step, group), group, strict=True)
    }
    return {name: reason for name, reason in reasons.items() if reason}


async def _all(work: Sequence[Any]) -> list[Any]:
    """Results in order; the first failure cancels the others."""
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(one) for one in work]
    if any(task.cancelled() for task in running):  # not by us; a TaskGroup ignores it, and the learner would wait
        raise OpdError(
            "a part of the method was cancelled while it generated or scored, for no stated reason; this is a bug, "
            "please report it"
        )
    return [task.result() for task in running]
