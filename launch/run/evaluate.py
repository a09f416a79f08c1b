"""Evaluation of a model on held-out prompts: accuracy, exact reverse KL to the teacher, lengths."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TypeVar

import numpy as np
from jaxtyping import Float

from launch.artifacts.evaluation_point import EvaluatedModel, EvaluationPoint
from launch.config.settings import EvaluationConfig
from launch.monitors.accounting import Totals
from opd.loss.packing import TokenMean, pack
from opd.method.method import loss_masks
from opd.objectives.vocabulary import FullReverseKL
from opd.ports import Context, Learner, Sampling, Sources, TextEngine
from opd.rollouts.environment import Play
from opd.rollouts.student import generate
from opd.scorers.reward import task_rewards
from opd.scorers.teacher import SampledTokens, TeacherHidden
from opd.types import Prompt, Scored, Scores, StopReason, TokenScores, Trajectory

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingCost:
    """Cost of training until an evaluation began."""

    totals: Totals
    cpu_s: float


class Evaluator:
    """Grades engines on one held-out set, the same problems every time."""

    def __init__(
        self,
        config: EvaluationConfig,
        sources: Sources,
        context: Context,
        learner: Learner,
        *,
        exact_kl: bool,
        play: Play | None = None,
    ) -> None:
        """`exact_kl=False` (vocabularies padded differently) measures the sampled reverse KL instead.

        `play` lets a writer act in environments, where the method does; otherwise it writes once for every prompt.
        """
        self._play = play
        self._config = config
        self._exact_kl = exact_kl
        self._prompts = list(config.prompts(0, sources))
        self.teachers = sorted({prompt.teacher for prompt in self._prompts})
        self._context = context
        self._learner = learner

    async def student(self, step: int, samples: int, cost: TrainingCost) -> EvaluationPoint:
        """The student as the engines hold it now; reverse KL is exact, on its own fresh rollouts."""
        began = perf_counter()
        context = self._context.at(step)
        greedy = await self._answers(context, context.student, 0.0, 1)
        sampled = await self._answers(context, context.student, 1.0, samples)
        some = [t[0] for t in sampled[: self._config.reverse_kl_prompts]]
        measure = self._reverse_kl if self._exact_kl else self._sampled_reverse_kl
        divergence = await measure(context, some)
        return await self._point(EvaluatedModel.STUDENT, context, greedy, sampled, divergence, began, cost)

    async def teacher(self, writers: Mapping[str, TextEngine]) -> EvaluationPoint:
        """The teachers as writers with the same settings, each on its own prompts (`writers` has `self.teachers`).

        Their `reverse_kl` is the sampled divergence between the engine that wrote and the service that reads the
        same checkpoint: it must be about 0, and checks the alignment of the whole scoring path.
        """
        began = perf_counter()
        context = self._context.at(0)  # a teacher that can be measured is the same at every step
        greedy = await self._answers(context, writers, 0.0, 1)
        sampled = await self._answers(context, writers, 1.0, self._config.samples)
        some = [t[0] for t in sampled[: self._config.reverse_kl_prompts]]
        divergence = await self._sampled_reverse_kl(context, some)
        nothing = TrainingCost(totals=Totals(), cpu_s=0.0)
        return await self._point(EvaluatedModel.TEACHER, context, greedy, sampled, divergence, began, nothing)

    async def _answers(
        self, context: Context, engine: TextEngine | Mapping[str, TextEngine], temperature: float, samples: int
    ) -> list[list[Trajectory]]:
        """`samples` trajectories for every prompt by one engine, or by its own teacher's."""
        sampling = Sampling(max_tokens=self._config.max_tokens, temperature=temperature)
        flat: list[Prompt] = self._prompts * samples
        if isinstance(engine, Mapping):

            async def by_teacher(name: str, prompts: list[Prompt]) -> Sequence[Trajectory]:
                return await self._written(context, prompts, engine[name], sampling, as_teacher=True)

            written = await _each_route(flat, [p.teacher for p in flat], by_teacher)
        else:
            written = await self._written(context, flat, engine, sampling)
        count = len(self._prompts)
        return [[written[s * count + i] for s in range(samples)] for i in range(count)]

    async def _written(
        self,
        context: Context,
        prompts: Sequence[Prompt],
        engine: TextEngine,
        sampling: Sampling,
        *,
        as_teacher: bool = False,
    ) -> list[Trajectory]:
        if self._play is None:
            return await generate(prompts, engine, sampling, as_teacher=as_teacher)
        return await self._play(prompts, engine, sampling, context, as_teacher=as_teacher)

    def _gradable(self, prompt: Prompt) -> bool:
        """Whether there is something to grade its completions against, or none is needed."""
        grader = self._context.graders.get(prompt.task)
        return bool(prompt.answer) or not getattr(grader, "needs_answer", grader is not None)

    async def _reverse_kl(self, context: Context, trajectories: Sequence[Trajectory]) -> float:
        scorer = TeacherHidden()
        scores = await self._score(context, trajectories, scorer)
        scored = [Scored(trajectory=t, scores=s) for t, s in zip(trajectories, scores, strict=True)]
        batches = pack(scored, loss_masks(scored), self._learner.layout, TokenMean())
        return (await self._learner.evaluate(batches, FullReverseKL()))["loss"]

    async def _sampled_reverse_kl(self, context: Context, trajectories: Sequence[Trajectory]) -> float:
        read = await self._score(context, trajectories, SampledTokens())
        gaps = [
            (np.asarray(t.behavior.logprobs) - np.asarray(s.logprobs))[t.loss_mask]
            for t, s in zip(trajectories, read, strict=True)
            if isinstance(s, TokenScores)
        ]
        return float(np.concatenate(gaps).mean())

    async def _score(
        self, context: Context, trajectories: Sequence[Trajectory], scorer: TeacherHidden | SampledTokens
    ) -> list[Scores]:
        """One call per teacher: a scorer is given trajectories of one route at a time."""

        async def score(_: str, mine: list[Trajectory]) -> Sequence[Scores]:
            return await scorer(mine, context)

        return await _each_route(trajectories, [t.prompt.teacher for t in trajectories], score)

    async def _point(
        self,
        examinee: EvaluatedModel,
        context: Context,
        greedy: list[list[Trajectory]],
        sampled: list[list[Trajectory]],
        divergence: float,
        began: float,
        cost: TrainingCost,
    ) -> EvaluationPoint:
        flat = [t for group in sampled for t in group]
        answered = [i for i, prompt in enumerate(self._prompts) if self._gradable(prompt)]
        greedily = await self._solved(context, [greedy[i] for i in answered])
        solved = await self._solved(context, [sampled[i] for i in answered])
        tasks = sorted({self._prompts[i].task for i in answered})
        places = {
            task: [row for row, i in enumerate(answered) if self._prompts[i].task == task]
            for task in tasks[len(tasks) == 1 :]
        }
        return EvaluationPoint(
            examinee=examinee,
            step=context.step,
            greedy=float(greedily.mean()) if answered else None,
            mean_at_k=float(solved.mean()) if answered else None,
            pass_at_k=float((solved > 0).any(axis=1).mean()) if answered else None,
            k=len(sampled[0]),
            reverse_kl=divergence,
            length_mean=float(np.mean([len(t) for t in flat])),
            truncation_rate=float(np.mean([t.stop is StopReason.LENGTH for t in flat])),
            seconds=perf_counter() - began,
            tokens=cost.totals.completion,
            generated=cost.totals.generated,
            learned=cost.totals.learned,
            flops=cost.totals.flops,
            cpu_s=cost.cpu_s,
            greedy_by_task={task: float(greedily[at].mean()) for task, at in places.items()},
            mean_at_k_by_task={task: float(solved[at].mean()) for task, at in places.items()},
        )

    async def _solved(
        self, context: Context, groups: Sequence[Sequence[Trajectory]]
    ) -> Float[np.ndarray, "prompts samples"]:
        """Rewards of every prompt's trajectories; no grader is called where there is no prompt."""
        rewards = await task_rewards([t for group in groups for t in group], context) if groups else []
        return np.asarray(rewards).reshape(len(groups), -1) if groups else np.zeros((0, 1))


async def _each_route(
    items: Sequence[Item], names: Sequence[str], call: Callable[[str, list[Item]], Awaitable[Sequence[Answer]]]
) -> list[Answer]:
    """`call(name, its items)` for every name, and all answers in the order of `items`."""
    answers: dict[int, Answer] = {}
    for name in sorted(set(names)):
        mine = [i for i, n in enumerate(names) if n == name]
        answers |= zip(mine, await call(name, [items[i] for i in mine]), strict=True)
    return [answers[i] for i in range(len(items))]
