"""Graders of finished completions: the embedded tasks' own, and mathematical answers by math-verify."""

import asyncio
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool


class TaskGrader:
    """A pure function of completion and answer, e.g. `TaskGrader(shop.grade)`."""

    def __init__(self, one: Callable[[str, str], float]) -> None:
        self._one = one

    async def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Rewards in order."""
        return [self._one(c, a) for c, a in zip(completions, answers, strict=True)]

    def close(self) -> None:
        """Nothing to release."""


def verify_math(completion: str, answer: str) -> float:
    """1.0 if math-verify finds the last expression of `completion` equal to `answer` (run in a child process).

    An answer that carries its working, as GSM8K's do, is cut to what stands behind `####`.
    """
    from math_verify import parse, verify  # slow to import, and only the child process needs it

    gold = answer.rsplit("####", 1)[-1].strip()
    return float(
        verify(parse(gold, parsing_timeout=None), parse(completion, parsing_timeout=None), timeout_seconds=None)
    )


class MathGrader:
    """math-verify in a child process with a deadline: a pathological expression costs its own reward only."""

    def __init__(self, deadline_s: float = 5.0) -> None:
        self._deadline_s = deadline_s
        self._pool: ProcessPoolExecutor | None = None
        self._free = asyncio.Lock()

    async def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Rewards in order; a completion that cannot be graded in time gets 0."""
        return [await self._one(c, a) for c, a in zip(completions, answers, strict=True)]

    async def _one(self, completion: str, answer: str) -> float:
        async with self._free:  # groups are graded at once: whose turn it is not does not spend its deadline waiting
            return await self._graded(completion, answer)

    async def _graded(self, completion: str, answer: str) -> float:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
            warm_up = self._pool.submit(verify_math, "1", "1")  # importing sympy takes longer than a deadline
            await asyncio.wait_for(asyncio.wrap_future(warm_up), 120)
        work = asyncio.wrap_future(self._pool.submit(verify_math, completion, answer))
        try:
            return await asyncio.wait_for(work, self._deadline_s)
        except (TimeoutError, BrokenProcessPool):
            self.close()
            return 0.0

    def close(self) -> None:
        """End the child process, whatever it is doing."""
        if self._pool is not None:
            for process in list(self._pool._processes.values()):
                process.kill()
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
