"""Simulated engines behind the real ports: they wait as long as the limit model says, and answer.

The loop, the method, the ledger and the packing are the real ones. One simulated token stands for `grain` real ones.
An engine of the student writes in `slots`: a request holds one for its prefill and, per token, for the time of a decode
step of a full engine. A teacher reads a call at a time, the learner's ranks work until the last one is done.
"""

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from random import Random
from statistics import NormalDist
from typing import Any

import numpy as np

from opd import limits, ports
from opd.limits import Decoding, Hardware, Lengths, ModelShape, Training
from opd.seeds import sampling_seed
from opd.types import Prompt, StepReport, Stop, TokenScores

STUDENT = ModelShape(
    params=7_570_000_000, layers=36, width=4096, vocabulary=151_936, heads=32, kv_heads=8, head_dim=128
)
TEACHER = ModelShape(
    params=31_980_000_000, layers=64, width=5120, vocabulary=151_936, heads=64, kv_heads=8, head_dim=128
)
H200 = Hardware(flops=989e12, memory=4.8e12, link=50e9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is asked in a step: `sequences` in groups, with log-normal response lengths cut at `most` (real tokens)."""

    sequences: int
    group: int = 4
    prompt: int = 512
    median: float = 2500.0
    sigma: float = 1.0
    most: int = 32_768
    grain: int = 256
    seed: int = 0

    def response(self, prompt_id: str, sample: int) -> int:
        """Simulated tokens of a response: a function of what is asked, whoever writes it and however often."""
        share = (sampling_seed(self.seed, prompt_id, sample, 0) + 0.5) / 2**63
        real = self.median * math.exp(self.sigma * NormalDist().inv_cdf(share))
        return max(1, round(min(real, self.most) / self.grain))

    @property
    def mean(self) -> float:
        """The mean response in real tokens, of a large sample."""
        normal, cut = NormalDist(), math.log(self.most / self.median) / self.sigma
        kept = math.exp(self.sigma**2 / 2) * normal.cdf(cut - self.sigma)
        return self.median * kept + self.most * (1 - normal.cdf(cut))

    def lengths(self, step: int) -> Lengths:
        """The real tokens of a step (counted from 0)."""
        asked = [(f"{step}/{i}", s) for i in range(self.sequences // self.group) for s in range(self.group)]
        response = np.array([self.response(p, s) * self.grain for p, s in asked], dtype=np.int64)
        return Lengths(prompt=np.full(len(asked), self.prompt), response=response, group=self.group)


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Every actor loses what it is doing about `rate` times in `every_s` seconds, and is back after `restart_s`.

    The learner, whose ranks stop together, fails in a step with probability `learner`, does that part of the step again
    and takes as long to restart.
    """

    rate: float = 0.0
    every_s: float = 1.0
    restart_s: float = 0.0
    learner: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Devices of each role, and how many sequences an engine writes at once."""

    rollout: int
    teacher: int
    learner: int
    slots: int = 32

    @property
    def devices(self) -> int:
        """All of them."""
        return self.rollout + self.teacher + self.learner


@dataclass(slots=True)
class Busy:
    """Device-seconds of useful work, and of work that was lost."""

    useful: float = 0.0
    lost: float = 0.0


@dataclass(slots=True, eq=False)
class _Job:
    """One unit of work of a role, until it is done; `call` counts what its caller still waits for."""

    seconds: float
    call: "_Call"
    timer: asyncio.TimerHandle | None = None
    began: float = 0.0


@dataclass(slots=True)
class _Call:
    left: int
    done: asyncio.Future[None]


class Servers:
    """`count` actors that do `width` jobs at once each, first come, first served; they may fail."""

    def __init__(self, count: int, width: int, faults: Faults, seed: int) -> None:
        self.busy = Busy()
        self._count, self._width, self._faults = count, width, faults
        self._draw = Random(seed)
        self._age = [0] * count  # how often an actor has failed: a place given before that is gone
        self._free = deque((actor, 0) for _ in range(width) for actor in range(count))
        self._jobs: list[dict[_Job, None]] = [{} for _ in range(count)]
        self._waiting: deque[_Job] = deque()
        self.failures = 0
        self._armed = False

    async def work(self, seconds: Sequence[float]) -> None:
        """Have jobs of these lengths done; returns with the last."""
        loop = asyncio.get_running_loop()
        if not self._armed and self._faults.rate:
            self._armed = True
            for actor in range(self._count):
                self._arm(actor)
        call = _Call(left=len(seconds), done=loop.create_future())
        self._waiting.extend(_Job(seconds=s, call=call) for s in seconds)
        self._start()
        await call.done

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting and self._free:
            actor, age = self._free.popleft()
            if age != self._age[actor]:
                continue
            job = self._waiting.popleft()
            job.began = loop.time()
            job.timer = loop.call_later(job.seconds, self._finish, job, actor, age)
            self._jobs[actor][job] = None

    def _finish(self, job: _Job, actor: int, age: int) -> None:
        del self._jobs[actor][job]
        self.busy.useful += job.seconds / self._width
        self._free.append((actor, age))
        job.call.left -= 1
        if not job.call.left and not job.call.done.done():
            job.call.done.set_result(None)
        self._start()

    def _arm(self, actor: int) -> None:
        wait = self._draw.expovariate(self._faults.rate / self._faults.every_s)
        asyncio.get_running_loop().call_later(wait, self._fail, actor)

    def _fail(self, actor: int) -> None:
        loop = asyncio.get_running_loop()
        self.failures += 1
        self._age[actor] += 1
        for job in reversed(self._jobs[actor]):
            assert job.timer is not None
            job.timer.cancel()
            self.busy.lost += (loop.time() - job.began) / self._width
            self._waiting.appendleft(job)  # what was begun first goes on first
        self._jobs[actor].clear()
        loop.call_later(self._faults.restart_s, self._restart, actor)
        self._start()

    def _restart(self, actor: int) -> None:
        self._free.extend([(actor, self._age[actor])] * self._width)
        self._arm(actor)
        self._start()


@cache
def _said(n: int, value: float) -> TokenScores:
    """Testimony that is always the same: nobody looks at it."""
    return TokenScores(logprobs=np.full(n, value, dtype=np.float32))


class SimulatedStudent:
    """A pool of engines (`opd.ports.StudentEngine`); new weights go live without a pause, in text in flight too."""

    def __init__(self, cluster: Cluster, load: Workload, faults: Faults) -> None:
        full = Lengths(
            prompt=np.full(cluster.slots, load.prompt), response=np.full(cluster.slots, round(load.mean)), group=1
        )
        floor = limits.rollout(STUDENT, full, H200, Decoding(slots=cluster.slots))
        # Reading a prompt holds up all slots of an engine, so it costs each of them what it costs the engine.
        self.prefill_s = floor.prefill / load.group
        self.token_s = max(floor.memory, floor.compute) / load.mean * load.grain  # of a simulated token
        self.servers = Servers(cluster.rollout, cluster.slots, faults, seed=load.seed + 1)
        self._load = load
        self._lived: list[tuple[float, int]] = []  # since when which version is live

    async def generate(self, requests: Sequence[ports.GenerateRequest]) -> list[ports.Completion]:
        """Every request takes a slot; the answer comes with the last of them."""
        lengths = [self._load.response(r.prompt_id, r.sample) for r in requests]
        began = len(self._lived) - 1
        await self.servers.work([self.seconds(n) for n in lengths])
        return [self._completion(n, began) for n in lengths]

    def seconds(self, tokens: int) -> float:
        """How long a response holds its slot."""
        return self.prefill_s + tokens * self.token_s

    async def receive(self, weights: ports.Weights) -> ports.Receipt:
        """Live at once."""
        self._lived.append((asyncio.get_running_loop().time(), weights.version))
        return ports.Receipt(version=weights.version, digest=weights.digest, gap=0.0)

    def _completion(self, tokens: int, began: int) -> ports.Completion:
        """The last token is written now; those before it a token's time apart, each by the version then live."""
        version = self._lived[-1][1]
        versions = np.full(tokens, version, dtype=np.int32)
        if began < len(self._lived) - 1:
            written = asyncio.get_running_loop().time() - self.token_s * np.arange(tokens)[::-1]
            since = np.array([at for at, _ in self._lived[began:]])
            at = np.maximum(np.searchsorted(since, written, side="right") - 1, 0)
            versions = np.array([v for _, v in self._lived[began:]], dtype=np.int32)[at]
        ids = np.zeros(tokens, dtype=np.int32)
        return ports.Completion(token_ids=ids, behavior=_said(tokens, -1.0), versions=versions, stop=Stop.END)


class SimulatedTeacher:
    """A pool of scoring actors (`opd.ports.LogprobTeacher`). `whole` > 0 reads nothing before so many sequences are
    there: lock-step."""

    def __init__(self, cluster: Cluster, load: Workload, faults: Faults, whole: int = 0) -> None:
        self.servers = Servers(cluster.teacher, 1, faults, seed=load.seed + 2)
        self._load, self._whole = load, whole
        self._arrived, self._gate = 0, asyncio.Event()

    async def score(self, requests: Sequence[ports.ScoreRequest]) -> list[TokenScores]:
        """Read a call at a time."""
        await self._wait_for_all(len(requests))
        response = np.array([len(r.token_ids) * self._load.grain for r in requests], dtype=np.int64)
        await self.servers.work([self.seconds(response)])
        return [_said(len(r.token_ids), -0.5) for r in requests]

    def seconds(self, response: np.ndarray) -> float:
        """How long one actor reads sequences of these responses."""
        prompt = np.full(len(response), self._load.prompt)
        return limits.teacher(TEACHER, Lengths(prompt=prompt, response=response), H200)

    async def _wait_for_all(self, count: int) -> None:
        if not self._whole:
            return
        gate, self._arrived = self._gate, self._arrived + count
        if self._arrived >= self._whole:
            self._gate, self._arrived = asyncio.Event(), self._arrived - self._whole
            gate.set()
        await gate.wait()


@dataclass(slots=True)
class SimulatedLearner:
    """`cluster.learner` ranks that wait for the slowest, and push their weights (`opd.ports.Learner`)."""

    cluster: Cluster
    load: Workload
    faults: Faults
    busy: Busy = field(default_factory=Busy)
    failures: int = 0
    layout: ports.Layout = field(init=False)
    _draw: Random = field(init=False)

    def __post_init__(self) -> None:
        longest = (self.load.prompt + self.load.most) // self.load.grain + 1
        self.layout = ports.Layout(ranks=self.cluster.learner, tokens_per_microbatch=2 * longest)
        self._draw = Random(self.load.seed + 3)

    @property
    def push_s(self) -> float:
        """Seconds until all engines have new weights."""
        return limits.push(limits.dense_bytes(STUDENT), H200, self.cluster.rollout, chunks=4096)

    @property
    def training(self) -> Training:
        """Ranks with recomputed activations."""
        return Training(ranks=self.cluster.learner, stage=2, recompute=True)

    async def step(self, batches: Sequence[Sequence[Any]], objective: Any) -> StepReport:
        """As long as the slowest rank takes; a failure repeats what was done."""
        loads = [self._flops(rank) for rank in batches]
        total = sum(loads)
        seconds = self.computing_s(max(loads) * len(loads))
        self.busy.useful += self.computing_s(total) * self.cluster.learner
        lost = 0.0
        if self._draw.random() < self.faults.learner:
            self.failures += 1
            lost = self._draw.random() * seconds + self.faults.restart_s
            self.busy.lost += lost * self.cluster.learner
        await asyncio.sleep(seconds + lost)
        tokens = sum(len(b.input_ids) for rank in batches for b in rank)
        return StepReport(loss=1.0, grad_norm=1.0, lr=1.0, tokens=tokens, trained_tokens=tokens, metrics={})

    def _flops(self, rank: Sequence[Any]) -> float:
        read = np.concatenate([np.diff(b.cu_seqlens) + 1.0 for b in rank]) * self.load.grain
        logits = float(sum(len(b) for b in rank) * self.load.grain)
        return STUDENT.forward_flops(np.zeros_like(read), read, logits)

    def computing_s(self, flops: float) -> float:
        """Of so many operations of the forward pass, shared evenly by all ranks."""
        passes = limits.TRAIN // limits.FORWARD + self.training.recompute
        optimizer = limits.ADAM_BYTES * STUDENT.params / (self.cluster.learner * H200.memory)
        return passes * flops / (self.cluster.learner * H200.flops) + optimizer

    async def publish(self, student: ports.StudentEngine, version: int) -> ports.PublishReport:
        """Push, then live."""
        await asyncio.sleep(self.push_s)
        self.busy.useful += self.push_s * self.cluster.learner
        await student.receive(_weights(version))
        nbytes = round(limits.dense_bytes(STUDENT))
        return ports.PublishReport(version=version, gap=0.0, nbytes=nbytes)


def _weights(version: int) -> ports.Weights:
    nothing = np.zeros(0, dtype=np.float32)
    return ports.Weights(
        version=version,
        manifest=ports.Manifest(names=(), dtypes=(), shapes=(), nbytes=0),
        chunks=(),
        digest="",
        sentinel=ports.Sentinel(ids=np.zeros(1, dtype=np.int32), logprobs=nothing, tolerance=1.0),
    )


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
