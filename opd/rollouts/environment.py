"""Rollout of several turns: the student acts, an environment answers, until the episode ends."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int32

from opd.errors import ConfigurationError
from opd.ports import (
    Completion,
    Context,
    Environment,
    GenerateRequest,
    Grader,
    Need,
    Outcome,
    Role,
    Sampling,
    TextEngine,
    Tokenizer,
)
from opd.rollouts.student import StudentRollout
from opd.settings.ranges import AtMost, Count, In, Temperature, Tokens, TopP
from opd.settings.validation import settings
from opd.types import NO_VERSION, Prompt, StopReason, TokenScores, TopKScores, Trajectory
from opd.types.log_mass import ABSENT

Ids = Int32[np.ndarray, " T"]


class Play(Protocol):
    """Signature of `EnvironmentRollout.play`: trajectories by any engine, with the caller's sampling."""

    async def __call__(
        self,
        group: Sequence[Prompt],
        engine: TextEngine,
        sampling: Sampling,
        context: Context,
        *,
        as_teacher: bool = False,
    ) -> list[Trajectory]: ...


@runtime_checkable
class Plays(Protocol):
    """A rollout whose environments other engines than the student can act in, as evaluations need."""

    @property
    def play(self) -> Play:
        """Trajectories by any engine."""
        ...


@dataclass(slots=True, kw_only=True)
class SingleTurn:
    """Environment of a task that has a grader only: one action, which is graded and ends the episode."""

    grader: Grader
    _answer: str = field(init=False)

    async def reset(self, prompt: Prompt) -> str:
        """No observation: the prompt is complete."""
        self._answer = prompt.answer
        return ""

    async def step(self, action: str) -> Outcome:
        """The reward of a finished completion."""
        (reward,) = await self.grader.grade([action], [self._answer])
        return Outcome(reward=reward, done=True)


@dataclass(slots=True, kw_only=True)
class _Episode:
    """A trajectory under construction: turns and observations after its prompt, in order."""

    prompt: Prompt
    sample: int
    environment: Environment
    room: int  # tokens that still fit
    parts: list[Completion | Ids] = field(default_factory=list)  # turns of the student, observations
    reward: float | None = None
    stop: StopReason | None = None

    @property
    def ids(self) -> Ids:
        """All tokens after the prompt so far."""
        parts = [part.token_ids if isinstance(part, Completion) else part for part in self.parts]
        return np.concatenate([np.zeros(0, dtype=np.int32), *parts]).astype(np.int32)

    def observe(self, text: str, tokenizer: Tokenizer) -> None:
        """Append an observation. Its ids are its own: nothing that was sampled before is tokenized again."""
        start = len(tokenizer.encode(""))  # what a template puts before every text
        ids = tokenizer.encode(text)[start:].astype(np.int32) if text else np.zeros(0, dtype=np.int32)
        if len(ids) >= self.room:  # no token would be left to answer with
            self.stop = StopReason.LENGTH
        else:
            self.room -= len(ids)
            self.parts.append(ids)

    async def act(self, turn: Completion, last: bool, tokenizer: Tokenizer) -> None:
        """Append a turn of the student and its outcome. `last`: no further turn is allowed."""
        self.parts.append(turn)
        self.room -= len(turn.token_ids)
        if turn.stop is StopReason.LENGTH:  # an unfinished action is none
            self.stop = StopReason.LENGTH
            return
        outcome = await self.environment.step(tokenizer.decode(turn.token_ids))
        self.reward = (self.reward or 0.0) + outcome.reward
        if outcome.done or last:
            self.stop = StopReason.END if outcome.done else StopReason.LENGTH
        else:
            self.observe(outcome.text, tokenizer)

    def trajectory(self) -> Trajectory:
        """The finished trajectory. Observations are context: not trained, of no version, with log-probability 0."""
        turns = [part for part in self.parts if isinstance(part, Completion)]
        kind = turns[0].behavior  # there is one, and all are alike
        parts = [part for part in self.parts if isinstance(part, Completion) or len(part)]
        behavior = [part.behavior if isinstance(part, Completion) else _certain(part, kind) for part in parts]
        mask: list[Bool[np.ndarray, " T"]] = []
        versions: list[Ids] = []
        for part in parts:
            own = isinstance(part, Completion)
            ids = part.token_ids if own else part
            mask.append(np.full(len(ids), own, dtype=bool))
            versions.append(part.versions if own else np.full(len(ids), NO_VERSION, dtype=np.int32))
        return Trajectory(
            prompt=self.prompt,
            sample=self.sample,
            token_ids=self.ids,
            behavior=type(kind).concat(behavior),
            loss_mask=np.concatenate(mask),
            versions=np.concatenate(versions).astype(np.int32),
            stop=self.stop or StopReason.END,
            digests={version: digest for turn in turns for version, digest in turn.digests.items()},
            reward=self.reward,
        )


