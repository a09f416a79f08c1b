"""The schedule: overlap (P6), cost of the loop itself (P10), a simulated cluster with failures (P12).

    python benchmarks/schedule.py overlap  [devices] [steps]
    python benchmarks/schedule.py loop     [samples] [ray]
    python benchmarks/schedule.py cluster  [devices ...]

`overlap` and `cluster` run the real loop, ledger and packing in virtual time on simulated H200s (`simulated.py`), a 32B
teacher and an 8B student whose response lengths are log-normal; `loop` runs it in real time on engines that answer at
once. Every figure has its limit beside it.
"""

import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.simulated import (
    H200,
    STUDENT,
    Cluster,
    Faults,
    Prompts,
    SimulatedLearner,
    SimulatedStudent,
    SimulatedTeacher,
    Workload,
)
from benchmarks.virtual_time import simulate
from opd import limits, ports
from opd.limits import Floors
from opd.loop import StepRecord, train
from opd.method import Method
from opd.objectives.sampled import SampledReverseKL
from opd.pipeline import Pipeline
from opd.rollouts.student import StudentRollout
from opd.scorers.teacher import WrittenTokens
from opd.spans import Role
from opd.utilisation import STAFFED, UsageLog

RESTART_S = 35.0  # until what failed works again: the project's own limits, 5 s to notice and 30 s to recover
HORIZON_S = 1e8  # virtual seconds after which a run counts as hung


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to schedule: how far rollouts run ahead, and whether the teacher waits for the whole step."""

    name: str
    ahead: int
    whole: bool = False


ARMS = (
    Arm(name="lock-step", ahead=0, whole=True),
    Arm(name="on-policy, streamed", ahead=0),
    Arm(name="ahead 1, whole steps", ahead=1, whole=True),
    Arm(name="ahead 1", ahead=1),
    Arm(name="ahead 2", ahead=2),
    Arm(name="ahead 4", ahead=4),
    Arm(name="ahead 8", ahead=8),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """What was known when a step ended: the time, and useful device-seconds of the roles of `STAFFED`."""

    at: float
    busy: tuple[float, float, float]


@dataclass(slots=True)
class Run:
    """A simulated run: what was seen at every step."""

    cluster: Cluster
    filling: int  # steps at either end that are not measured
    marks: list[Mark] = field(default_factory=list)
    usage: UsageLog = field(default_factory=lambda: UsageLog(0))
    digest: str = ""
    staleness: int = 0
    failures: int = 0
    lost: float = 0.0
    cpu_s: float = 0.0

    def steady(self) -> tuple[Mark, Mark, int]:
        """First and last mark of the steps between filling and draining the pipeline, and how many they are."""
        first, last = self.filling, len(self.marks) - 1 - self.filling
        return self.marks[first], self.marks[last], last - first

    @property
    def step_s(self) -> float:
        """Seconds of a steady step."""
        first, last, count = self.steady()
        return (last.at - first.at) / count

    @property
    def alone_s(self) -> tuple[float, ...]:
        """Seconds a step that each role needs for the work it did, if nobody made it wait."""
        first, last, count = self.steady()
        counts = (self.cluster.rollout, self.cluster.teacher, self.cluster.learner)
        return tuple((b - a) / count / n for a, b, n in zip(first.busy, last.busy, counts, strict=True))

    @property
    def eta(self) -> float:
        """Overlap efficiency: the slowest role alone, over the step."""
        return max(self.alone_s) / self.step_s

    @property
    def bubble(self) -> float:
        """`1 - sum busy device-seconds / sum device-seconds`."""
        counts = (self.cluster.rollout, self.cluster.teacher, self.cluster.learner)
        useful = sum(n * alone for n, alone in zip(counts, self.alone_s, strict=True))
        return 1 - useful / (self.cluster.devices * self.step_s)


def run(cluster: Cluster, load: Workload, arm: Arm, steps: int, faults: Faults | None = None, filling: int = 9) -> Run:
    """Simulate `steps` steps and, at either end, as many more as the pipeline takes to fill and to drain."""
    faults, steps = faults or Faults(), steps + 2 * filling + 1
    began = time.process_time()
    made = Run(cluster=cluster, filling=filling, usage=UsageLog(arm.ahead))
    digest = hashlib.sha256()

    async def main() -> None:
        student = SimulatedStudent(cluster, load, faults)
        teacher = SimulatedTeacher(cluster, load, faults, whole=load.sequences if arm.whole else 0)
        learner = SimulatedLearner(cluster, load, faults)

        async def observe(record: StepRecord) -> None:
            end = max(span.end for span in record.spans)
            made.usage.add(end - record.seconds["step"], end, record.spans)
            busy = (student.servers.busy.useful, teacher.servers.busy.useful, learner.busy.useful)
            made.marks.append(Mark(at=end, busy=busy))
            made.failures = student.servers.failures + teacher.servers.failures + learner.failures
            made.lost = student.servers.busy.lost + teacher.servers.busy.lost + learner.busy.lost
            oldest = min(int(item.trajectory.versions.min()) for item in record.scored)
            made.staleness = max(made.staleness, record.step - 1 - oldest)
            names = [(s.trajectory.prompt.id, s.trajectory.sample, len(s.trajectory)) for s in record.scored]
            times = [(span.role.value, span.start.hex(), span.end.hex()) for span in record.spans]
            versions = b"".join(item.trajectory.versions.tobytes() for item in record.scored)
            digest.update(repr((record.step, record.ledger, names, times)).encode() + versions)

        engines = ports.Engines(
            student=student, teachers={"default": teacher}, writers={}, graders={}, tokenizer=NOBODY
        )
        await go(load, engines, learner, observe, steps, arm.ahead)

    simulate(main(), HORIZON_S)
    made.digest, made.cpu_s = digest.hexdigest(), time.process_time() - began
    return made


NOBODY: Any = None  # nothing here reads text
SOURCES = ports.Sources(tokenizer=NOBODY, rows=lambda path, columns: ())  # noqa: ARG005


async def go(load: Workload, engines: ports.Engines, learner: Any, observe: Any, steps: int, ahead: int) -> None:
    """The real loop with the simplest method that asks a teacher."""
    method = Method(
        name="simulated",
        rollout=StudentRollout(max_tokens=load.most),
        scorer=WrittenTokens(),
        objective=SampledReverseKL(),
    )
    ledger = await train(
        method,
        Prompts(load=load),
        SOURCES,
        engines,
        learner,
        [observe],
        start=0,
        steps=steps,
        pipeline=Pipeline(max_staleness=ahead, deterministic=False),
    )
    lost = load.sequences * steps - ledger.summary()["trained"]
    if lost:
        raise RuntimeError(f"{lost} samples of {load.sequences * steps} were not trained")


def floors(cluster: Cluster, load: Workload, steps: int) -> tuple[Floors, float]:
    """Means over `steps` steps. `rollout` is that of lock-step, where a step also lasts as long as its longest
    response; the number beside it is its work alone, which is what counts if steps overlap."""
    student = SimulatedStudent(cluster, load, Faults())
    teacher, learner = SimulatedTeacher(cluster, load, Faults()), SimulatedLearner(cluster, load, Faults())
    parts = []
    for step in range(steps):
        lengths = load.lengths(step)
        slot_s = student.prefill_s + lengths.r / load.grain * student.token_s
        work = slot_s.sum() / (cluster.rollout * cluster.slots)
        read = teacher.seconds(lengths.response) / cluster.teacher
        trained = STUDENT.forward_flops(np.zeros_like(lengths.p), lengths.p + lengths.r, float(lengths.r.sum()))
        parts.append((work, max(work, float(slot_s.max())), read, learner.computing_s(trained)))
    work, longest, read, learned = np.mean(parts, axis=0)
    return Floors(rollout=float(longest), teacher=float(read), learner=float(learned), push=learner.push_s), float(work)


def best_cluster(devices: int, load: Workload, slots: int) -> Cluster:
    """The split of `devices` with the fastest overlapped step; the learner's part includes its push."""
    even = Cluster(rollout=devices, teacher=devices, learner=devices, slots=slots)
    least, work = floors(even, load, 4)
    optimizer = limits.ADAM_BYTES * STUDENT.params / (devices * H200.memory)
    parts = [work, least.teacher, least.learner - optimizer]
    rollout, teacher, learner = limits.best_split([devices * part for part in parts], devices)
    return Cluster(rollout=rollout, teacher=teacher, learner=learner, slots=slots)


