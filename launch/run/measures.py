"""Measures of one evaluation set: shares solved with their intervals, from graded completions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from launch.config.settings import EvaluationSet
from opd.evaluation.estimates import Estimate, bootstrap, majority_at, pass_at
from opd.ports import Context, NamesAnswers
from opd.scorers.reward import task_rewards
from opd.types import Prompt, StopReason, Trajectory

Groups = Sequence[Sequence[Trajectory]]
"""Trajectories of every prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """Rewards of a set's answers, a row for every prompt that has a reference; `greedily` is None without such ones."""

    prompts: Sequence[Prompt]
    greedily: Float[np.ndarray, "prompts one"] | None
    sampled: Float[np.ndarray, "prompts samples"]
    named: Sequence[Sequence[str]]

    def by_task(self, rewards: Float[np.ndarray, "prompts samples"] | None) -> dict[str, float]:
        """Mean reward of each task, where there are several."""
        tasks = sorted({prompt.task for prompt in self.prompts})
        if rewards is None or len(tasks) == 1:
            return {}
        rows = {task: [row for row, prompt in enumerate(self.prompts) if prompt.task == task] for task in tasks}
        return {task: float(rewards[at].mean()) for task, at in rows.items()}

    def estimates(self, of: EvaluationSet) -> dict[str, Estimate]:
        """Every share that the set asks for, by its full name; none where no prompt has a reference."""
        if not self.prompts:
            return {}
        total = self.sampled.shape[1]
        scores = {"greedy": self.greedily.mean(axis=1)} if self.greedily is not None else {}
        scores[f"mean_at_{total}"] = self.sampled.mean(axis=1)
        for k in [k for k in of.pass_at if k <= total] or [total]:
            scores[f"pass_at_{k}"] = pass_at(self.sampled > 0, k)
        for k in [k for k in of.maj_at if k <= total]:
            votes = zip(self.named, self.sampled.tolist(), strict=True)
            scores[f"maj_at_{k}"] = np.array([majority_at(names, rewards, k) for names, rewards in votes])
        return {name: bootstrap(values, of.seed) for name, values in scores.items()}


async def solved(
    context: Context, of: EvaluationSet, prompts: Sequence[Prompt], greedy: Groups | None, sampled: Groups
) -> Solved:
    """Rewards of a set's answers; no grader is called where no prompt has a reference."""
    answered = [i for i, prompt in enumerate(prompts) if _gradable(context, prompt)]
    greedily = None if greedy is None else await _rewards(context, [greedy[i] for i in answered])
    kept = [sampled[i] for i in answered]
    rewards = await _rewards(context, kept)
    voting = any(k <= len(sampled[0]) for k in of.maj_at)
    return Solved(
        prompts=[prompts[i] for i in answered],
        greedily=greedily,
        sampled=rewards,
        named=[await _named(context, group) for group in kept] if voting else [],
    )


def _gradable(context: Context, prompt: Prompt) -> bool:
    """Whether there is something to grade its completions against, or none is needed."""
    grader = context.graders.get(prompt.task)
    return bool(prompt.answer) or not getattr(grader, "needs_answer", grader is not None)


async def _rewards(context: Context, groups: Groups) -> Float[np.ndarray, "prompts samples"]:
    rewards = await task_rewards([t for group in groups for t in group], context) if groups else []
    return np.asarray(rewards).reshape(len(groups), -1) if groups else np.zeros((0, 1))


async def _named(context: Context, group: Sequence[Trajectory]) -> list[str]:
    """Names of the answers of one prompt's completions; one that the token limit cut has none, unless it is graded."""
    prompt = group[0].prompt
    grader = context.graders[prompt.task]
    assert isinstance(grader, NamesAnswers)  # the plan has refused others
    names = await grader.named([context.tokenizer.decode(t.token_ids) for t in group], prompt.answer)
    judged = getattr(grader, "judges_cut", False)
    return [name if judged or t.stop is StopReason.END else "" for name, t in zip(names, group, strict=True)]
