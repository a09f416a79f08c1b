"""Clock of a step: when its parts began and ended, as seconds and as spans."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from opd.loop.rollout_buffer import BufferedStep
from opd.observability.spans import Span, Stage


def _now() -> float:
    return asyncio.get_running_loop().time()  # a simulation brings its own


@dataclass(slots=True)
class StepClock:
    """Times of one step, by the event loop's clock: it `began`, its rollouts were there, its update, the text before
    the next weights, and its publication ended. A time that was not marked is that of the mark before it."""

    began: float
    waited: float = 0.0
    updated: float = 0.0
    drained: float = 0.0
    ended: float = 0.0

    @classmethod
    def begin(cls) -> "StepClock":
        """The clock of a step that begins now."""
        return cls(began=_now())

    def mark_rollouts(self) -> None:
        """The rollouts are there; the update begins."""
        self.waited = self.updated = self.drained = self.ended = _now()

    def mark_update(self) -> None:
        """The student is updated."""
        self.updated = self.drained = self.ended = _now()

    def mark_drained(self) -> None:
        """No text of older weights is being written any more; the publication begins."""
        self.drained = self.ended = _now()

    def mark_end(self) -> None:
        """The new weights are live."""
        self.ended = _now()

    def mark_unpublished(self) -> None:
        """The run breaks off after the update: nothing was published."""
        self.mark_update()

    def seconds(self, rollouts: BufferedStep) -> Mapping[str, float]:
        """See `opd.loop.train.StepRecord.seconds`."""
        return {
            "rollout": rollouts.written - rollouts.began,
            "score": max(rollouts.read - rollouts.written, 0.0),
            "wait": self.waited - self.began + self.drained - self.updated,
            "train": self.updated - self.waited,
            "publish": self.ended - self.drained,
            "step": self.ended - self.began,
        }

    def spans(self, rollouts: BufferedStep) -> list[Span]:
        """Who worked for the step when; see `opd.loop.train.StepRecord.spans`."""
        number = rollouts.step + 1
        return [
            *rollouts.spans,
            Span(role=Stage.LEARNER, step=number, start=self.waited, end=self.updated),
            Span(role=Stage.PUBLISH, step=number, start=self.drained, end=self.ended),
        ]
