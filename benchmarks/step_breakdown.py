"""Where a step's time and CPU go, as shares measured in one run on the embedded task.

    python benchmarks/step_breakdown.py [steps] [OVERRIDE ...]

Prints, beside the limits of the project: seconds from process start to the first step, CPU-seconds per step, the
share of a steady step outside rollout, scoring and training (as the engines themselves measured them), and Ray calls
per sample (counted from the code, not measured).
"""

import asyncio
import sys
from time import perf_counter, time

from rich.console import Console
from rich.table import Table

STARTED = time()


def main() -> None:
    """Train, measuring every step; the first fifth of the steps is warm-up."""
    from launch.accounting import process_tree_cpu_seconds
    from launch.cluster import connected
    from launch.config import run_config
    from launch.plan import make_plan
    from launch.session import open_session
    from opd.loop import StepRecord, train

    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    config = run_config(["experiment=shop", f"steps={steps}", *sys.argv[2:]])
    plan = make_plan(config)
    warm = max(2, steps // 5)

    async def measure() -> None:
        session = await open_session(plan)
        ready = time() - STARTED
        marks: list[tuple[float, float, tuple[float, float, float]]] = []
        records: list[StepRecord] = []

        async def busy() -> tuple[float, float, float]:
            engine = [(await a.stats.remote()).busy_s for a in session.engines.student.actors]  # pyright: ignore
            teacher = [(await a.stats.remote()).busy_s for a in session.engines.teachers["default"].actors]  # pyright: ignore
            learner = [(await a.stats.remote())["busy_s"] for a in session.learner.actors]
            return max(engine), max(teacher), max(learner)

        async def observe(record: StepRecord) -> None:
            records.append(record)
            if record.step in (warm, steps):
                marks.append((perf_counter(), process_tree_cpu_seconds(), await busy()))

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
        report(ready, marks, records[warm:], steps - warm)
        session.close()

    with connected(config.cluster):
        asyncio.run(measure())


def report(ready: float, marks: list, records: list, count: int) -> None:
    """The table: measured figures with the limit beside them."""
    (wall0, cpu0, busy0), (wall1, cpu1, busy1) = marks
    step = (wall1 - wall0) / count
    shares = [(b - a) / count / step for a, b in zip(busy0, busy1, strict=True)]
    samples = len(records[0].scored)
    table = Table("quantity", "measured", "limit")
    table.add_row("process start to first step, s", f"{ready:.1f}", "40")
    table.add_row("wall seconds per step", f"{step:.3f}", "")
    table.add_row("CPU seconds per step (whole process tree)", f"{(cpu1 - cpu0) / count:.3f}", "")
    for name, share in zip(("rollout", "scoring", "learner (train + gather)"), shares, strict=True):
        table.add_row(f"share of a step: {name}", f"{share:.1%}", "")
    table.add_row("share of a step: everything else", f"{1 - sum(shares):.1%}", "15 %")
    calls = 5  # generate, score, step, weights, receive: one each per actor of the smallest layout
    table.add_row("Ray calls per sample (counted from the code)", f"{calls / samples:.3f}", "0.1")
    for phase in ("rollout", "score", "train", "publish"):
        mean = sum(r.seconds[phase] for r in records) / len(records)
        table.add_row(f"seconds per step as the driver sees it: {phase}", f"{mean:.3f}", "")
    Console().print(table)


if __name__ == "__main__":
    main()
