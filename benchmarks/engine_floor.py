"""P13: cost of the rollout engine beside vLLM's own, driven with the same prompts in the same process.

    python benchmarks/engine_floor.py [rounds] [completions]        (default 7 rounds of 64 completions)

Arms take turns on one engine with the embedded student at temperature 1. `vLLM, bare` adds requests and calls
`LLMEngine.step` until all have ended: no log-probabilities, no seeds, answers left as vLLM has them. `vLLM, asked as
here` is the same with a seed and the sampled token's log-probability for every completion. `VLLMEngine` is what a
rollout actor calls: a thread of its own, arrays, versions of the weights. Printed are the median and spread of CPU
seconds of one engine step (a token of every running completion), and the ratio to the first arm, which is the floor of
anything that stays on vLLM. The share outside of the model's forward pass is of vLLM's own step.
"""

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from itertools import count
from statistics import median
from time import perf_counter, process_time
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from actors.config import StudentConfig, environment
from actors.engine import VLLMEngine
from actors.engine_thread import EngineLoop
from launch.config.run_config import run_config
from launch.plan.plan import make_plan
from opd.ports import GenerateRequest, Sampling
from opd.settings.devices import Device

WARM = 2
Arm = Callable[[], Awaitable[int]]


async def main(rounds: int, completions: int) -> None:
    """Let the arms take turns."""
    plan = make_plan(run_config(["experiment=shop", f"prompts.prompts_per_step={completions}", "prompts.group_size=1"]))
    prompts, longest = plan.config.prompts(1, plan.sources), plan.config.student.longest
    most = plan.config.evaluation.max_tokens
    ids = [prompt.student_ids for prompt in prompts]
    engine = VLLMEngine(StudentConfig(path=plan.config.student.path, max_model_len=longest), 0, np.asarray, plan.ends)
    await engine.ready()
    forward = await asyncio.wrap_future(engine._thread.run(Forward))
    names = count()

    async def ours() -> int:
        before = (await engine.stats()).steps
        requests = [
            GenerateRequest(prompt_id=str(next(names)), sample=0, context_ids=one, sampling=Sampling(max_tokens=most))
            for one in ids
        ]
        await engine.generate(requests)
        return (await engine.stats()).steps - before

    async def theirs(**asked: Any) -> int:
        job = engine._thread.run(lambda loop: write(loop, asked))  # vLLM's kernels know one thread
        return await asyncio.wrap_future(job)

    def write(loop: EngineLoop, asked: dict[str, Any]) -> int:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        common: dict[str, Any] = {
            "max_tokens": most,
            "temperature": 1.0,
            "detokenize": False,
            "stop_token_ids": list(plan.ends),
            "output_kind": RequestOutputKind.FINAL_ONLY,
        }
        for one in ids:
            name = next(names)
            seed: dict[str, Any] = {"seed": name} if asked else {}
            prompt: Any = {"type": "token", "prompt_token_ids": one.tolist()}
            loop.engine.add_request(f"theirs-{name}", prompt, SamplingParams(**common, **asked, **seed))
        steps = 0
        while loop.engine.has_unfinished_requests():
            loop.engine.step()
            steps += 1
        return steps

    arms: dict[str, Arm] = {
        "vLLM, bare": theirs,
        "vLLM, asked as here": lambda: theirs(logprobs=0, flat_logprobs=True),
        "VLLMEngine": ours,
    }
    spent: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(WARM + rounds):
        for name, arm in arms.items():
            forward.armed = turn >= WARM and name == "vLLM, bare"
            start, wall = process_time(), perf_counter()
            steps = await arm()
            if forward.armed:
                forward.of_wall_s += perf_counter() - wall
            if turn >= WARM:
                spent[name].append((process_time() - start) / steps)
    await engine.close()
    show(spent, len(ids), forward)


class Forward:
    """Wall seconds of the model's forward passes while `armed`, and of all that they were a part of."""

    def __init__(self, loop: EngineLoop) -> None:
        self.armed, self.seconds, self.of_wall_s = False, 0.0, 0.0
        worker: Any = loop.engine.model_executor.driver_worker.worker
        worker.model_runner.model.register_forward_pre_hook(self._begin)
        worker.model_runner.model.register_forward_hook(self._end)
        self._start = 0.0

    def _begin(self, *_: Any) -> None:
        self._start = perf_counter()

    def _end(self, *_: Any) -> None:
        if self.armed:
            self.seconds += perf_counter() - self._start

    @property
    def share(self) -> float:
        """Share of the armed arm's time in the forward pass."""
        return self.seconds / self.of_wall_s


def show(spent: dict[str, list[float]], completions: int, forward: Forward) -> None:
    """Print milliseconds a step and their ratios."""
    table = Table("arm", "CPU ms a step (spread)", "of vLLM, bare")
    floor = median(next(iter(spent.values())))
    for name, seconds in spent.items():
        low, middle, high = (1e3 * s for s in (min(seconds), median(seconds), max(seconds)))
        table.add_row(name, f"{middle:.2f} ({low:.2f} to {high:.2f})", f"{median(seconds) / floor:.2f}")
    Console().print(
        table, f"{completions} completions at a time; {forward.share:.0%} of vLLM's step is the forward pass"
    )


if __name__ == "__main__":
    wanted = environment(Device.CPU)  # of a rollout actor's process, which has it before torch is imported
    if not wanted.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})
    asyncio.run(main(*(int(argument) for argument in (*sys.argv[1:], *("7", "64")[len(sys.argv) - 1 :]))))