def overlap(devices: int = 32, steps: int = 24) -> None:
    """P6: every arm on the same work, heavy tails and moderate ones."""
    console = Console(width=170)
    for sigma, per_slot in ((1.0, 2), (1.0, 6), (0.5, 2)):
        slots = 16
        guess = Workload(sequences=1024, sigma=sigma)
        cluster = best_cluster(devices, guess, slots)
        load = replace(guess, sequences=per_slot * cluster.rollout * slots // 4 * 4)
        cluster = best_cluster(devices, load, slots)
        least, work = floors(cluster, load, steps)
        overlapped = max(work, least.teacher, least.learner + least.push)
        bound = least.lock_step / overlapped
        said = [
            f"\n{devices} H200: {cluster.rollout} rollout x {slots} slots, {cluster.teacher} teacher",
            f"{cluster.learner} learner; {load.sequences} sequences a step, median {load.median:g}, sigma {sigma}",
            f"mean {load.mean:.0f}, cut at {load.most}; limit: rollout {work:.0f} s (longest {least.rollout:.0f})",
            f"teacher {least.teacher:.0f}, learner {least.learner:.0f}, push {least.push:.2f}",
            f"lock-step {least.lock_step:.0f}, overlapped {overlapped:.0f}: at most {bound:.2f}x",
        ]
        console.print(", ".join(said), soft_wrap=True, highlight=False)
        table = Table("arm", "step, s", "faster than lock-step", "of the bound (0.95)", "eta (0.95)", "bubble (5 %)",
                      "bubble from spans", "oldest token", "virtual s a CPU s")  # fmt: skip
        lock = 0.0
        for arm in ARMS:
            made = run(cluster, load, arm, steps)
            step_s = made.step_s
            lock = lock or step_s
            counts: dict[Role, int] = dict(
                zip(STAFFED, (cluster.rollout, cluster.teacher, cluster.learner), strict=True)
            )
            table.add_row(
                arm.name, f"{step_s:.1f}", f"{lock / step_s:.2f}x", f"{lock / step_s / bound:.3f}",
                f"{made.eta:.3f}", f"{made.bubble:.1%}",
                f"{made.usage.whole().bubble(counts):.1%}", str(made.staleness),
                f"{made.marks[-1].at / made.cpu_s:,.0f}",
            )  # fmt: skip
        console.print(table)


def cluster(sizes: Sequence[int] = (64, 512, 4096), steps: int = 4, ahead: int = 4) -> None:
    """P12: the same work per device, without failures, with them, and in lock-step."""
    console = Console(width=170)
    slots, per_slot = 2, 3
    table = Table("devices", "arm", "step, s", "sequences/s a device", "weak scaling (0.95)", "effective time (0.90)",
                  "failures", "virtual s a CPU s")  # fmt: skip
    first: dict[str, float] = {}
    for devices in sizes:
        guess = Workload(sequences=2048)
        rough = best_cluster(devices, guess, slots)
        load = replace(guess, sequences=per_slot * rough.rollout * slots // 4 * 4)
        best = best_cluster(devices, load, slots)
        healthy, total = 0.0, steps + 2 * (ahead + 1) + 1
        actors, share = best.rollout + best.teacher, best.learner / devices
        for name, arm, rate, learner in (
            ("no failures", Arm(name="ahead", ahead=ahead), 0.0, 0.0),
            ("one in 10 % of steps", Arm(name="ahead", ahead=ahead), 0.1 * (1 - share) / actors, 0.1 * share),
            ("10 % of actors once", Arm(name="ahead", ahead=ahead), 0.1 / total, 1 / total),
            ("every actor, 10 % of steps", Arm(name="ahead", ahead=ahead), 0.1, 0.1),
            ("lock-step, no failures", ARMS[0], 0.0, 0.0),
        ):
            faults = Faults(rate=rate, every_s=healthy or 1.0, restart_s=RESTART_S, learner=learner)
            made = run(best, load, arm, steps, faults, filling=ahead + 1)
            step_s = made.marks[-1].at / len(made.marks)  # of the whole run: a failure may hit any step
            healthy = healthy or step_s
            speed = load.sequences / step_s / devices
            first.setdefault(name, speed)
            row = (
                str(devices), name, f"{step_s:.1f}", f"{speed:.4f}", f"{speed / first[name]:.3f}",
                f"{healthy / step_s:.3f}" if rate else "", str(made.failures),
                f"{made.marks[-1].at / made.cpu_s:,.0f}",
            )  # fmt: skip
            console.print(" | ".join(row), highlight=False)
            table.add_row(*row)
            if rate and devices == min(sizes):
                again = run(best, load, arm, steps, faults, filling=ahead + 1)
                console.print(f"{name}, run again: {'bit-equal' if again.digest == made.digest else 'NOT EQUAL'}")
    console.print(table)


def main() -> None:
    """One of the three parts."""
    if len(sys.argv) < 2 or sys.argv[1] not in ("overlap", "loop", "cluster"):
        sys.exit(__doc__)
    part, rest = sys.argv[1], [int(a) for a in sys.argv[2:] if a.isdigit()]
    if part == "overlap":
        overlap(*rest)
    elif part == "loop":
        from benchmarks.loop_cost import loop_cost

        loop_cost(*rest, with_ray="ray" in sys.argv)
    else:
        cluster(rest or (64, 512, 4096))


if __name__ == "__main__":
    main()
