"""A context is the one argument of a part beside data, and says where in the run the part is called."""

import asyncio
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, cast

import numpy as np
import pytest

import opd.doctor
import opd.rollouts
import opd.scorers
import opd.token_weights
from launch.artifacts.evaluation_point import EvaluationPoint
from launch.config.settings import EvaluationConfig
from launch.monitors.accounting import Totals
from launch.run.evaluate import Evaluator, TrainingCost
from opd.certify.engines import RequestLog, engines
from opd.certify.worlds import make_world
from opd.method.method import Method
from opd.objectives.sampled import SampledReverseKL
from opd.ports import Context
from opd.rollouts.student import StudentRollout, generate
from opd.scorers.teacher import SampledTokens
from opd.types import Prompt, Scored, Scores, StepReport, Trajectory
from opd.updates.optimizer import OptimizerStep
from tests.unit.loop.test_loop import Bench

PARTS = (opd.rollouts, opd.scorers, opd.token_weights)
Place = tuple[int, int, int]  # step, steps, seed


def functions(*packages: Any) -> list[tuple[type | None, Callable[..., Any]]]:
    """Every function of the packages, with its class if it is a method."""
    modules = [
        importlib.import_module(info.name)
        for package in packages
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    ]
    own = [value for m in modules for value in vars(m).values() if getattr(value, "__module__", "") == m.__name__]
    methods = [(c, f) for c in own if inspect.isclass(c) for f in vars(c).values() if inspect.isfunction(f)]
    return [*methods, *((None, f) for f in own if inspect.isfunction(f))]


def test_every_part_is_called_with_data_and_a_context() -> None:
    slots = ("records", "produces", "reads_sampled_tokens")  # of a rollout, a scorer, a token weight
    parts = [(c, f) for c, f in functions(*PARTS) if c and is_dataclass(c) and any(hasattr(c, name) for name in slots)]
    calls = [f for _, f in parts if f.__name__ == "__call__"]
    assert len(calls) >= 15
    for call in calls:
        _, data, context = inspect.signature(call).parameters.values()
        assert (context.name, context.annotation) == ("context", Context), call
        assert data.name in ("group", "trajectories", "scored"), call


def test_no_function_of_a_part_or_of_the_doctor_takes_bare_engines() -> None:
    taken = [f for _, f in functions(*PARTS, opd.doctor) if "engines" in inspect.signature(f).parameters]
    assert not taken


@dataclass
class Player:
    """A `play` that keeps where in the run it was called."""

    places: list[Place] = field(default_factory=list)

    async def play(
        self, group: Sequence[Prompt], engine: Any, sampling: Any, context: Context, *, as_teacher: bool = False
    ) -> list[Trajectory]:
        self.places.append(place(context))
        return await generate(group, engine, sampling, as_teacher=as_teacher)


def place(context: Context) -> Place:
    return context.step, context.steps, context.seed


def test_rollout_scorer_weight_and_update_of_a_step_get_its_context(make: Any) -> None:
    """The step that asks, also where it is collected ahead of the one that is trained."""
    seen: dict[str, list[Place]] = {"rollout": [], "scorer": [], "weight": [], "update": []}

    def note(part: str, context: Context) -> None:
        seen[part].append(place(context))

    class Rollout(StudentRollout):
        async def __call__(self, group: Sequence[Prompt], context: Context) -> list[Trajectory]:
            note("rollout", context)
            return await StudentRollout.__call__(self, group, context)

    class Scorer(SampledTokens):
        async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
            note("scorer", context)
            return await SampledTokens.__call__(self, trajectories, context)

    class Weight:
        consumes = SampledTokens.produces
        reads_sampled_tokens = False

        def __call__(self, scored: Sequence[Scored[Any]], context: Context) -> list[Any]:
            note("weight", context)
            return [np.ones(len(item.trajectory)) for item in scored]

    class Update(OptimizerStep):
        async def __call__(self, learner: Any, batches: Any, objective: Any, context: Context) -> StepReport:
            note("update", context)
            return await OptimizerStep.__call__(self, learner, batches, objective, context)

    parts: Any = {"rollout": Rollout(max_tokens=4), "scorer": Scorer(), "weights": {"mine": Weight()}}
    method = Method(name="m", objective=SampledReverseKL(), update=Update(), **parts)
    bench = Bench(make)
    asyncio.run(bench.run(method, 3, max_staleness=1))
    groups = len({p.id for p in bench.prompts(0, cast(Any, None))})
    assert seen["weight"] == seen["update"] == [(step, 3, 0) for step in range(3)]
    for part in ("rollout", "scorer"):
        assert sorted(seen[part]) == [(step, 3, 0) for step in range(3) for _ in range(groups)]


@dataclass(frozen=True)
class HeldOut:
    """Two prompts of the enumerated world."""

    group_size: int = 1

    def __call__(self, step: int, sources: Any) -> list[Prompt]:
        return [replace(prompt, answer="1") for prompt in WORLD.prompts[:: WORLD.vocabulary][:2]]


WORLD = make_world(0, 6)


@pytest.mark.parametrize(("model", "step"), [("student", 0), ("student", 4), ("student", 9), ("teacher", 0)])
def test_an_evaluation_calls_parts_at_its_step_of_the_run(model: str, step: int) -> None:
    """The weights of before any step, of between, of after the last; of a teacher they are the same at any step."""
    player, context = Player(), Context.of(engines(WORLD, RequestLog()), step=0, steps=9, seed=7)
    evaluator = Evaluator(
        EvaluationConfig(prompts=HeldOut(), max_tokens=8), cast(Any, None), context, cast(Any, None),
        exact_kl=False, play=player.play,
    )  # fmt: skip
    point = asyncio.run(measured(evaluator, model, step, context))
    assert point.step == step and player.places == [(step, 9, 7)] * 2  # greedy, sampled


async def measured(evaluator: Evaluator, model: str, step: int, context: Context) -> EvaluationPoint:
    if model == "teacher":
        return await anext(evaluator.teacher(dict.fromkeys(context.teachers, context.student)))
    return await anext(evaluator.student(step, TrainingCost(totals=Totals(), cpu_s=0.0)))


def test_progress_is_the_share_of_steps_that_are_done() -> None:
    context = Context.of(engines(WORLD, RequestLog()), step=0, steps=4, seed=1)
    assert [context.at(step).progress for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert (context.at(3).steps, context.at(3).seed, context.at(3).student) == (4, 1, context.student)
