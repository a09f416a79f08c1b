"""Step clock: durations and spans of the parts of a training step."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from opd.loop.rollout_buffer import BufferedStep
from opd.observability.spans import Span, Stage


def _now() -> float:
    return asyncio.get_running_loop().time()  # a simulation brings its own


@dataclass(slots=True)
class StepClock:
    """Times at which the parts of a step ended, in seconds of the event loop's clock.

    `began`, then the end of waiting for rollouts, of the update, of draining and of publishing. A time that was not
    marked is that of the mark before it.
    """

    began: float
    waited: float = 0.0
    updated: float = 0.0
    drained: float = 0.0
    ended: float = 0.0

    @classmethod
    def begin(cls) -> "StepClock":
        """Clock of a step that begins now."""
        return cls(began=_now())

    def mark_rollouts(self) -> None:
        """Mark the end of waiting for rollouts, where the update begins."""
        self.waited = self.updated = self.drained = self.ended = _now()

    def mark_update(self) -> None:
        """Mark the end of the update."""
        self.updated = self.drained = self.ended = _now()

    def mark_drained(self) -> None:
        """Mark the end of draining, where publishing begins: no text of older weights is being generated any more."""
        self.drained = self.ended = _now()

    def mark_end(self) -> None:
        """Mark the end of publishing: the new weights are live."""
        self.ended = _now()

    def mark_unpublished(self) -> None:
        """Mark the end of a step whose run breaks off after the update: nothing was published."""
        self.mark_update()

    def seconds(self, rollouts: BufferedStep) -> Mapping[str, float]:
        """Durations by part; see `opd.loop.train.StepRecord.seconds`."""
        return {
            "rollout": rollouts.generated_at - rollouts.began,
            "score": max(rollouts.scored_at - rollouts.generated_at, 0.0),
            "wait": self.waited - self.began + self.drained - self.updated,
            "train": self.updated - self.waited,
            "publish": self.ended - self.drained,
            "step": self.ended - self.began,
        }

    def spans(self, rollouts: BufferedStep) -> list[Span]:
        """Spans of rollout, teacher, learner and publishing; see `opd.loop.train.StepRecord.spans`."""
        number = rollouts.step + 1
        return [
            *rollouts.spans,
            Span(role=Stage.LEARNER, step=number, start=self.waited, end=self.updated),
            Span(role=Stage.PUBLISH, step=number, start=self.drained, end=self.ended),
        ]