def _certain(ids: Ids, like: TokenScores) -> TokenScores:
    """Log-probability 0 for every token, in the form of the turns' behavior; nothing uses it."""
    zeros = np.zeros(len(ids), dtype=np.float32)
    if not isinstance(like, TopKScores):
        return TokenScores(logprobs=zeros)
    k = like.topk_ids.shape[1]
    support = np.full((len(ids), k), ABSENT, dtype=np.float32)
    support[:, 0] = 0.0
    others = np.tile(np.arange(k, dtype=np.int32), (len(ids), 1))
    return TopKScores(logprobs=zeros, topk_ids=others, topk_logprobs=support, rest=np.full_like(zeros, ABSENT))


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class EnvironmentRollout:
    """Episodes of the student in the environment of the prompt's task, of which only its own tokens are trained.

    A task without an environment of its own is a single turn that its grader ends. `max_tokens` bounds a whole
    trajectory, observations included. One that the bound, the last of `max_turns` or the limit of a turn cuts stops
    with `LENGTH`; a cut turn is no action. The trajectory's reward is the sum of what its actions earned. All
    trajectories of a group take their turns together. Seeds depend on prompt, sample, turn and policy version.
    """

    needs_engines: ClassVar[frozenset[Need]] = frozenset({Need(Role.STUDENT), Need(Role.ENVIRONMENT)})
    on_policy: ClassVar[bool] = True

    # longest trajectory: all turns and observations
    max_tokens: Tokens
    # turns of the student at most
    max_turns: Count = 8
    # longest turn; 0: as long as the trajectory may be
    max_turn_tokens: Annotated[int, In(0, 100_000_000, because="0: no bound of its own")] = 0
    # 1 samples the model's own distribution, 0 is greedy
    temperature: Temperature = 1.0
    # share of probability that is sampled from; 1 is all of it
    top_p: TopP = 1.0
    # likeliest tokens that the student records while it samples, for scorers that need its top-k
    record_topk: Annotated[int, In(0, 1_000_000), AtMost("vocabulary")] = 0

    def __post_init__(self) -> None:
        _ = self._student  # refuses the settings that a student's rollout refuses

    @property
    def _student(self) -> StudentRollout:
        return StudentRollout(
            max_tokens=self.max_tokens, temperature=self.temperature, top_p=self.top_p, record_topk=self.record_topk
        )

    @property
    def records(self) -> type[TokenScores]:
        return self._student.records

    @property
    def truncated(self) -> bool:
        return self._student.truncated

    async def __call__(self, group: Sequence[Prompt], context: Context) -> list[Trajectory]:
        sampling = Sampling(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            topk=self.record_topk,
        )
        return await self.play(group, context.student, sampling, context)

    async def play(
        self,
        group: Sequence[Prompt],
        engine: TextEngine,
        sampling: Sampling,
        context: Context,
        *,
        as_teacher: bool = False,
    ) -> list[Trajectory]:
        """One trajectory per prompt by any engine; `sampling.max_tokens` bounds a whole trajectory."""
        playing = [_begun(prompt, i, sampling.max_tokens, context) for i, prompt in enumerate(group)]
        for episode in playing:
            episode.observe(await episode.environment.reset(episode.prompt), context.tokenizer)
            if episode.stop:
                raise ConfigurationError(
                    f"the environment of task {episode.prompt.task!r} gives prompt {episode.prompt.id!r} more than "
                    f"the {sampling.max_tokens} tokens of a trajectory; raise max_tokens"
                )
        for turn in range(self.max_turns):
            live = [episode for episode in playing if episode.stop is None]
            if not live:
                break
            turns = await engine.generate([self._request(e, turn, sampling, as_teacher) for e in live])
            turns = [replace(c, digests={}) for c in turns] if as_teacher else turns
            last = turn + 1 == self.max_turns
            acts = [e.act(c, last, context.tokenizer) for e, c in zip(live, turns, strict=True)]
            await asyncio.gather(*acts)
        return [episode.trajectory() for episode in playing]

    def _request(self, episode: _Episode, turn: int, sampling: Sampling, as_teacher: bool) -> GenerateRequest:
        prompt = episode.prompt
        context_ids = prompt.teacher_ids if as_teacher else prompt.student_ids
        so_far = episode.ids
        return GenerateRequest(
            prompt_id=f"{prompt.id}/turn {turn}" if turn else prompt.id,  # which seeds it
            sample=episode.sample,
            context_ids=np.concatenate([context_ids, so_far]).astype(np.int32) if len(so_far) else context_ids,
            sampling=replace(sampling, max_tokens=min(episode.room, self.max_turn_tokens or episode.room)),
        )


def _begun(prompt: Prompt, sample: int, room: int, context: Context) -> _Episode:
    make = context.environments.get(prompt.task)
    if make is None and prompt.task not in context.graders:
        raise ConfigurationError(
            f"prompt {prompt.id!r} is of task {prompt.task!r}, but the run has environments "
            f"{sorted(context.environments)} and graders {sorted(context.graders)}; name one of those in prompts.task"
        )
    environment = make() if make is not None else SingleTurn(grader=context.graders[prompt.task])
    return _Episode(prompt=prompt, sample=sample, environment=environment, room=room)
