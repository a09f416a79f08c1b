"""Progress of a run through what it may spend: when an evaluation is due, and when the run is over."""

from launch.artifacts.evaluation_point import MAIN
from launch.artifacts.spending import Metrics, Unit, spending
from launch.config.budget import StopAfter
from launch.config.settings import EvaluationConfig


class Progress:
    """Parts of a run that are done, by the metrics of its steps.

    `stop_after` are the amounts that end the run, `steps` what it trains at most, `parts` in how many equal parts
    evaluations divide it (0 = none), `every` the steps between evaluations if there are no parts. `before` are the
    metrics of the last step of a run that is gone on with.
    """

    def __init__(
        self, stop_after: StopAfter, steps: int, *, parts: int = 0, every: int = 0, before: Metrics | None = None
    ) -> None:
        self._amounts = stop_after.amounts
        self._steps, self._parts, self._every = steps, parts, every
        self.spent = False  # an amount is reached: this step is the run's last
        self._done = 0
        if before is not None:
            self.see(before)

    def see(self, metrics: Metrics) -> bool:
        """Take note of a finished step; returns whether the student should be evaluated now.

        Not at the last step: what is measured at the end of a run follows it anyway.
        """
        self.spent = any(spending(metrics, unit) >= amount for unit, amount in self._amounts.items())
        done = self._parts_done(metrics)
        due = done > self._done if self._parts else bool(self._every) and int(metrics["step"]) % self._every == 0
        self._done = done
        return due and not self.spent and metrics["step"] < self._steps

    def _parts_done(self, metrics: Metrics) -> int:
        """Number of parts that are over."""
        limits = self._amounts or {Unit.STEPS: float(self._steps)}
        return max(int(self._parts * spending(metrics, unit) // amount) for unit, amount in limits.items())


def due_sets(config: EvaluationConfig, step: int, steps: int, *, main: bool) -> list[str]:
    """Evaluation sets that are due after a step between the first and the last; `main`: whether the unnamed one is.

    Each named one goes by its own `every`.
    """
    if step >= steps:
        return []
    named = {name: bool(one.every) and step % one.every == 0 for name, one in config.sets.items()}
    return [name for name in config.by_name if (main if name == MAIN else named[name])]
