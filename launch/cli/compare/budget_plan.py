"""Steps of the runs of a comparison, planned from what a step was measured to cost, and what is estimated before."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.artifacts.run_data import read_metrics
from launch.artifacts.run_directory import RunDirectory
from launch.artifacts.spending import Unit, spending
from launch.monitors.accounting import StepTokens, step_flops
from launch.plan.plan import Plan
from launch.report.figures import short_number
from launch.run.costs import costs
from opd.errors import ConfigurationError, DataError
from opd.method.method import readings_of
from opd.method.needs import needed
from opd.ports import Role

PILOT_STEPS = 5  # of the run by which an arm's cost per step is measured first
ROOM = 0.1  # planned steps beyond those that should do, as a share: the budget ends a run, and not its steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """One amount for every run of a comparison: `amount` of `unit`; 0 of steps: every arm has its own.

    Of another unit than steps it is not known beforehand at which step it is spent, but a schedule of the learning rate
    is laid out over a number of steps. So a pilot of `PILOT_STEPS` steps measures what a step of each arm costs, an
    arm's trials get as many steps as the amount makes of that, and `ROOM` more; its reported runs those that it makes
    of the cost of its best trial. Every run ends at the first step that has spent the amount.
    """

    unit: Unit
    amount: float

    @property
    def needs_pilots(self) -> bool:
        """The number of steps has to be planned from measured costs."""
        return self.unit is not Unit.STEPS

    def overrides(self, cost: float) -> list[str]:
        """Settings of a run whose steps cost `cost` each."""
        if self.unit is Unit.STEPS:
            return [f"steps={self.amount:.0f}"] if self.amount else []
        return [f"steps={planned_steps(self.amount, cost)}", f"stop_after.{self.unit.value}={self.amount!r}"]

    def note(self, arm: str, cost: float) -> str:
        """Sentence about the plan of an arm's steps."""
        return (
            f"{arm}: a step costs {short_number(cost)} {self.unit.value} (measured before), so its runs were planned "
            f"with {planned_steps(self.amount, cost)} steps, {ROOM:.0%} more than the budget of "
            f"{short_number(self.amount)} {self.unit.value} should take; each ends at the first step that reaches it."
        )


def planned_steps(amount: float, cost: float) -> int:
    """Steps that spend `amount`, with room, if each costs `cost`."""
    steps = max(1, math.ceil(round(amount / cost, 6)))
    return steps + math.ceil(round(ROOM * steps, 6))


def cost_per_step(directory: Path, unit: Unit) -> float:
    """Mean cost of a step of a finished run. Its first step, which compiles and fills caches, is left out if it can be.

    Raises:
        DataError: the run has no metrics.
        ConfigurationError: its steps cost nothing.
    """
    lines = [
        {name: value for name, value in line.items() if value is not None}
        for line in read_metrics(RunDirectory.open(directory).metrics)
    ]
    if not lines:
        raise DataError(f"run {directory} has no metrics, so no step has a cost; repeat that run")
    first, last = lines[0], lines[-1]
    begun, steps = (spending(first, unit), last["step"] - first["step"]) if len(lines) > 1 else (0.0, last["step"])
    cost = (spending(last, unit) - begun) / steps
    if cost <= 0:
        raise ConfigurationError(f"the steps of {directory} cost no {unit.value}; choose another budget=...")
    return cost


def at_most_per_step(plan: Plan) -> Mapping[Unit, float]:
    """Upper bounds of what a step costs, if every completion had `max_tokens`; processor seconds have none."""
    prompts = plan.config.prompts(0, plan.sources)
    prompt, completion = sum(len(p.student_ids) for p in prompts), plan.config.max_tokens * len(prompts)
    method, spent, both = plan.config.method, costs(plan), prompt + completion
    tokens = StepTokens(
        prompt=prompt,
        completion=completion,
        generated=completion,
        student=0 if spent.teacher_writes else both,
        scored=(sum(len(p.teacher_ids) for p in prompts) + completion) * spent.teacher_reads,
        learned=both,
        trained=completion,
        read=both if any(readings_of(*term.weights.values()) for term in method.every_term.values()) else 0,
        blended=both if needed(method, Role.BLENDED) else 0,
    )
    return {Unit.STEPS: 1.0, Unit.TOKENS: float(completion + both), Unit.FLOPS: step_flops(tokens, spent)}
