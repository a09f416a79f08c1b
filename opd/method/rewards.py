"""Rewards of trajectories, by an environment or by the grader of a prompt's task."""

from collections.abc import Sequence

from opd.ports import Context
from opd.types import StopReason, Trajectory


async def task_rewards(trajectories: Sequence[Trajectory], context: Context) -> list[float]:
    """Rewards: an environment's where it gave one, else the grader's of the prompt's task.

    A completion that the token limit cut is wrong by definition (0), unless its grader judges such ones too; so is one
    that was cut before its environment, whose task has no grader, could answer.
    """
    graded = [0.0 if t.reward is None else t.reward for t in trajectories]
    left = [i for i, t in enumerate(trajectories) if t.reward is None]
    for task in {trajectories[i].prompt.task for i in left}:
        if task not in context.graders and task in context.environments:
            continue
        grader, mine = context.graders[task], [i for i in left if trajectories[i].prompt.task == task]
        texts = [context.tokenizer.decode(trajectories[i].token_ids) for i in mine]
        answers = [trajectories[i].prompt.answer for i in mine]
        judges_cut = getattr(grader, "judges_cut", False)
        for i, reward in zip(mine, await grader.grade(texts, answers), strict=True):
            graded[i] = reward if judges_cut or trajectories[i].stop is StopReason.END else 0.0
    return graded
