"""A world small enough to enumerate: tiny models in float64, and engines that write and read with them.

Two prompts, a few positions, and for every position one trajectory per token that could be written there. The real
rollout, scorer, packing and loss of a method run on it unchanged, so what is enumerated is what trains.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.divergences import States
from opd.errors import ConfigurationError, DataError
from opd.ports import (
    AtIds,
    Completion,
    Engines,
    GenerateRequest,
    LastHidden,
    Receipt,
    Sampling,
    ScoreRequest,
    TopK,
)
from opd.rows import Said
from opd.types import (
    AdvantageScores,
    HiddenScores,
    Prompt,
    RemoteRows,
    Scored,
    Stop,
    TokenScores,
    TopKReturnScores,
    TopKScores,
    Trajectory,
)

Text = tuple[np.ndarray, np.ndarray]
CONTEXTS = ((3, 5), (2, 7, 4))
LENGTH = 3
WIDTH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyModel:
    """A causal model without attention: `h_i = tanh(sum_d 2^-d E[id_(i-d)])`, logits `h_i W^T`; float64."""

    embedding: Float[Tensor, "V H"]
    head: Float[Tensor, "V H"]

    def hidden(self, ids: Int[Tensor, " N"], positions: Int[Tensor, " N"]) -> Float[Tensor, "N H"]:
        """Hidden states of packed sequences; a position says how many tokens of its own sequence it may see."""
        total = torch.zeros(len(ids), self.embedding.shape[1], dtype=self.embedding.dtype)
        for back in range(int(positions.max()) + 1):
            seen = self.embedding[ids.roll(back)] * (positions >= back)[:, None]
            total = total + seen * 0.5**back
        return total.tanh()

    def readings(self, texts: Sequence[Text]) -> list[Float[Tensor, "_T H"]]:
        """For every `(context, written)` the hidden states that predict its written tokens."""
        packed = [np.concatenate([context, written[:-1]]) for context, written in texts]
        lengths = [len(ids) for ids in packed]
        positions = torch.as_tensor(np.concatenate([np.arange(n) for n in lengths]))
        states = self.hidden(torch.as_tensor(np.concatenate(packed)).long(), positions).split(lengths)
        return [h[len(context) - 1 :] for h, (context, _) in zip(states, texts, strict=True)]

    def logprobs(self, texts: Sequence[Text]) -> list[Float[Tensor, "_T V"]]:
        """The distribution at each written token of every text."""
        return [(h @ self.head.T).log_softmax(-1) for h in self.readings(texts)]


def _model(draw: torch.Generator, vocabulary: int) -> TinyModel:
    """Even ids lead to confident states, odd ones to open states."""
    embedding, head = torch.randn(2, vocabulary, WIDTH, generator=draw, dtype=torch.float64)
    embedding[:, 0] = torch.where(torch.arange(vocabulary) % 2 == 0, 2.0, -2.0)
    head = 0.7 * head
    head[:2, 0] += torch.tensor([8.0, 6.0], dtype=torch.float64)
    return TinyModel(embedding=embedding, head=head)


def _moved(model: TinyModel, draw: torch.Generator, by: float) -> TinyModel:
    noise = torch.randn(2, *model.head.shape, generator=draw, dtype=torch.float64) * by
    return TinyModel(embedding=model.embedding + noise[0], head=model.head + noise[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Who reads and writes. `writer` is the student that wrote, the current one unless it is stale.

    `shift` = 1 makes the teacher answer for the token before, the commonest mistake of all.
    """

    vocabulary: int
    student: TinyModel
    teacher: TinyModel
    writer: TinyModel
    stranger: TinyModel
    shift: int = 0

    @property
    def prompts(self) -> list[Prompt]:
        """Every prompt once per trajectory that will be written for it."""
        made = []
        for number, context in enumerate(CONTEXTS):
            ids = np.asarray(context, dtype=np.int32)
            for path in self.paths(number):
                answer = " ".join(map(str, path))
                made.append(Prompt(id=f"state/{number}", student_ids=ids, teacher_ids=ids, answer=answer))
        return made

    def paths(self, number: int) -> Int[np.ndarray, "_paths _length"]:
        """Completions for a prompt: path `t V + v` writes `v` at position `t` and is the same elsewhere."""
        base = (np.arange(LENGTH) * 3 + number + 1) % self.vocabulary
        paths = np.tile(base.astype(np.int32), (LENGTH * self.vocabulary, 1))
        index = np.arange(len(paths))
        paths[index, index // self.vocabulary] = index % self.vocabulary
        return paths

    def engines(self) -> Engines:
        """Engines of this world; nothing in them waits or is random."""
        return Engines(
            student=_Writer(model=self.writer, world=self),
            teachers={"default": _Reader(model=self.teacher, shift=self.shift)},
            writers={"default": _Writer(model=self.teacher, world=self)},
            graders={"": _Grader()},
            tokenizer=_Words(),
        )


def make_world(seed: int, vocabulary: int) -> World:
    """A fresh student, a teacher not far from it, and a stranger to put in the teacher's place."""
    draw = torch.Generator().manual_seed(seed)
    student = _model(draw, vocabulary)
    return World(
        vocabulary=vocabulary,
        student=student,
        teacher=_moved(student, draw, 0.5),
        writer=student,
        stranger=_moved(student, draw, 0.5),
    )


def stale(world: World, seed: int) -> World:
    """The same world, written in by an earlier student."""
    return replace(world, writer=_moved(world.student, torch.Generator().manual_seed(seed), 0.2))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Writer:
    """Writes the enumerated completions, and testifies as a sampler of `model` would."""

    model: TinyModel
    world: World

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        paths = {name: self._paths(name) for name in {r.prompt_id for r in requests}}
        for r in requests:
            if r.sample >= len(paths[r.prompt_id]):
                raise ConfigurationError(
                    "the certificate can enumerate rollouts that write once for every prompt of a group, but this "
                    f"one asked for sample {r.sample} of {r.prompt_id!r}; certify its objective in a method with "
                    "rollout StudentRollout"
                )
        texts = [(r.context_ids, paths[r.prompt_id][r.sample]) for r in requests]
        with torch.no_grad():
            rows = self.model.logprobs(texts)
        return [_write(x, written, r.sampling) for x, (_, written), r in zip(rows, texts, requests, strict=True)]

    def _paths(self, prompt_id: str) -> np.ndarray:
        name, _, number = prompt_id.partition("/")
        known = name == "state" and number.isdigit() and int(number) < len(CONTEXTS)
        return self.world.paths(int(number)) if known else np.zeros((0, LENGTH), dtype=np.int32)

    async def receive(self, weights: Any) -> Receipt:
        raise NotImplementedError("nothing is published in an enumerated world")


def _write(logprobs: Float[Tensor, "T V"], written: np.ndarray, sampling: Sampling) -> Completion:
    return Completion(
        token_ids=written,
        behavior=_said(_sampled(logprobs, sampling), written, sampling.topk),
        versions=np.zeros(len(written), dtype=np.int32),
        stop=Stop.END,
    )


def _sampled(logprobs: Float[Tensor, "T V"], sampling: Sampling) -> Float[Tensor, "T V"]:
    """The distribution that temperature and top-p really draw from."""
    if sampling.temperature == 0:
        hot = torch.nn.functional.one_hot(logprobs.argmax(-1), logprobs.shape[-1])
        return hot.to(logprobs.dtype).log()
    logprobs = (logprobs / sampling.temperature).log_softmax(-1)
    if sampling.top_p < 1:
        order = logprobs.argsort(-1, descending=True)
        before = logprobs.gather(-1, order).exp().cumsum(-1) - logprobs.gather(-1, order).exp()
        out = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p)
        logprobs = logprobs.masked_fill(out, -torch.inf).log_softmax(-1)
    return logprobs


