"""`python -m tests.faulty_run train ...`: `opd train` whose processes do what a plan of faults says (`fault_plan.py`).

Actors are subclasses of the real ones that only look into the plan at places of their code; everything else is the
product's own.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any

from actors.engine import VLLMEngine
from launch.run.run import SPARE
from learner.checkpoints import checkpoint
from learner.learner import LearnerRank
from opd.ports import PublishedWeights, WeightAck
from teacher_service.backends.torch_forward import TorchTeacher
from tests.fault_plan import at, claimed, present


class FaultyEngine(VLLMEngine):
    """Places: `engine starting` (vLLM is being built), `decoding` (between two steps), `receiving` (weights are copied,
    layers not finished), `acknowledging` (deeds `skip N` pushes, or `lie` about the digest)."""

    _skips = 0

    def __init__(self, *arguments: Any) -> None:
        present("engine")
        _between_steps()
        super().__init__(*arguments)
        at("engine starting")

    async def receive(self, weights: PublishedWeights) -> WeightAck:
        """As the real one, unless the plan wants it to pretend."""
        how = claimed("engine acknowledging")
        if how.startswith("skip"):
            self._skips = int(how.split()[1])
        if self._skips:
            self._skips -= 1
            return WeightAck(version=weights.version, digest=weights.digest, gap=0.0)
        receipt = await super().receive(weights)
        return replace(receipt, digest="0" * 16) if how == "lie" else receipt

    def _load(self, weights: Any, delivered: Any, loop: Any) -> WeightAck:
        real = loop.engine.collective_rpc

        def workers(method: str, **arguments: Any) -> Any:
            if method == "finish_weight_update":
                at("engine receiving")
            return real(method, **arguments)

        loop.engine.collective_rpc = workers
        try:
            return super()._load(weights, delivered, loop)
        finally:
            loop.engine.collective_rpc = real


def _between_steps() -> None:
    from actors.engine_thread import EngineLoop

    real = EngineLoop.step

    def step(self: EngineLoop) -> None:
        real(self)
        if self.engine.has_unfinished_requests():
            at("engine decoding")

    EngineLoop.step = step


class FaultyTeacher(TorchTeacher):
    """Places: `teacher scoring` (before every forward), `teacher answering` (all is scored, nothing said yet)."""

    def __init__(self, *arguments: Any) -> None:
        present("teacher")
        super().__init__(*arguments)

    def _microbatch(self, *arguments: Any) -> Any:
        at("teacher scoring")
        return super()._microbatch(*arguments)

    async def score(self, requests: Sequence[Any]) -> Any:
        """As the real one."""
        answers = await super().score(requests)
        at("teacher answering")
        return answers


class FaultyRank(LearnerRank):
    """Places: `learner beginning` (a step), `forward` (before a micro-batch), `optimizing` (gradients are there),
    `writing` (a shard's header is in the file), `opening` (deed `full`: the shard gets a full disk), `exporting`."""

    def setup(self, *arguments: Any) -> None:
        """As the real one, with the places in its modules."""
        _in_the_learner()
        super().setup(*arguments)
        training: Any = self._training
        training._try = _before("learner forward", training._try)

    def step(self, *arguments: Any) -> Any:
        """As the real one."""
        at("learner beginning")
        return super().step(*arguments)

    def export(self, *arguments: Any) -> None:
        """As the real one."""
        at("learner exporting")
        super().export(*arguments)


def _in_the_learner() -> None:
    from learner import engine

    apply, write, serialized = engine.apply, checkpoint.write_shard, checkpoint._serialized

    def applied(*arguments: Any) -> Any:
        at("learner optimizing")
        return apply(*arguments)

    def written(path: Any, *arguments: Any) -> str:
        # A full disk is that of the run's folder; what is rescued may lie on another.
        if SPARE not in str(path) and claimed("learner opening") == "full":
            path.symlink_to("/dev/full")
        return write(path, *arguments)

    def pieces(*arguments: Any) -> Iterator[memoryview]:
        header, *tensors = serialized(*arguments)
        yield header
        at("learner writing")
        yield from tensors

    engine.apply, checkpoint.write_shard, checkpoint._serialized = applied, written, pieces


def _before(place: str, real: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(real):  # parts are asked whether they are awaited

        @wraps(real)
        async def awaited(*arguments: Any, **options: Any) -> Any:
            at(place)
            return await real(*arguments, **options)

        return awaited

    @wraps(real)
    def call(*arguments: Any, **options: Any) -> Any:
        at(place)
        return real(*arguments, **options)

    return call


def _in_the_driver() -> None:
    """Places of the driver: `prompting` (a step's prompts are asked for), `writing` (a group of them is), `grading`,
    `showing` (a step is over and in metrics.jsonl), `evaluating`, `evaluating the teacher`, `committing` (a checkpoint
    is written, not renamed)."""
    from launch.inputs.graders import TaskGrader
    from launch.monitors.live_view import LiveView
    from launch.run.evaluate import Evaluator
    from opd.prompts.generated import GeneratedPrompts
    from opd.rollouts.student import StudentRollout

    places: list[tuple[Any, str, str]] = [
        (GeneratedPrompts, "__call__", "prompting"),
        (StudentRollout, "__call__", "writing"),
        (TaskGrader, "grade", "grading"),
        (LiveView, "__call__", "showing"),
        (Evaluator, "student", "evaluating"),
        (Evaluator, "teacher", "evaluating the teacher"),
        (checkpoint, "commit", "committing"),
    ]
    for owner, name, place in places:
        setattr(owner, name, _before(f"driver {place}", getattr(owner, name)))


def main() -> None:
    """`opd`, with faulty actors and the places of the driver."""
    from launch.cli.main import main as command
    from launch.run import session

    present("driver")
    wiring: Any = session
    wiring.VLLMEngine, wiring.LearnerRank, wiring.backend = FaultyEngine, FaultyRank, lambda chosen: FaultyTeacher
    _in_the_driver()
    command(sys.argv[1:])


if __name__ == "__main__":
    from tests.faulty_run import main as importable  # by its name, so that actors find these classes by it

    importable()
