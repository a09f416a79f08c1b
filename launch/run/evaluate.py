"""Evaluation of a model on sets of held-out prompts: accuracy, exact reverse KL to the teacher, lengths."""

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TypeVar

import numpy as np

from launch.artifacts.evaluation_point import EvaluatedModel, EvaluationPoint
from launch.config.settings import EvaluationConfig, EvaluationSet
from launch.monitors.accounting import Totals
from launch.plan.plan import Plan
from launch.run.measures import solved
from launch.run.session import Session
from opd.loss.packing import TokenMean, pack
from opd.method.method import loss_masks
from opd.objectives.vocabulary import FullReverseKL
from opd.ports import Context, Learner, Sampling, Sources, TextEngine
from opd.rollouts.environment import Play, Plays
from opd.rollouts.student import generate
from opd.scorers.teacher import SampledTokens, TeacherHidden
from opd.types import Prompt, Scored, Scores, StopReason, TokenScores, Trajectory

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingCost:
    """Cost of training until an evaluation began."""

    totals: Totals
    cpu_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Examined:
    """An evaluation set with its prompts, the same problems every time."""

    name: str
    of: EvaluationSet
    prompts: Sequence[Prompt]


class Evaluator:
    """Grades engines on every evaluation set, one after the other."""

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
        self._exact_kl = exact_kl
        self._sets = [
            _Examined(name=name, of=of, prompts=config.asked(name, sources)) for name, of in config.by_name.items()
        ]
        self.teachers = sorted({prompt.teacher for one in self._sets for prompt in one.prompts})
        self._context = context
        self._learner = learner

    async def student(
        self, step: int, cost: TrainingCost, *, due: Collection[str] | None = None, between: bool = False
    ) -> AsyncIterator[EvaluationPoint]:
        """The student as the engines hold it now, on the sets that are `due` (None: all).

        `between`: neither before nor after training. Reverse KL is exact, on the student's own fresh rollouts.
        """
        context = self._context.at(step)
        measure = self._reverse_kl if self._exact_kl else self._sampled_reverse_kl
        for one in self._sets:
            if due is None or one.name in due:
                count = one.of.count(between=between)
                yield await self._point(EvaluatedModel.STUDENT, one, context, context.student, count, measure, cost)

    async def teacher(self, writers: Mapping[str, TextEngine]) -> AsyncIterator[EvaluationPoint]:
        """The teachers as writers with the same settings, each on its own prompts (`writers` has `self.teachers`).

        Their `reverse_kl` is the sampled divergence between the engine that wrote and the service that reads the
        same checkpoint: it must be about 0, and checks the alignment of the whole scoring path.
        """
        context = self._context.at(0)  # a teacher that can be measured is the same at every step
        measure, nothing = self._sampled_reverse_kl, TrainingCost(totals=Totals(), cpu_s=0.0)
        for one in self._sets:
            yield await self._point(
                EvaluatedModel.TEACHER, one, context, writers, one.of.count(between=False), measure, nothing
            )

    async def _point(
        self,
        examinee: EvaluatedModel,
        one: _Examined,
        context: Context,
        engine: TextEngine | Mapping[str, TextEngine],
        samples: int,
        measure: Callable[[Context, Sequence[Trajectory]], Awaitable[float]],
        cost: TrainingCost,
    ) -> EvaluationPoint:
        """Results of one model on one set."""
        began, of = perf_counter(), one.of
        greedy = await self._answers(context, one, engine, 0.0, 1.0, 1) if of.greedy else None
        sampled = await self._answers(context, one, engine, of.temperature, of.top_p, samples)
        some = [t[0] for t in sampled[: of.reverse_kl_prompts]]
        divergence = await measure(context, some) if some else None
        found = await solved(context, of, one.prompts, greedy, sampled)
        flat, any_solved = [t for group in sampled for t in group], bool(found.prompts)
        return EvaluationPoint(
            examinee=examinee,
            step=context.step,
            greedy=float(found.greedily.mean()) if any_solved and found.greedily is not None else None,
            mean_at_k=float(found.sampled.mean()) if any_solved else None,
            pass_at_k=float((found.sampled > 0).any(axis=1).mean()) if any_solved else None,
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
            greedy_by_task=found.by_task(found.greedily),
            mean_at_k_by_task=found.by_task(found.sampled),
            set=one.name,
            temperature=of.temperature,
            top_p=of.top_p,
            max_tokens=of.max_tokens,
            problems=len(found.prompts),
            estimates=found.estimates(of),
        )

    async def _answers(
        self,
        context: Context,
        one: _Examined,
        engine: TextEngine | Mapping[str, TextEngine],
        temperature: float,
        top_p: float,
        samples: int,
    ) -> list[list[Trajectory]]:
        """`samples` trajectories for every prompt by one engine, or by its own teacher's."""
        sampling = Sampling(max_tokens=one.of.max_tokens, temperature=temperature, top_p=top_p)
        flat: list[Prompt] = [*one.prompts] * samples
        if isinstance(engine, Mapping):

            async def by_teacher(name: str, prompts: list[Prompt]) -> Sequence[Trajectory]:
                return await self._written(context, prompts, engine[name], sampling, as_teacher=True)

            written = await _each_route(flat, [p.teacher for p in flat], by_teacher)
        else:
            written = await self._written(context, flat, engine, sampling)
        count = len(one.prompts)
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


async def _each_route(
    items: Sequence[Item], names: Sequence[str], call: Callable[[str, list[Item]], Awaitable[Sequence[Answer]]]
) -> list[Answer]:
    """`call(name, its items)` for every name, and all answers in the order of `items`."""
    answers: dict[int, Answer] = {}
    for name in sorted(set(names)):
        mine = [i for i, n in enumerate(names) if n == name]
        answers |= zip(mine, await call(name, [items[i] for i in mine]), strict=True)
    return [answers[i] for i in range(len(items))]


def make_evaluator(plan: Plan, session: Session) -> Evaluator:
    """Evaluator of this session's students and teachers."""
    rollout, config = plan.config.method.rollout, plan.config.evaluation
    play = rollout.play if isinstance(rollout, Plays) else None
    return Evaluator(config, plan.sources, session.context(0), session.learner, exact_kl=plan.exact_kl, play=play)
