"""A simulated learner behind the real port: ranks that take as long as the roofline predicts, fail and restart.

What happens then is the real `launch.services.learner_restart`; only the ranks are stand-ins.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from benchmarks.simulated import Cluster, Workload
from benchmarks.stand_ins import RETRIES, Busy, Faults
from launch.services.learner_group import RanksLost
from launch.services.learner_restart import RankFactory, RestartingLearner
from launch.services.replicas import Fault
from opd import ports
from opd.observability import roofline
from opd.observability.roofline import UpdateCost
from opd.types import StepReport

CHECKPOINT_BYTES = 12  # of a parameter: float32 weight and two moments


async def _whole(_: Path) -> None:
    """Checkpoint without a file."""


@dataclass(slots=True)
class SimulatedLearner:
    """Timing of `cluster.learner` ranks, at the pace of the slowest; `learner` makes them."""

    cluster: Cluster
    load: Workload
    faults: Faults
    busy: Busy = field(default_factory=Busy)
    failures: int = 0
    done: int = 0  # steps of the run: what is done again is no progress
    saved: dict[str, int] = field(default_factory=dict)  # checkpoints: the steps in them
    layout: ports.Layout = field(init=False)
    _draw: Random = field(init=False)

    def __post_init__(self) -> None:
        longest = (self.load.prompt + self.load.most) // self.load.grain + 1
        self.layout = ports.Layout(ranks=self.cluster.learner, tokens_per_microbatch=2 * longest)
        self._draw = Random(self.load.seed + 3)

    @property
    def push_s(self) -> float:
        """Seconds until all engines have new weights."""
        kind = self.cluster.kind
        return roofline.push(roofline.dense_bytes(kind.student), kind.hardware, self.cluster.rollout, chunks=4096)

    @property
    def training(self) -> UpdateCost:
        """Ranks with recomputed activations."""
        return UpdateCost(ranks=self.cluster.learner, stage=2, recompute=True)

    def learner(self) -> Any:
        """An `opd.ports.Learner`, set up: with the real restart of lost ranks, unless their loss ends the run."""
        began: list[SimulatedRanks] = []

        def make() -> SimulatedRanks:
            began.append(SimulatedRanks(self, at=self.done, late=bool(began), layout=self.layout))
            return began[-1]

        if self.faults.resume:
            return make()
        return RestartingLearner(RankFactory(make=make, check=_whole), RETRIES.restarts, 1 << 60)

    def seconds(self, batches: Sequence[Sequence[Any]]) -> tuple[float, float]:
        """Seconds of a step, and the part of them that a rank computes on average."""
        loads = [self._flops(rank) for rank in batches]
        return self.computing_s(max(loads) * len(loads)), self.computing_s(sum(loads))

    async def maybe_die(self, seconds: float) -> None:
        """Fail at a random moment of a step that takes `seconds`, with the given probability."""
        if self._draw.random() >= self.faults.learner:
            return
        done, away = self._draw.random() * seconds, self.faults.notice_s + self.faults.restart_s
        self.failures += 1
        self.busy.lost += done * self.cluster.learner
        self.busy.down += away * self.cluster.learner
        await asyncio.sleep(done + self.faults.notice_s)
        raise RanksLost(Fault.DIED, "a learner rank died")

    def _flops(self, rank: Sequence[Any]) -> float:
        read = np.concatenate([np.diff(b.cu_seqlens) + 1.0 for b in rank]) * self.load.grain
        logits = float(sum(len(b) for b in rank) * self.load.grain)
        return self.cluster.kind.student.forward_flops(np.zeros_like(read), read, logits)

    def computing_s(self, flops: float) -> float:
        """Of so many operations of the forward pass, shared evenly by all ranks."""
        passes = roofline.TRAIN // roofline.FORWARD + self.training.recompute
        kind, ranks = self.cluster.kind, self.cluster.learner
        optimizer = roofline.ADAM_BYTES * kind.student.params / (ranks * kind.hardware.memory)
        return passes * flops / (ranks * kind.hardware.flops) + optimizer

    @property
    def copy_s(self) -> float:
        """Seconds until master weights and moments are in the hosts' memory, which is what a checkpoint waits for."""
        kind = self.cluster.kind
        return CHECKPOINT_BYTES * kind.student.params / (self.cluster.learner * kind.hardware.link)


