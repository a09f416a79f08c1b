"""Collecting text ahead of training: every step's groups are written and read as early as the pipeline allows."""

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
    """A step's groups in the order asked, and who worked for it when (`loop.time()`, from `began`)."""

    step: int
    began: float
    asked: list[list[Prompt]]
    groups: list[Group] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    nbytes: int = 0

    @property
    def scored(self) -> Group:
        """All trajectories."""
        return [item for group in self.groups for item in group]

    @property
    def written(self) -> float:
        """When the last completion was there."""
        return self._last(Stage.ROLLOUT)

    @property
    def read(self) -> float:
        """When the last testimony was there."""
        return self._last(Stage.TEACHER)

    def _last(self, role: Stage) -> float:
        return max((span.end for span in self.spans if span.role is role), default=self.began)


class RolloutBuffer:
    """Begins steps in order; `run` in a task, `take` what is ready, `advance` when new weights are live."""

    def __init__(
        self,
        method: Method,
        prompts: PromptSource,
        sources: Sources,
        context: Context,
        ledger: Ledger,
        pipeline: StalenessSchedule,
    ) -> None:
        start, steps = context.step, context.steps
        self._method, self._prompts, self._sources, self._context = method, prompts, sources, context
        self._ledger, self._pipeline, self._start, self._steps = ledger, pipeline, start, steps
        self._live, self._swapping = start, False
        self._held = self._largest = self._writing = 0  # bytes ready, bytes of the largest step, steps not yet ready
        self._changed = asyncio.Condition()
        self._reading = asyncio.Lock()
        self._written: defaultdict[int, asyncio.Event] = defaultdict(asyncio.Event)
        self._ready: defaultdict[int, asyncio.Future[BufferedStep]] = defaultdict(
            asyncio.get_running_loop().create_future
        )

    async def run(self) -> None:
        """Collect all steps; a failure anywhere ends it."""
        async with asyncio.TaskGroup() as tasks:
            for step in range(self._start, self._steps):
                async with self._changed:
                    await self._changed.wait_for(lambda s=step: self._may_begin(s))
                tasks.create_task(self._collect(self._begin(step)))

    async def take(self, step: int, published: Mapping[int, str]) -> BufferedStep:
        """The step's rollouts, written, scored and admitted to training; steps are taken by number.

        Text that is too old, or of weights that were not `published` (digests by version), is written again, once. With
        the schedule's own order there is none; it takes an engine that missed an update. What comes back like that a
        second time is dropped.
        """
        found = await self._ready[step]
        reasons = rejected(found, self._pipeline, published)
        which = [i for i, g in enumerate(found.groups) if any(n in reasons for n in names_of(step, g))]
        for i in which:
            names = names_of(step, found.groups[i])
            self._ledger.requeue(names, next(reasons[name] for name in names if name in reasons))
        if which:
            await self._again(found, which)
            reasons = rejected(found, self._pipeline, published)
            for name, reason in reasons.items():
                self._ledger.move([name], State.DROPPED, reason)
            found.groups = [
                [item for name, item in zip(names_of(step, group), group, strict=True) if name not in reasons]
                for group in found.groups
            ]
        self._ledger.move(names_of(step, found.scored), State.LEASED)
        return found

    async def _again(self, found: BufferedStep, which: Sequence[int]) -> None:
        """Have the groups `which` written and scored once more, by the weights that are live now."""
        fresh = await _all([self._through(found, found.asked[i]) for i in which])
        for i, group in zip(which, fresh, strict=True):
            found.groups[i] = group

    async def drained(self, version: int) -> None:
        """Before `version` goes live: wait for the text that weights before it must finish (and have read)."""
        if not self._pipeline.drains:
            return
        if self._pipeline.deterministic:
            due = [s for s in range(version, self._steps) if self._pipeline.min_version(s, self._start) < version]
        else:
            self._swapping = True  # nothing new is begun until `advance`
            due = list(self._written)
        for step in due:
            await self._written[step].wait()
            if self._pipeline.deterministic and self._pipeline.teacher_follows:
                await asyncio.wait({self._ready[step]})

    async def advance(self, version: int, trained: BufferedStep) -> None:
        """`version` is live, and the text of `trained` is not needed any more."""
        async with self._changed:
            self._live, self._swapping = version, False
            self._held -= trained.nbytes
            for kept in (self._written, self._ready):
                kept.pop(trained.step, None)
            self._changed.notify_all()

    def _may_begin(self, step: int) -> bool:
        if self._swapping or self._live < self._pipeline.min_version(step, self._start):
            return False
        # What is being written will be as large as the largest step so far, for all we know.
        expected = self._held + self._writing * self._largest
        return self._pipeline.deterministic or expected < self._pipeline.max_buffer_bytes

    def _begin(self, step: int) -> BufferedStep:
        asked = [list(g) for _, g in groupby(self._prompts(step, self._sources), key=lambda prompt: prompt.id)]
        self._ledger.issue(step, [entry for group in entries_of(step, asked) for entry in group])
        self._written[step].clear()
        self._writing += 1
        return BufferedStep(step=step, began=asyncio.get_running_loop().time(), asked=asked)

    async def _collect(self, collected: BufferedStep) -> None:
        """Every group is read as soon as it is written; if all must repeat, as one batch when all are."""
        step = collected.step
        if self._pipeline.deterministic:
            written = await _all([self._write(collected, group) for group in collected.asked])
            self._written[step].set()
            async with self._reading:  # two steps never share a call of the teacher's, whatever the timing
                collected.groups = await _all([self._read(collected, group) for group in written])
        else:
            collected.groups = await self._stream(collected)
        collected.nbytes = sum(nbytes(item) for item in collected.scored)
        self._held, self._writing = self._held + collected.nbytes, self._writing - 1
        self._largest = max(self._largest, collected.nbytes)
        self._ready[step].set_result(collected)

    async def _stream(self, collected: BufferedStep) -> list[Group]:
        left = len(collected.asked)
        if not left:
            self._written[collected.step].set()

        async def one(group: list[Prompt]) -> Group:
            nonlocal left
            written = await self._write(collected, group)
            left -= 1
            if not left:
                self._written[collected.step].set()
            return await self._read(collected, written)

        return await _all([one(group) for group in collected.asked])

    async def _through(self, collected: BufferedStep, group: list[Prompt]) -> Group:
        return await self._read(collected, await self._write(collected, group))

    async def _write(self, collected: BufferedStep, group: list[Prompt]) -> list[Trajectory]:
        began = asyncio.get_running_loop().time()
        written = await self._method.rollout(group, self._context.at(collected.step))
        collected.spans.append(self._span(Stage.ROLLOUT, collected.step, began))
        names = _names(collected.step, written)
        asked = entries_of(collected.step, [group])[0]
        self._ledger.move(names, State.GENERATED)
        self._ledger.move(sorted(set(asked) - set(names)), State.DROPPED, "not written")
        return written

    async def _read(self, collected: BufferedStep, written: list[Trajectory]) -> Group:
        began = asyncio.get_running_loop().time()
        items = await scored(self._method, written, self._context.at(collected.step))
        collected.spans.append(self._span(Stage.TEACHER, collected.step, began))
        self._ledger.move(_names(collected.step, written), State.SCORED)
        return items

    def _span(self, role: Stage, step: int, began: float) -> Span:
        return Span(role=role, step=step + 1, start=began, end=asyncio.get_running_loop().time())


def names_of(step: int, group: Sequence[Scored[Any]]) -> list[Entry]:
    """What the ledger calls them."""
    return _names(step, [item.trajectory for item in group])


def _names(step: int, trajectories: Sequence[Trajectory]) -> list[Entry]:
    return [Entry(step, t.prompt.id, t.sample) for t in trajectories]


def rejected(collected: BufferedStep, pipeline: StalenessSchedule, published: Mapping[int, str]) -> dict[Entry, str]:
    """The trajectories of a step that may not be trained at it, and why."""
    reasons = {
        name: pipeline.reject_reason(item.trajectory, collected.step, published)
        for group in collected.groups
        for name, item in zip(names_of(collected.step, group), group, strict=True)
    }
    return {name: reason for name, reason in reasons.items() if reason}


async def _all(work: Sequence[Any]) -> list[Any]:
    """The results, in order; the first failure ends the others."""
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(one) for one in work]
    if any(task.cancelled() for task in running):  # not by us; a group of tasks takes no notice, and the learner waits
        raise OpdError(
            "a part of the method was cancelled while it wrote or read, and says nothing more; this is a bug, please "
            "report it"
        )
    return [task.result() for task in running]
