"""Context of a teacher beside a prompt, in worlds: the same for all texts of a group, which enumerate one state.

What a method shows for a text may depend on the other texts of its group, which are drawn independently, and must not
depend on the text itself: the teacher would be another for every token that could be sampled. In a world all texts that
could be written stand in one group and would be each other's siblings, so one context stands for all; a row of its own
checks the independence.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from opd.certify.awaited import awaited
from opd.certify.certificate import Finding, Row, Skipped
from opd.certify.engines import RequestLog, engines
from opd.certify.gradients import Case
from opd.method.method import Method
from opd.method.rewards import task_rewards
from opd.ports import Context, Need
from opd.types import StopReason, Trajectory

ROOMY = 100_000  # tokens: more than any text of a world has
INDEPENDENT = "what the teacher is shown does not depend on the text that it scores"
ALONE = "what the teacher is shown of a text does not depend on its group"
SUCCESS = "what the teacher is shown of other texts is the one that is right"


@dataclass(frozen=True, slots=True, kw_only=True)
class OneForAll:
    """Builder that shows every trajectory of a group what `of` shows the first for which it has anything."""

    of: Any

    @property
    def needs_engines(self) -> frozenset[Need]:
        return self.of.needs_engines

    @property
    def min_group(self) -> int:
        return self.of.min_group

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> list[np.ndarray | None]:
        built = await self.of(trajectories, context)
        first = next((ids for ids in built if ids is not None), None)
        return [first] * len(trajectories)


def with_one_context(method: Method) -> Method:
    """The method, whose teacher is shown the same for every text of a group, and whose texts are all guided or none."""
    rollout: Any = method.rollout
    if hasattr(rollout, "guided"):  # all of them: else the tokens of one state would have been drawn in two contexts
        return replace(method, rollout=replace(rollout, fraction=1.0))
    shown = getattr(rollout, "shown", None)
    if shown is None:
        return method
    roomy = replace(shown, room=ROOMY) if hasattr(shown, "room") else shown
    return replace(method, rollout=replace(rollout, shown=OneForAll(of=roomy)))


def check_shown(case: Case) -> Iterator[Finding]:
    """A text that is replaced by another of its group is shown the same as before, if it was shown a sibling."""
    shown = getattr(case.method.rollout, "shown", None)
    if not isinstance(shown, OneForAll):
        yield Skipped(name=INDEPENDENT, why="the rollout shows the teacher nothing of texts")
        return
    if shown.min_group < 2:
        yield Row(name=ALONE, measured=float(awaited(_of_others(shown.of, case))), tolerance=0.0)
    if hasattr(case.method.rollout, "refiner"):  # a draft, which is not scored, may be shown
        yield Skipped(name=INDEPENDENT, why="the teacher scores other texts than those that it is shown")
        return
    yield Row(name=INDEPENDENT, measured=float(awaited(_dependent(shown.of, case))), tolerance=0.0)
    if hasattr(shown.of, "threshold"):
        yield Row(name=SUCCESS, measured=float(awaited(_failures(shown.of, case))), tolerance=0.0)


async def _dependent(builder: Any, case: Case) -> int:
    """Number of texts whose context changes with their own tokens."""
    context, wrong = engines(case.world, RequestLog()), 0
    texts = [item.trajectory for item in case.enumeration.scored]
    for _, members in groupby(texts, key=lambda t: t.prompt.id):
        group = list(members)
        before = await builder(group, context)
        for i in range(0, len(group), 3):
            for other in (group[i - 1], group[i - 5]):
                changed = replace(other, prompt=group[i].prompt, sample=group[i].sample)
                after = await builder([*group[:i], changed, *group[i + 1 :]], context)
                wrong += not _same(before[i], after[i])
    return wrong


async def _of_others(builder: Any, case: Case) -> int:
    """Number of texts for which a builder that needs no group shows something else within one."""
    context = engines(case.world, RequestLog())
    group = [item.trajectory for item in case.enumeration.scored[: case.world.vocabulary]]
    together = await builder(group, context)
    return sum([not _same(ids, *(await builder([t], context))) for t, ids in zip(group, together, strict=True)])


async def _failures(builder: Any, case: Case) -> int:
    """Number of texts that are not shown the only right text of their group, of which all others were cut.

    It is the one that is only just right.
    """
    context, wrong = engines(case.world, RequestLog()), 0
    texts = [item.trajectory for item in case.enumeration.scored]
    for _, members in groupby(texts, key=lambda t: t.prompt.id):
        group = list(members)
        rewards = np.asarray(await task_rewards(group, context))
        right = int(np.argmin(np.where(rewards >= builder.threshold, rewards, np.inf)))
        group = [t if i == right else replace(t, stop=StopReason.LENGTH) for i, t in enumerate(group)]
        before = await builder(group, context)
        wrong += before[right] is not None
        for i, j in ((i, (i + 1) % len(group)) for i in range(0, len(group), 3)):
            if right in (i, j):
                continue
            other = replace(group[j - 2], sample=group[j].sample, stop=StopReason.LENGTH)
            after = await builder([*group[:j], other, *group[j + 1 :]], context)
            wrong += before[i] is None or not _same(before[i], after[i])
    return wrong


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return (a is None) == (b is None) and (a is None or b is None or np.array_equal(a, b))