def _said(logprobs: Float[Tensor, "T V"], written: np.ndarray, topk: int) -> TokenScores:
    own = logprobs.gather(-1, torch.as_tensor(written).long()[:, None])[:, 0].numpy()
    if not topk:
        return TokenScores(logprobs=own)
    best = logprobs.topk(topk, dim=-1)
    ids = best.indices.numpy().astype(np.int32)
    return TopKScores(logprobs=own, topk_ids=ids, topk_logprobs=best.values.numpy())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """A teacher that knows everything about itself."""

    model: TinyModel
    shift: int

    async def score(self, requests: Sequence[ScoreRequest]) -> list[TokenScores]:
        with torch.no_grad():
            hidden = self.model.readings([(r.context_ids, r.token_ids) for r in requests])
            return [self._read(h.roll(self.shift, 0), r) for h, r in zip(hidden, requests, strict=True)]

    def _read(self, hidden: Float[Tensor, "T H"], request: ScoreRequest) -> TokenScores:
        logprobs = (hidden @ self.model.head.T).log_softmax(-1)
        match request.want:
            case TopK(k=k):
                return _said(logprobs, request.token_ids, k)
            case AtIds(ids=ids):
                at = logprobs.gather(-1, torch.as_tensor(ids).long()).numpy()
                own = _said(logprobs, request.token_ids, 0).logprobs
                return TopKScores(logprobs=own, topk_ids=ids, topk_logprobs=at)
            case LastHidden():
                own = _said(logprobs, request.token_ids, 0).logprobs
                rows = RemoteRows(pieces=((hidden.numpy(), np.arange(len(own))),))
                return HiddenScores(logprobs=own, hidden=rows)
        return _said(logprobs, request.token_ids, 0)


