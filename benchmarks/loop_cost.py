"""P10: cost of the loop itself per sample, from 8 to 1,024 actors, in processor time.

Engines are pools (`launch.services.dispatch.Dispatcher`) of stubs that answer at once, half of them rollout actors, a
quarter each teachers and learner ranks; ledger, weighing and packing are the real ones. Responses are short, so what is
counted is work per sample, not per token. Arms are run in turn, several times; the figure is the median.
"""

import asyncio
import gc
import math
import time
from collections.abc import AsyncGenerator, Sequence
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.schedule import go
from benchmarks.simulated import Workload
from launch.config.retry_policy import RetryPolicy
from launch.services.dispatch import Dispatcher
from launch.services.replicas import Replicas
from opd import ports
from opd.loop.ledger import Ledger
from opd.rollouts.validation import validate_completions
from opd.scorers.validation import validate_scores
from opd.types import StepReport, StopReason, TokenScores

ACTORS = (8, 32, 128, 512, 1024)
ROUNDS, STEPS, AHEAD = 5, 4, 1
TOKENS = 4
SAID = TokenScores(logprobs=np.full(TOKENS, -1.0, dtype=np.float32))


def _pool(service: str, count: int, answer: Any, check: Any) -> Dispatcher[Any, Any]:
    async def nothing(_: Any) -> None:
        pass

    async def ask(_: Any, requests: list[Any]) -> AsyncGenerator[Any]:
        yield range(len(requests)), await answer(requests)

    replicas = Replicas(
        service=service, retry=RetryPolicy(deadline_s=600.0), ready=nothing, warm_up=nothing, end=lambda _: None
    )
    replicas.adopt([None] * count)
    return Dispatcher(replicas=replicas, ask=ask, check=check, lost=lambda _: False)


class StubEngines:
    """Student and teacher: pools whose actors answer at once."""

    def __init__(self, rollout: int, teacher: int) -> None:
        self.version, self.calls = 0, 0
        self._write = _pool("rollout actor", rollout, self._written, validate_completions)
        self._read = _pool("teacher actor", teacher, self._heard, validate_scores)

    async def _written(self, requests: list[ports.GenerateRequest]) -> list[ports.Completion]:
        self.calls += 1
        await asyncio.sleep(0)
        ids, versions = np.zeros(TOKENS, dtype=np.int32), np.full(TOKENS, self.version, dtype=np.int32)
        return [
            ports.Completion(token_ids=ids, behavior=SAID, versions=versions, stop=StopReason.END) for _ in requests
        ]

    async def _heard(self, requests: list[ports.ScoreRequest]) -> list[ports.ScoreAnswer]:
        self.calls += 1
        await asyncio.sleep(0)
        return [(SAID,)] * len(requests)

    async def generate(self, requests: Sequence[ports.GenerateRequest]) -> list[ports.Completion]:
        """Through the pool."""
        return await self._write(requests)

    async def score(self, requests: Sequence[ports.ScoreRequest]) -> list[ports.ScoreAnswer]:
        """Through the pool."""
        return await self._read(requests)

    async def receive(self, weights: ports.PublishedWeights) -> ports.WeightAck:
        """Nothing to load."""
        return ports.WeightAck(version=weights.version, digest=weights.digest, gap=0.0)


class StubLearner:
    """Learner stub that takes its batches and does nothing with them."""

    def __init__(self, ranks: int, tokens: int) -> None:
        self.layout = ports.Layout(ranks=ranks, tokens_per_microbatch=max(64, 2 * tokens // ranks))

    async def step(self, batches: Sequence[Sequence[Any]], objective: Any) -> StepReport:
        """No work."""
        return StepReport(loss=1.0, grad_norm=1.0, lr=1.0, tokens=1, trained_tokens=1, metrics={})

    async def publish(self, student: Any, version: int) -> ports.PublishReport:
        """No bytes."""
        student.version = version
        return ports.PublishReport(version=version, gap=0.0, nbytes=0)


def spent(actors: int, load: Workload) -> tuple[float, float]:
    """CPU-seconds and actor calls per sample, with this many actors."""
    student = StubEngines(actors // 2, actors // 4)
    inputs = load.sequences * (load.prompt // load.grain + TOKENS)
    no_tokenizer: Any = None
    engines = ports.Engines(
        student=student, teachers={"default": student}, writers={}, graders={}, tokenizer=no_tokenizer
    )

    async def observe(record: Any) -> None:
        pass

    gc.collect()
    began = time.process_time()
    asyncio.run(go(load, engines, StubLearner(actors // 4, inputs), [observe], 0, STEPS, AHEAD, Ledger()))
    samples = load.sequences * STEPS
    return (time.process_time() - began) / samples, student.calls / samples


def ray_call_s() -> float:
    """Seconds of an empty call of a Ray actor on this machine now: the unit."""
    from launch.config.settings import ClusterConfig
    from launch.services.ray_session.cluster import connected

    with connected(ClusterConfig()):
        import ray

        class Nothing:
            def call(self) -> int:
                return 0

        actor: Any = ray.remote(Nothing).options(num_cpus=0).remote()
        ray.get(actor.call.remote())
        seconds = []
        for _ in range(300):
            began = time.perf_counter()
            ray.get(actor.call.remote())
            seconds.append(time.perf_counter() - began)
    return median(seconds)


def loop_cost(samples: int = 1024, *, with_ray: bool = False) -> None:
    """The table, and the slope of cost in actors."""
    load = Workload(sequences=samples, group=4, prompt=512, most=TOKENS * 256)
    spent(8, load)  # imports and first calls
    gc.freeze()  # as a run does when everything has started
    try:
        rounds = [[spent(actors, load) for actors in ACTORS] for _ in range(ROUNDS)]
    finally:
        gc.unfreeze()
    cost = [median(done[i][0] for done in rounds) for i in range(len(ACTORS))]
    unit = ray_call_s() if with_ray else math.nan
    table = Table("actors", "CPU us a sample", "spread", "of 8 actors", "Ray calls' worth (0.1)", "calls a sample")
    for i, actors in enumerate(ACTORS):
        seen = [done[i][0] for done in rounds]
        table.add_row(
            str(actors), f"{cost[i] * 1e6:.1f}", f"{min(seen) * 1e6:.1f} to {max(seen) * 1e6:.1f}",
            f"{cost[i] / cost[0]:.2f}", f"{cost[i] / unit:.3f}", f"{rounds[0][i][1]:.3f}",
        )  # fmt: skip
    slope = float(np.polyfit(np.log(ACTORS), np.log(cost), 1)[0])
    console = Console(width=120)
    console.print(table)
    console.print(f"log-log slope of cost in actors: {slope:.3f} (target 0.1); a Ray call took {unit * 1e6:.0f} us")
