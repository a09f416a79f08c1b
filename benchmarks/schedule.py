"""The real loop in virtual time: overlap of schedules (P6), and the runs of a simulated cluster (P12).

The real loop, ledger, packing and pools on simulated H200s (`simulated.py`), with response lengths that are
log-normal. Every figure has its target beside it; `scale.py` is the command.
"""

import asyncio
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.simulated import (
    DEVICE,
    Cluster,
    Kind,
    Prompts,
    SimulatedStudent,
    SimulatedTeacher,
    Workload,
)
from benchmarks.simulated_learner import SimulatedLearner
from benchmarks.stand_ins import Busy, Faults
from benchmarks.virtual_time import simulate
from launch.services.learner_group import RanksLost
from opd import ports
from opd.loop.ledger import Ledger
from opd.loop.staleness import StalenessSchedule
from opd.loop.train import StepRecord, train
from opd.method.method import Method
from opd.objectives.sampled import SampledReverseKL
from opd.observability import roofline
from opd.observability.roofline import Floors
from opd.observability.spans import Stage
from opd.observability.utilization import STAFFED, UtilizationLog
from opd.rollouts.student import StudentRollout
from opd.scorers.teacher import SampledTokens

HORIZON_S = 1e8  # virtual seconds after which a run counts as hung


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A schedule: how far rollouts run ahead, and whether the teacher waits for the whole step."""

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
    """State at the end of a step: the time, and useful actor-seconds of the roles of `STAFFED`."""

    at: float
    busy: tuple[float, float, float]


@dataclass(slots=True)
class Run:
    """Records of a simulated run at every step."""

    cluster: Cluster
    filling: int  # steps at either end that are not measured
    marks: list[Mark] = field(default_factory=list)
    usage: UtilizationLog = field(default_factory=lambda: UtilizationLog(0))
    busy: tuple[Busy, ...] = ()  # of the roles of `STAFFED`, over the whole run
    digest: str = ""
    staleness: int = 0
    failures: int = 0
    resumed: int = 0
    cpu_s: float = 0.0

    @property
    def counts(self) -> tuple[int, int, int]:
        """Actors of the roles of `STAFFED`."""
        return self.cluster.rollout, self.cluster.teacher, self.cluster.learner

    def steady(self) -> tuple[Mark, Mark, int]:
        """First and last mark of the steps between filling and draining the pipeline, and how many they are."""
        first, last = self.filling, len(self.marks) - 1 - self.filling
        return self.marks[first], self.marks[last], last - first

    @property
    def step_s(self) -> float:
        """Mean seconds of a steady step."""
        first, last, count = self.steady()
        return (last.at - first.at) / count

    @property
    def all_s(self) -> float:
        """Seconds of the whole run."""
        return self.marks[-1].at

    @property
    def alone_s(self) -> tuple[float, ...]:
        """Seconds a step that each role needs for its work, if it never waits."""
        first, last, count = self.steady()
        return tuple((b - a) / count / n for a, b, n in zip(first.busy, last.busy, self.counts, strict=True))

    @property
    def eta(self) -> float:
        """Overlap efficiency: the slowest role alone, over the step."""
        return max(self.alone_s) / self.step_s

    @property
    def bubble(self) -> float:
        """`1 - sum busy device-seconds / sum device-seconds`."""
        useful = sum(n * alone for n, alone in zip(self.counts, self.alone_s, strict=True))
        return 1 - useful / (self.cluster.actors * self.step_s)


@dataclass
class _Player:
    """A run in virtual time: if it ends when the learner fails, it is resumed until all steps are done."""

    made: Run
    load: Workload
    arm: Arm
    steps: int
    faults: Faults
    checkpoint_every: int
    saved: tuple[int, str] = field(default_factory=lambda: (0, Ledger().to_json()))
    digest: Any = field(default_factory=hashlib.sha256)

    async def play(self) -> None:
        cluster, load = self.made.cluster, self.load
        self.student = SimulatedStudent(cluster, load, self.faults)
        self.teacher = SimulatedTeacher(cluster, load, self.faults, whole=load.sequences if self.arm.whole else 0)
        self.learner = SimulatedLearner(cluster, load, self.faults)
        self.made.busy = self.student.crew.busy, self.teacher.crew.busy, self.learner.busy
        while self.saved[0] < self.steps:
            try:
                await self._session()
            except* RanksLost:
                await self._fall_back()

    async def _session(self) -> None:
        first, ledger = self.saved[0], Ledger.from_json(self.saved[1])
        ledger.reopen()
        await asyncio.gather(self.student.start(), self.teacher.start())

        learner, restarting = self.learner.learner(), not self.faults.resume

        async def checkpoint(record: StepRecord) -> None:
            last = record.step == self.steps
            if not last and self.checkpoint_every and record.step % self.checkpoint_every == 0:
                folder = Path(f"step_{record.step}")
                await learner.save(folder, record.step)
                if restarting:
                    await learner.kept(folder)
                self.saved = record.step, ledger.to_json()
            elif last:
                self.saved = record.step, ledger.to_json()

        engines = ports.Engines(
            student=self.student, teachers={"default": self.teacher}, writers={}, graders={}, tokenizer=NO_VERSION
        )
        try:
            await go(
                self.load, engines, learner, [self._observe, checkpoint], first, self.steps, self.arm.ahead, ledger
            )
        finally:
            await self.student.stop()
            await self.teacher.stop()

    async def _fall_back(self) -> None:
        """Discard everything after the checkpoint; while the run restarted, no role worked."""
        self.learner.done = self.saved[0]
        await asyncio.sleep(self.faults.restart_s)
        away = self.faults.notice_s + self.faults.restart_s
        self.made.resumed += 1
        del self.made.marks[self.saved[0] :]
        for crew, count in ((self.student.crew, self.made.counts[0]), (self.teacher.crew, self.made.counts[1])):
            crew.busy.down += away * count

    async def _observe(self, record: StepRecord) -> None:
        made, end = self.made, max(span.end for span in record.spans)
        made.usage.add(end - record.seconds["step"], end, record.spans)
        rollout, teacher, learner = made.busy
        made.marks.append(Mark(at=end, busy=(rollout.useful, teacher.useful, learner.useful)))
        made.failures = self.student.crew.failures + self.teacher.crew.failures + self.learner.failures
        oldest = min(int(item.trajectory.versions.min()) for item in record.scored)
        made.staleness = max(made.staleness, record.step - 1 - oldest)
        names = [(s.trajectory.prompt.id, s.trajectory.sample, len(s.trajectory)) for s in record.scored]
        times = [(span.role.value, span.start.hex(), span.end.hex()) for span in record.spans]
        versions = b"".join(item.trajectory.versions.tobytes() for item in record.scored)
        self.digest.update(repr((record.step, record.ledger, names, times)).encode() + versions)


def run(
    cluster: Cluster, load: Workload, arm: Arm, steps: int, faults: Faults | None = None, filling: int = 9,
    checkpoint_every: int = 0,
) -> Run:  # fmt: skip
    """Simulate `steps` steps and, at either end, as many more as the pipeline takes to fill and to drain."""
    began = time.process_time()
    made = Run(cluster=cluster, filling=filling, usage=UtilizationLog(arm.ahead))
    player = _Player(made, load, arm, steps + 2 * filling + 1, faults or Faults(), checkpoint_every)
    simulate(player.play(), HORIZON_S)
    made.digest, made.cpu_s = player.digest.hexdigest(), time.process_time() - began
    return made


NO_VERSION: Any = None  # nothing here reads text
SOURCES = ports.Sources(tokenizer=NO_VERSION, rows=lambda path, columns: ())  # noqa: ARG005


async def go(
    load: Workload, engines: ports.Engines, learner: Any, observers: Sequence[Any], start: int, steps: int, ahead: int,
    ledger: Ledger,
) -> None:  # fmt: skip
    """Run the real loop with the simplest method that uses a teacher."""
    slots: dict[str, Any] = {  # a class variable fills a property of a protocol, which the checker does not follow
        "rollout": StudentRollout(max_tokens=load.most), "scorer": SampledTokens(), "objective": SampledReverseKL(),
    }  # fmt: skip
    method = Method(name="simulated", **slots)
    await train(
        method,
        Prompts(load=load),
        SOURCES,
        engines,
        learner,
        observers,
        start=start,
        steps=steps,
        schedule=StalenessSchedule(max_staleness=ahead, deterministic=False),
        ledger=ledger,
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
        trained = cluster.kind.student.forward_flops(
            np.zeros_like(lengths.p), lengths.p + lengths.r, float(lengths.r.sum())
        )
        parts.append((work, max(work, float(slot_s.max())), read, learner.computing_s(trained)))
    work, longest, read, learned = np.mean(parts, axis=0)
    return Floors(rollout=float(longest), teacher=float(read), learner=float(learned), push=learner.push_s), float(work)


def best_cluster(actors: int, load: Workload, slots: int, kind: Kind = DEVICE) -> Cluster:
    """The split of so many actors with the fastest overlapped step; the learner's part includes its push."""
    even = Cluster(rollout=actors, teacher=actors, learner=actors, slots=slots, kind=kind)
    least, work = floors(even, load, 4)
    optimizer = roofline.ADAM_BYTES * kind.student.params / (actors * kind.hardware.memory)
    parts = [work, least.teacher, least.learner - optimizer]
    rollout, teacher, learner = roofline.best_split([actors * part for part in parts], actors)
    return Cluster(rollout=rollout, teacher=teacher, learner=learner, slots=slots, kind=kind)