class _Grader:
    """Rewards 0, 0.25 .. 1 that depend on every token."""

    async def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [sum(int(t) * (i + 1) for i, t in enumerate(c.split())) % 5 / 4 for c in completions]


class _Words:
    """Ids are their own names."""

    eos_id = 0

    def encode(self, text: str) -> np.ndarray:
        return np.asarray([int(word) for word in text.split()], dtype=np.int32)

    def encode_all(self, prompts: Sequence[Said]) -> list[np.ndarray]:
        return [self.encode(str(said.text)) for said in prompts]

    def decode(self, ids: np.ndarray) -> str:
        return " ".join(map(str, np.asarray(ids).tolist()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Enumerated:
    """All trajectories of a world with the testimony about them; `chances[i]` is how likely the enumerated token is.

    Trajectory `i` enumerates position `place[i]`; its states are `(prompt, position)`, each with `V` trajectories.
    """

    world: World
    scored: list[Scored[Any]]
    place: Int[np.ndarray, " n"]
    chances: Float[np.ndarray, " n"]

    def weights(self, values: Float[np.ndarray, " n"]) -> list[Float[np.ndarray, " _T"]]:
        """`values[i]` at the enumerated token of trajectory `i`, 0 at all others."""
        made = []
        for item, place, value in zip(self.scored, self.place, values, strict=True):
            weight = np.zeros(len(item.trajectory))
            weight[place] = value
            made.append(weight)
        return made

    def support_is_fixed(self) -> bool:
        """Whether the ids that were testified about are the same whatever was written at the state."""
        marks = self._support()
        return bool((marks == marks[:, :1]).all())

    def states(self, student: TinyModel, teacher: TinyModel) -> States:
        """The enumerated states, in order; differentiable in `student`."""
        firsts = [self.scored[i] for i in range(0, len(self.scored), self.world.vocabulary)]
        places = self.place[:: self.world.vocabulary]

        def at(model: TinyModel) -> Tensor:
            rows = model.logprobs([(s.trajectory.prompt.student_ids, s.trajectory.token_ids) for s in firsts])
            return torch.stack([row[p] for row, p in zip(rows, places, strict=True)])

        chances = torch.from_numpy(self.chances).reshape(len(firsts), -1)
        return States(
            student=at(student),
            teacher=at(teacher).detach(),
            behavior=chances.log(),
            support=torch.from_numpy(self._support()[:, 0]),
            credit=torch.from_numpy(self._credit()).reshape(len(firsts), -1),
        )

    def _support(self) -> np.ndarray:
        marks = np.ones((len(self.scored), self.world.vocabulary), dtype=bool)
        for mark, item, place in zip(marks, self.scored, self.place, strict=True):
            if isinstance(item.scores, TopKScores):
                mark[:] = False
                mark[np.asarray(item.scores.topk_ids)[place]] = True
        return marks.reshape(-1, self.world.vocabulary, self.world.vocabulary)

    def _credit(self) -> np.ndarray:
        return np.asarray([_credit(s.scores, int(p)) for s, p in zip(self.scored, self.place, strict=True)])


def _credit(scores: Any, place: int) -> float:
    """Signed credit of a token: an advantage, or a return; nothing where nobody gives one."""
    match scores:
        case AdvantageScores(advantages=given) | TopKReturnScores(returns=given):
            return float(given[place])
    return 0.0


async def enumerate_world(rollout: Any, scorer: Any, world: World) -> Enumerated:
    """Let `rollout` write and `scorer` read everything there is in `world`."""
    engines = world.engines()
    scored: list[Scored[Any]] = []
    for _, group in groupby(world.prompts, key=lambda prompt: prompt.id):
        trajectories: list[Trajectory] = await rollout(list(group), engines)
        testimony = await scorer(trajectories, engines)
        scored += [Scored(trajectory=t, scores=s) for t, s in zip(trajectories, testimony, strict=True)]
    v = world.vocabulary
    index = np.arange(len(scored))
    place = index // v % LENGTH
    if len(scored) != len(world.prompts) or any(
        s.trajectory.token_ids[p] != i % v for i, s, p in zip(index, scored, place, strict=True)
    ):
        raise DataError(
            f"rollout {type(rollout).__name__} does not keep what its engines write, one trajectory per prompt in "
            "order, so its states cannot be enumerated; certify its objective in a method with rollout StudentRollout"
        )
    own = [float(s.trajectory.behavior.logprobs[p]) for s, p in zip(scored, place, strict=True)]
    chances = np.exp(np.asarray(own)).reshape(-1, v)
    chances = (chances / chances.sum(-1, keepdims=True)).reshape(-1)
    return Enumerated(world=world, scored=scored, place=place, chances=chances)
