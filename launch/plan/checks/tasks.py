"""Checks of tasks: each can be graded or played, and a user's own parts are tried once before anything starts."""

import re
from collections.abc import Iterator, Mapping

from launch.config.run_config import RunConfig
from launch.inputs.graders import make_grader
from launch.inputs.own_environment import OwnEnvironment
from launch.inputs.own_grader import OwnGrader
from launch.plan.checks.answers import needs_answer
from launch.plan.checks.survey import Survey
from opd.errors import ConfigurationError, DataError
from opd.method.needs import needed
from opd.ports import Role


def check_tasks(config: RunConfig, training: Survey, held_out: Mapping[str, Survey]) -> list[str]:
    """Remarks about tasks; refuses a task without a part for it, and a part of the user's that does not work.

    A part that no prompt asks for is not tried, and not started in the run.
    """
    if needed(config.method, Role.TEXT_TEACHER):
        raise ConfigurationError(
            f"method {config.method.name} needs a teacher that gives text only, which no backend of this version is; "
            "name a part that asks a writing teacher (its needs_engines)"
        )
    surveys = (training, *held_out.values())
    tasks = {task: where for found in surveys for task, where in found.tasks.items()}
    for task, where in tasks.items():
        _check_task(config, task, where)
    _check_rewards(config, training)
    notes = [note for task in sorted(tasks) for note in _tried_grader(config, task, training)]
    for task in sorted(tasks.keys() & config.environments.keys()):
        shown = next(found for found in surveys if task in found.tasks)
        OwnEnvironment(name=task, part=config.environments[task]).probe(shown.first_of[task])
    return notes


def _check_task(config: RunConfig, task: str, where: str) -> None:
    if task in config.graders:
        return
    known = f"set prompts.task to one of {sorted([*config.graders, *config.environments])}"
    if task not in config.environments:
        name, target = (task, "MODULE.FUNCTION") if task.isidentifier() else ("mine", _target(task))
        raise DataError(
            f"no grader is called {task!r} ({where}); {known}, or name a reward of your own with "
            f"+graders.{name}._target_={target}" + ("" if name == task else f" prompts.task={name}")
        )
    if not needed(config.method, Role.ENVIRONMENT):
        raise ConfigurationError(
            f"task {task!r} ({where}) is an environment, which rollout {type(config.method.rollout).__name__} does "
            "not play; set method.rollout._target_=opd.rollouts.environment.EnvironmentRollout, or add a grader "
            f"graders.{task}"
        )


def _target(task: str) -> str:
    """`_target_` of a reward that is written as a path, `module:function` or `module.function`."""
    module, _, function = task.partition(":")
    named = module.removesuffix(".py").replace("/", ".").strip(".") if re.search(r"[:/]|\.py$", task) else task
    dotted = ".".join(part for part in (named, function) if part)
    whole = re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", dotted) and not task.endswith(".py")
    return dotted if whole else "MODULE.FUNCTION"


def _check_rewards(config: RunConfig, training: Survey) -> None:
    """Refuse a method that learns from rewards where there is nothing to grade against."""
    if not needed(config.method, Role.GRADER):
        return
    plays = needed(config.method, Role.ENVIRONMENT)
    for task, where in training.unanswered_of.items():
        if not (plays and task in config.environments) and needs_answer(config, task):
            raise ConfigurationError(
                f"method {config.method.name} learns from graded answers, but {where} has no reference "
                "answer; set prompts.answer_column to the column that has them, or choose a method that needs none"
            )


def _tried_grader(config: RunConfig, task: str, training: Survey) -> Iterator[str]:
    """A user's reward of two completions: the reference answer, and nothing at all."""
    grader = make_grader(task, config.graders[task]) if task in config.graders else None
    if not isinstance(grader, OwnGrader):
        return
    answer = training.first_of[task].answer if task in training.first_of else ""
    try:
        rewards = [grader.probe(completion, answer) for completion in dict.fromkeys((answer, ""))]
    finally:
        grader.close()
    strange = [reward for reward in rewards if not 0 <= reward <= 1]
    if strange:
        yield (
            f"note: graders.{task} gave {strange[0]:g}, which is no share: training takes any finite reward, and what "
            "evaluations call an accuracy is then its mean"
        )