def overlap(devices: int = 32, steps: int = 24, filling: int = 9) -> None:
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
        parts = [
            f"\n{devices} H200: {cluster.rollout} rollout x {slots} slots, {cluster.teacher} teacher",
            f"{cluster.learner} learner; {load.sequences} sequences a step, median {load.median:g}, sigma {sigma}",
            f"mean {load.mean:.0f}, cut at {load.most}; roofline: rollout {work:.0f} s (longest {least.rollout:.0f})",
            f"teacher {least.teacher:.0f}, learner {least.learner:.0f}, push {least.push:.2f}",
            f"lock-step {least.lock_step:.0f}, overlapped {overlapped:.0f}: at most {bound:.2f}x",
        ]
        console.print(", ".join(parts), soft_wrap=True, highlight=False)
        table = Table("arm", "step, s", "faster than lock-step", "of the bound (0.95)", "eta (0.95)", "bubble (5 %)",
                      "bubble from spans", "oldest token", "virtual s a CPU s")  # fmt: skip
        lock = 0.0
        for arm in ARMS:
            made = run(cluster, load, arm, steps, filling=filling)
            step_s = made.step_s
            lock = lock or step_s
            counts: dict[Stage, int] = dict(zip(STAFFED, made.counts, strict=True))
            table.add_row(
                arm.name, f"{step_s:.1f}", f"{lock / step_s:.2f}x", f"{lock / step_s / bound:.3f}",
                f"{made.eta:.3f}", f"{made.bubble:.1%}",
                f"{made.usage.whole().bubble(counts):.1%}", str(made.staleness),
                f"{made.marks[-1].at / made.cpu_s:,.0f}",
            )  # fmt: skip
        console.print(table)
