"""Breakdown of a step's time and CPU, as shares measured in one run on the embedded task.

    python benchmarks/step_breakdown.py [steps] [OVERRIDE ...]      (default 40 steps, 3 at least)

Prints, beside the targets of the project: seconds from process start to the first step, CPU-seconds per step and, with
enough steps, to 90 % accuracy at T=1 (measured every 5 steps, evaluation apart), the share of a steady step outside
rollout, scoring and training (as the engines themselves measured them), and Ray calls per sample (counted where the
driver, the only caller of actors, makes them).
"""

import asyncio
import sys
from dataclasses import dataclass, field
from time import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from launch.monitors.accounting import process_tree_cpu_seconds
from learner.learner import LearnerRank
from opd.ports import Call

STARTED = time()
GOAL = 0.9  # accuracy at T=1
EVERY = 5
WARM = 2  # steps at least


def main() -> None:
    """Train, measuring every step; the first fifth of the steps is warm-up."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    if steps <= WARM:  # said before the minute that a run takes
        sys.exit(
            f"the first {WARM} steps are warm-up and not measured, so {steps} are too few; give {WARM + 1} or more"
        )
    from launch.config.run_config import run_config
    from launch.monitors.accounting import Totals
    from launch.plan.plan import make_plan
    from launch.run.evaluate import Evaluator, TrainingCost
    from launch.run.session import open_session
    from launch.services.ray_session.cluster import connected
    from opd.loop.train import StepRecord, train

    config = run_config(["experiment=shop", f"steps={steps}", *sys.argv[2:]])
    plan = make_plan(config)
    warm = max(WARM, steps // 5)

    async def measure() -> None:
        session = await open_session(plan)
        measured = Measured(ready_s=time() - STARTED)
        evaluator = Evaluator(
            config.evaluation, plan.sources, session.context(0), session.learner, exact_kl=plan.exact_kl
        )
        measured.calls = count_actor_calls()
        apart = await spent(session)  # by start-up and evaluation

        async def observe(record: StepRecord) -> None:
            nonlocal apart
            calls, before = len(measured.calls), await spent(session)
            measured.records.append(record)
            if record.step in (warm, steps):
                measured.marks.append(Mark(spent=before - apart, calls=calls))
            if record.step % EVERY == 0 and measured.goal is None:
                cpu_s = float((before - apart)[0])
                cost = TrainingCost(totals=Totals(), cpu_s=cpu_s)
                point = await anext(evaluator.student(record.step, cost, between=True))
                if point.mean_at_k is not None and point.mean_at_k >= GOAL:
                    measured.goal = (record.step, cpu_s)
            apart = apart + await spent(session) - before
            del measured.calls[calls:]  # this function's own

        await train(
            config.method,
            config.prompts,
            plan.sources,
            session.engines,
            session.learner,
            [observe],
            start=0,
            steps=steps,
        )
        report(measured, warm, steps)
        session.close()

    with connected(config.cluster):
        asyncio.run(measure())


async def spent(session: Any) -> np.ndarray:
    """CPU-seconds of the process tree, then busy seconds of the busiest engine, teacher and learner rank."""
    engine = [(await a.stats.remote()).busy_s for a in session.student.student.replicas.actors]
    teacher = [(await a.stats.remote()).busy_s for a in session.engines.teachers["default"].replicas.actors]
    learner = await session.learner.call(Call.broadcast(LearnerRank.busy_s))
    return np.array([process_tree_cpu_seconds(), max(engine), max(teacher), max(learner)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Resources spent when a step ended (as `spent` measures them), and the Ray calls made."""

    spent: np.ndarray
    calls: int


@dataclass(slots=True)
class Measured:
    """Measurements of the run; `goal` is the step and the CPU-seconds of the first evaluation above `GOAL`."""

    ready_s: float
    records: list = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    goal: tuple[int, float] | None = None


def count_actor_calls() -> list[str]:
    """A list that grows by a name with every call of an actor's method this process makes."""
    from ray.actor import ActorMethod

    made: list[str] = []
    plain = ActorMethod._remote

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        made.append(self._method_name)
        return plain(self, *args, **options)

    ActorMethod._remote = counted
    return made


def report(measured: Measured, warm: int, steps: int) -> None:
    """The table: measured figures with the target beside them."""
    first, last = measured.marks
    records, count = measured.records[warm:], steps - warm
    step = sum(record.seconds["step"] for record in records) / count
    cpu_s, *busy = (last.spent - first.spent) / count
    shares = [seconds / step for seconds in busy]
    samples = sum(len(record.scored) for record in records)
    table = Table("quantity", "measured", "target")
    table.add_row("process start to first step, s", f"{measured.ready_s:.1f}", "40")
    table.add_row("wall seconds per step", f"{step:.3f}", "")
    table.add_row("CPU seconds per step (whole process tree)", f"{cpu_s:.3f}", "")
    reached = "not in these steps" if not measured.goal else "{1:.1f} (step {0})".format(*measured.goal)
    table.add_row(f"CPU seconds to {GOAL:.0%} at T=1", reached, "60")
    for name, share in zip(("rollout", "scoring", "learner (train + gather)"), shares, strict=True):
        table.add_row(f"share of a step: {name}", f"{share:.1%}", "")
    table.add_row("share of a step: everything else", f"{1 - sum(shares):.1%}", "15 %")
    table.add_row("Ray calls per sample", f"{(last.calls - first.calls) / samples:.3f}", "0.1")
    for phase in ("rollout", "score", "train", "publish"):
        mean = sum(r.seconds[phase] for r in records) / len(records)
        table.add_row(f"seconds per step as the driver sees it: {phase}", f"{mean:.3f}", "")
    Console().print(table)


if __name__ == "__main__":
    main()
