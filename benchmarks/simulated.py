"""Simulated engines behind the real ports: they wait as long as the roofline predicts, and answer.

The loop, the method, the ledger, the packing and the pools with their supervision are the real ones; actors are
stand-ins (`stand_ins.py`). One simulated token stands for `grain` real ones. An engine of the student writes in
`slots`: a request holds one for its prefill and, per token, for the time of a decode step of a full engine. A teacher
reads a call at a time. The learner is in `simulated_learner.py`.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from statistics import NormalDist
from typing import Any

import numpy as np

from actors.engine import SMALLEST_PART
from benchmarks.stand_ins import RETRIES, Crew, Faults, Worker, actor, end
from launch.services.pools import StudentPool, TeacherPool
from opd import ports
from opd.observability import roofline
from opd.observability.roofline import Decoding, Hardware, Lengths, ModelShape
from opd.rollouts.seeds import sampling_seed
from opd.types import Prompt, StopReason, TokenScores

STUDENT = ModelShape(
    params=7_570_000_000, layers=36, width=4096, vocabulary=151_936, heads=32, kv_heads=8, head_dim=128
)
TEACHER = ModelShape(
    params=31_980_000_000, layers=64, width=5120, vocabulary=151_936, heads=64, kv_heads=8, head_dim=128
)
H200 = Hardware(flops=989e12, memory=4.8e12, link=50e9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Kind of an actor: a device or several that work as one, and the models on them."""

    devices: int
    student: ModelShape
    teacher: ModelShape
    hardware: Hardware


DEVICE = Kind(devices=1, student=STUDENT, teacher=TEACHER, hardware=H200)
NODE = Kind(
    devices=8,
    student=ModelShape(
        params=71_460_000_000, layers=80, width=8192, vocabulary=152_064, heads=64, kv_heads=8, head_dim=128
    ),
    teacher=ModelShape(
        params=403_750_000_000, layers=126, width=16_384, vocabulary=128_256, heads=128, kv_heads=8, head_dim=128
    ),
    hardware=Hardware(flops=8 * H200.flops, memory=8 * H200.memory, link=8 * H200.link),
)


_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Work of a step: `sequences` in groups, with log-normal response lengths cut at `most` (real tokens)."""

    sequences: int
    group: int = 4
    prompt: int = 512
    median: float = 2500.0
    sigma: float = 1.0
    most: int = 32_768
    grain: int = 256
    seed: int = 0

    def response(self, prompt_id: str, sample: int) -> int:
        """Simulated tokens of a response: a function of the request alone."""
        share = (sampling_seed(self.seed, prompt_id, sample, 0) + 0.5) / 2**63
        real = self.median * math.exp(self.sigma * _NORMAL.inv_cdf(share))
        return max(1, round(min(real, self.most) / self.grain))

    @property
    def mean(self) -> float:
        """The mean response in real tokens, of a large sample."""
        normal, cut = _NORMAL, math.log(self.most / self.median) / self.sigma
        kept = math.exp(self.sigma**2 / 2) * normal.cdf(cut - self.sigma)
        return self.median * kept + self.most * (1 - normal.cdf(cut))

    def lengths(self, step: int) -> Lengths:
        """The real tokens of a step (counted from 0)."""
        copies = [(f"{step}/{i}", s) for i in range(self.sequences // self.group) for s in range(self.group)]
        response = np.array([self.response(p, s) * self.grain for p, s in copies], dtype=np.int64)
        return Lengths(prompt=np.full(len(copies), self.prompt), response=response, group=self.group)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Actors (or ranks) of each role, of one kind, and the number of sequences an engine generates at once."""

    rollout: int
    teacher: int
    learner: int
    slots: int = 32
    kind: Kind = DEVICE

    @property
    def actors(self) -> int:
        """All of them."""
        return self.rollout + self.teacher + self.learner

    @property
    def devices(self) -> int:
        """All of them."""
        return self.actors * self.kind.devices


@cache
def _said(n: int, value: float) -> TokenScores:
    """Constant scores: they are never looked at."""
    return TokenScores(logprobs=np.full(n, value, dtype=np.float32))