@dataclass(slots=True)
class SimulatedRanks(ports.Learner):
    """Ranks that live and die together (`learner_restart.RankGroup`); `at` counts the steps in their weights."""

    site: SimulatedLearner
    at: int
    late: bool  # they take the place of others
    layout: ports.Layout

    async def setup(self) -> None:
        """Wait as long as a replacement takes; the first ranks are there."""
        await asyncio.sleep(self.site.faults.restart_s if self.late else 0.0)
        self.at = 0

    async def sleep(self) -> None:
        """Nothing: simulated roles have devices of their own."""

    async def wake(self) -> None:
        """Nothing, as `sleep`."""

    async def call(self, call: ports.Call[Any]) -> list[Any]:
        """Answer of rank 0 to one of the verbs that take time."""
        answers = {ports.Rank.step: self._step, ports.Rank.save: self._save, ports.Rank.load: self._load}
        return [await answers[call.verb](call)]

    async def _step(self, call: ports.Call[Any]) -> StepReport:
        """As long as the slowest rank takes; of what is done again nothing is progress."""
        assert call.scattered is not None
        batches: Sequence[Sequence[Any]] = call.scattered
        site, ranks = self.site, self.site.cluster.learner
        seconds, mean = site.seconds(batches)
        await site.maybe_die(seconds)
        await asyncio.sleep(seconds)
        self.at += 1
        if self.at > site.done:
            site.done = self.at
            site.busy.useful += mean * ranks
        else:
            site.busy.lost += seconds * ranks
        tokens = sum(len(b.input_ids) for rank in batches for b in rank)
        return StepReport(loss=1.0, grad_norm=1.0, lr=1.0, tokens=tokens, trained_tokens=tokens, metrics={})

    async def share(self, version: int) -> ports.PublishedWeights:
        """Announcement of weights without bytes, at no cost."""
        return _weights(version)

    async def publish(self, student: ports.StudentEngine, version: int) -> ports.PublishReport:
        """Push the weights, then make them live."""
        site = self.site
        await asyncio.sleep(site.push_s)
        site.busy.useful += site.push_s * site.cluster.learner
        await student.receive(_weights(version))
        nbytes = round(roofline.dense_bytes(site.cluster.kind.student))
        return ports.PublishReport(version=version, gap=0.0, nbytes=nbytes)

    async def _save(self, call: ports.Call[Any]) -> None:
        """UpdateCost waits for the copy; that it is on the disk at once is assumed."""
        await asyncio.sleep(self.site.copy_s)
        self.site.saved[str(call.arguments[0])] = self.at

    async def _load(self, call: ports.Call[Any]) -> int:
        """As long as the copy took, on the way back."""
        await asyncio.sleep(self.site.copy_s)
        self.site.busy.down += self.site.copy_s * self.site.cluster.learner
        self.at = self.site.saved[str(call.arguments[0])]
        return self.at

    async def settled(self) -> None:
        """Nothing to wait for: every call is awaited by its caller."""

    def end(self) -> None:
        """Nothing to end: they are gone already."""


def _weights(version: int) -> ports.PublishedWeights:
    nothing = np.zeros(0, dtype=np.float32)
    return ports.PublishedWeights(
        version=version,
        manifest=ports.Manifest(names=(), dtypes=(), shapes=(), nbytes=0),
        chunks=(),
        digest="",
        sentinel=ports.Sentinel(ids=np.zeros(1, dtype=np.int32), logprobs=nothing, tolerance=1.0),
    )
