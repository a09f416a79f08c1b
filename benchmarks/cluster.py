"""P12: clusters of 64 to 4,096 devices in virtual time, without failures and with them.

An actor is a node of eight H200s: a 72B student, a teacher of 405B. The work per node is the same at every size.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from benchmarks.schedule import ARMS, Arm, Run, best_cluster, run
from benchmarks.simulated import NODE, Cluster, Workload
from benchmarks.stand_ins import Faults

SLOTS, PER_SLOT = 32, 3
GUESS = Workload(sequences=2048)
OURS, NARROW = Arm(name="ahead 8", ahead=8), Arm(name="ahead 4", ahead=4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """Failures to inject: `actors` deaths of each actor in a step, `learner` of the learner."""

    name: str
    actors: float
    learner: float
    resume: bool = False

    def faults(self, step_s: float) -> Faults:
        """Faults for steps of this length without failures."""
        return Faults(rate=self.actors, every_s=step_s, learner=self.learner, resume=self.resume)


def plans(cluster: Cluster, steps: int) -> list[Failures]:
    """Three readings of "10 % failures", and the first with the restart of everything when the learner fails."""
    each, learner = 0.1 / cluster.actors, 0.1 * cluster.learner / cluster.actors
    return [
        Failures(name="one in 10 % of steps", actors=each, learner=learner),
        Failures(name="the same, the run resumed", actors=each, learner=learner, resume=True),
        Failures(name="10 % of actors, learner once", actors=0.1 / steps, learner=1 / steps),
        Failures(name="each actor in 10 % of steps", actors=0.1, learner=0.0),
    ]


def not_lost(healthy: Run, failed: Run) -> tuple[float, float]:
    """Share of the busiest role's time that was not lost: of all, and if no text were lost, but only the downtime.

    Per role: the work of the run, what was done in vain (or again) and the time away, over its actors. Without idle
    time effective time cannot be more than that; a run that waits anyway can lose some for nothing.
    """
    needed, lost, away = [], [], []
    for base, now, count in zip(healthy.busy, failed.busy, failed.counts, strict=True):
        needed.append(base.useful / count)
        lost.append((now.useful + now.lost + now.down) / count)
        away.append((base.useful + now.down) / count)
    return max(needed) / max(lost), max(needed) / max(away)


def rows(best: Cluster, steps: int) -> list[tuple[str, Arm, Failures | None]]:
    """Simulations of one size: every arm first without failures, as the baseline of the others."""
    failing = plans(best, steps)
    few = [(OURS.name, OURS, None), *((plan.name, OURS, plan) for plan in failing[:3])]
    if best.devices > 512:
        return few
    return [
        *few,
        *([(failing[3].name, OURS, failing[3])] if best.devices <= 64 else []),
        (NARROW.name, NARROW, None),
        *((f"{plan.name}, ahead 4", NARROW, plan) for plan in failing[:2]),
        ("one step ahead, whole steps", ARMS[2], None),
        ("lock-step", ARMS[0], None),
    ]


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the log line of every failure."""
    loggers = [logging.getLogger(f"launch.services.{name}") for name in ("replicas", "learner_restart")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@quiet()
def cluster(sizes: Sequence[int], steps: int = 60) -> None:
    """The table, a row at a time."""
    console = Console(width=200)
    table = Table(
        "devices", "arm", "step, s", "weak scaling (0.95)", "effective time (0.90)", "not lost",
        "if no text were", "failures (resumed)", "oldest token", "virtual s a CPU s", "CPU us a sample",
    )  # fmt: skip
    first: dict[str, float] = {}
    for devices in sizes:
        nodes = devices // NODE.devices
        rough = best_cluster(nodes, GUESS, SLOTS, NODE)
        load = replace(GUESS, sequences=PER_SLOT * rough.rollout * SLOTS // 4 * 4)
        best = best_cluster(nodes, load, SLOTS, NODE)
        healthy: dict[Arm, Run] = {}
        for name, arm, plan in rows(best, steps):
            faults = plan.faults(healthy[arm].all_s / steps) if plan else Faults()
            made = run(best, load, arm, steps - 1, faults, filling=0, checkpoint_every=1 if faults.learner else 0)
            healthy.setdefault(arm, made)
            speed = load.sequences * steps / made.all_s / devices
            first.setdefault(name, speed)
            effective, shares = healthy[arm].all_s / made.all_s, not_lost(healthy[arm], made)
            row = (
                str(devices), name, f"{made.all_s / steps:.1f}", f"{speed / first[name]:.3f}",
                *((f"{effective:.3f}", *(f"{share:.3f}" for share in shares)) if plan else ("", "", "")),
                f"{made.failures} ({made.resumed})", str(made.staleness), f"{made.all_s / made.cpu_s:,.0f}",
                f"{made.cpu_s / load.sequences / steps * 1e6:.0f}",
            )  # fmt: skip
            console.print(" | ".join(row), highlight=False)
            table.add_row(*row)
            if plan and devices == min(sizes):
                again = run(best, load, arm, steps - 1, faults, filling=0, checkpoint_every=1 if faults.learner else 0)
                console.print(f"{name}, run again: {'bit-equal' if again.digest == made.digest else 'NOT EQUAL'}")
    console.print(table)