class SimulatedStudent:
    """Engines behind the real pool (`opd.ports.StudentEngine`); new weights go live without a pause, in text in flight
    too.
    """

    def __init__(self, cluster: Cluster, load: Workload, faults: Faults) -> None:
        kind = cluster.kind
        full = Lengths(
            prompt=np.full(cluster.slots, load.prompt), response=np.full(cluster.slots, round(load.mean)), group=1
        )
        floor = roofline.rollout(kind.student, full, kind.hardware, Decoding(slots=cluster.slots))
        # Reading a prompt holds up all slots of an engine, so it costs each of them what it costs the engine.
        self.prefill_s = floor.prefill / load.group
        self.token_s = max(floor.memory, floor.compute) / load.mean * load.grain  # of a simulated token
        self.crew = Crew(cluster.slots, faults, seed=load.seed + 1)
        self._count, self._load = cluster.rollout, load

    async def start(self) -> None:
        """All engines, anew."""
        self.pool = StudentPool(RETRIES, self._make, end)
        await self.pool.replicas.start(self._count)

    async def stop(self) -> None:
        """All engines."""
        await self.pool.replicas.close()
        self.crew.close()

    def _make(self) -> Any:
        worker = self.crew.make()
        return actor(worker, self._all_seconds, self._written, _part, partial(self._take, worker))

    async def generate(self, requests: Sequence[ports.GenerateRequest]) -> list[ports.Completion]:
        """Through the pool."""
        return await self.pool.generate(requests)

    async def receive(self, weights: ports.PublishedWeights) -> ports.WeightAck:
        """Through the pool."""
        return await self.pool.receive(weights)

    def seconds(self, tokens: int) -> float:
        """Seconds for which a response holds its slot."""
        return self.prefill_s + tokens * self.token_s

    def _all_seconds(self, requests: Sequence[ports.GenerateRequest]) -> list[float]:
        return [self.seconds(self._load.response(r.prompt_id, r.sample)) for r in requests]

    async def _take(self, worker: Worker, weights: ports.PublishedWeights) -> ports.WeightAck:
        """Make a version live at once."""
        worker.lived.append((asyncio.get_running_loop().time(), weights.version))
        return ports.WeightAck(version=weights.version, digest=weights.digest, gap=0.0)

    def _written(
        self, worker: Worker, requests: Sequence[ports.GenerateRequest], done: Sequence[int]
    ) -> list[ports.Completion]:
        now = asyncio.get_running_loop().time()
        lengths = [self._load.response(requests[i].prompt_id, requests[i].sample) for i in done]
        return [self._completion(n, now, worker.lived) for n in lengths]

    def _completion(self, tokens: int, ended: float, lived: Sequence[tuple[float, int]]) -> ports.Completion:
        """Completion whose last token was generated when it `ended`; those before it a token's time apart, each by the
        version then live.
        """
        first = next(i for i in range(len(lived) - 1, -1, -1) if not i or lived[i][0] <= ended - tokens * self.token_s)
        versions = np.full(tokens, lived[-1][1], dtype=np.int32)
        if first < len(lived) - 1:
            written = ended - self.token_s * np.arange(tokens)[::-1]
            at = np.searchsorted(np.array([at for at, _ in lived[first:]]), written, side="right") - 1
            versions = np.array([v for _, v in lived[first:]], dtype=np.int32)[np.maximum(at, 0)]
        ids = np.zeros(tokens, dtype=np.int32)
        return ports.Completion(token_ids=ids, behavior=_said(tokens, -1.0), versions=versions, stop=StopReason.END)


class SimulatedTeacher:
    """Scoring actors behind the real pool (`opd.ports.LogprobTeacher`), which read a call at a time. `whole` > 0 reads
    nothing before so many sequences are there: lock-step."""

    def __init__(self, cluster: Cluster, load: Workload, faults: Faults, whole: int = 0) -> None:
        self.crew = Crew(1, faults, seed=load.seed + 2)
        self._count, self._kind, self._load, self._whole = cluster.teacher, cluster.kind, load, whole
        self._arrived, self._gate = 0, asyncio.Event()

    async def start(self) -> None:
        """All actors, anew."""
        self.pool = TeacherPool(RETRIES, self._make, end)
        await self.pool.replicas.start(self._count)
        self._arrived, self._gate = 0, asyncio.Event()

    async def stop(self) -> None:
        """All actors."""
        await self.pool.replicas.close()
        self.crew.close()

    def _make(self) -> Any:
        return actor(self.crew.make(), self._call_seconds, self._heard, _part, _nothing)

    async def score(self, requests: Sequence[ports.ScoreRequest]) -> list[ports.ScoreAnswer]:
        """Score through the pool, when it is time."""
        await self._wait_for_all(len(requests))
        return await self.pool.score(requests)

    def seconds(self, response: np.ndarray) -> float:
        """Seconds of one actor to read sequences of these responses."""
        prompt = np.full(len(response), self._load.prompt)
        return roofline.teacher(self._kind.teacher, Lengths(prompt=prompt, response=response), self._kind.hardware)

    def _call_seconds(self, requests: Sequence[ports.ScoreRequest]) -> list[float]:
        return [self.seconds(np.array([len(r.token_ids) * self._load.grain for r in requests], dtype=np.int64))]

    def _heard(
        self,
        worker: Worker,
        requests: Sequence[ports.ScoreRequest],
        done: Sequence[int],
    ) -> list[ports.ScoreAnswer]:
        return [(_said(len(requests[i].token_ids), -0.5),) for i in done]

    async def _wait_for_all(self, count: int) -> None:
        if not self._whole:
            return
        gate, self._arrived = self._gate, self._arrived + count
        if self._arrived >= self._whole:
            self._gate, self._arrived = asyncio.Event(), self._arrived - self._whole
            gate.set()
        await gate.wait()


def _part(requests: int) -> int:
    """Parts of an engine's answer (`actors.engine`)."""
    return max(SMALLEST_PART, requests // 8)


async def _nothing(_: Any) -> None:
    """Ignore weights: a teacher takes none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """`sequences` prompts a step in groups (`opd.ports.PromptSource`)."""

    load: Workload

    @property
    def group_size(self) -> int:
        """Samples of a prompt."""
        return self.load.group

    def __call__(self, step: int, sources: ports.Sources) -> list[Prompt]:
        ids = np.zeros(self.load.prompt // self.load.grain, dtype=np.int32)
        prompts = [
            Prompt(id=f"{step}/{i}", student_ids=ids, teacher_ids=ids)
            for i in range(self.load.sequences // self.load.group)
        ]
        return [prompt for prompt in prompts for _ in range(self.load.group)]
