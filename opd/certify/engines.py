"""Engines of an enumerable world, without randomness; they log their requests, and let other calls run first."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from zlib import crc32

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32
from torch import Tensor

from opd.certify.models import TinyModel
from opd.certify.worlds import World
from opd.errors import ConfigurationError
from opd.ports import (
    Completion,
    Context,
    GenerateRequest,
    LogitRows,
    SampledToken,
    Sampling,
    ScoreAnswer,
    ScoreKind,
    ScoreRequest,
    TopK,
    WeightAck,
)
from opd.rollouts.trust_region import blended
from opd.types import RemoteRows, Scores, StopReason, TokenScores
from opd.types.prompt_rows import PromptText

END = 5  # the id after which a continuation ends; a likely one would leave nothing to align
VERSION = 7  # of the policy that writes in a world, where no text may say that another one did


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Log entry of a generation: request, completion, and the log-probabilities that its tokens were sampled with."""

    request: GenerateRequest
    as_teacher: bool
    completion: Completion
    logprobs: Float[Tensor, "T V"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLog:
    """Requests of a method's parts: generations by (prompt id, sample), score requests with the teacher's name.

    `continuations` are requests to a teacher to go on from anywhere: those whose prompt id is none of the world's.
    """

    generations: dict[tuple[str, int], Generation] = field(default_factory=dict)
    continuations: list[GenerateRequest] = field(default_factory=list)
    score_requests: list[tuple[str, ScoreRequest]] = field(default_factory=list)


def engines(world: World, log: RequestLog) -> Context:
    """Context of all engines that the parts of a method may call in `world`."""
    return Context(
        student=_Generator(model=world.behavior, world=world, log=log, as_teacher=False),
        teachers={
            name: _Teacher(name=name, model=model, world=world, log=log) for name, model in world.teachers.items()
        },
        writers={
            name: _Generator(model=model, world=world, log=log, as_teacher=True)
            for name, model in world.writers.items()
        },
        graders={"": EnumeratedGrader()},
        tokenizer=IdTokenizer(),
        embeddings=_StudentEmbeddings(model=world.student),
        step=world.step,
        steps=world.steps,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _StudentEmbeddings:
    """Input embeddings of a tiny student."""

    model: TinyModel

    def rows(self, ids: Int32[np.ndarray, " n"]) -> Float32[np.ndarray, "n H"]:
        return self.model.embedding[torch.from_numpy(ids).long()].detach().float().numpy()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Generator:
    """Engine that returns the enumerated completions, with the log-probabilities of a sampler of `model`.

    As a teacher it also goes on from any context (`continuation`), for a request that names no prompt of the world.
    """

    model: TinyModel
    world: World
    log: RequestLog
    as_teacher: bool

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        await asyncio.sleep(0)
        if self.as_teacher and not any(self._completions(r.prompt_id) for r in requests):
            self.log.continuations.extend(requests)
            return [self._continue(r) for r in requests]
        completions = {name: self._completions(name) for name in {r.prompt_id for r in requests}}
        for r in requests:
            if r.sample >= len(completions[r.prompt_id]):
                raise ConfigurationError(
                    "the certificate can enumerate rollouts that generate once for every prompt of a group, but this "
                    f"one asked for sample {r.sample} of {r.prompt_id!r}; certify its objective in a method with "
                    "rollout StudentRollout"
                )
        texts = [(r.context_ids, completions[r.prompt_id][r.sample]) for r in requests]
        with torch.no_grad():
            rows = self.model.logprobs(texts)
            rows = [self._blended(r, x, text) for r, x, text in zip(requests, rows, texts, strict=True)]
        return [self._complete(r, x, token_ids) for r, x, (_, token_ids) in zip(requests, rows, texts, strict=True)]

    def _blended(
        self, request: GenerateRequest, logprobs: Float[Tensor, "T V"], text: tuple[np.ndarray, np.ndarray]
    ) -> Float[Tensor, "T V"]:
        """Logits whose softmax at the request's temperature is the blend that it asks for."""
        if request.blend is None:
            return logprobs
        (teacher,) = self.world.teachers[request.blend.teacher].logprobs([text])
        temperature, budget = request.sampling.temperature, logprobs.new_full(logprobs.shape[:1], request.blend.budget)
        return (blended(logprobs / temperature, teacher / temperature, budget).logprobs * temperature).to(logprobs)

    def _complete(self, request: GenerateRequest, logprobs: Float[Tensor, "T V"], token_ids: np.ndarray) -> Completion:
        logprobs = sampled(logprobs, request.sampling)
        topk = request.sampling.topk
        (behavior,) = _answer(logprobs, token_ids, (TopK(k=topk) if topk else SampledToken(),), logprobs[:, :0])
        assert isinstance(behavior, TokenScores)
        completion = Completion(
            token_ids=token_ids,
            behavior=behavior,
            versions=np.full(len(token_ids), VERSION, dtype=np.int32),
            stop=StopReason.LENGTH if self.world.cut and request.sample % 2 else StopReason.END,
            digests={VERSION: "published"},
        )
        kept = replace(  # the rollout gets arrays of its own, and may write into them
            completion,
            token_ids=token_ids.copy(),
            behavior=behavior.take(np.arange(len(token_ids))),
            versions=completion.versions.copy(),
        )
        generation = Generation(request=request, as_teacher=self.as_teacher, completion=kept, logprobs=logprobs)
        self.log.generations[request.prompt_id, request.sample] = generation
        return completion

    def _continue(self, request: GenerateRequest) -> Completion:
        token_ids = continuation(self.model, request.context_ids, request.sampling)
        zeros = np.zeros(len(token_ids), dtype=np.float32)  # of a text that no objective learns
        ended = StopReason.END if token_ids[-1] == END else StopReason.LENGTH
        versions = zeros.astype(np.int32)
        return Completion(token_ids=token_ids, behavior=TokenScores(logprobs=zeros), versions=versions, stop=ended)

    def _completions(self, prompt_id: str) -> list[np.ndarray]:
        name, _, number = prompt_id.partition("/")
        known = name == "state" and number.isdigit() and int(number) < len(self.world.contexts)
        return self.world.completions(int(number)) if known else []

    async def receive(self, weights: Any) -> WeightAck:
        raise NotImplementedError("nothing is published in an enumerated world")


def continuation(model: TinyModel, context_ids: np.ndarray, sampling: Sampling) -> Int32[np.ndarray, " T"]:
    """Text that a model writes behind a context, up to the id `END`; draws are seeded by the context."""
    draw = np.random.default_rng(np.asarray(context_ids, dtype=np.int64))
    ids = np.zeros(0, dtype=np.int32)
    while len(ids) < sampling.max_tokens and (not len(ids) or ids[-1] != END):
        with torch.no_grad():
            row = model.logprobs([(context_ids, np.append(ids, 0))])[0][-1:]
        p = sampled(row, sampling)[0].double().exp().numpy()
        ids = np.append(ids, draw.choice(len(p), p=p / p.sum())).astype(np.int32)
    return ids


def sampled(logprobs: Float[Tensor, "T V"], sampling: Sampling) -> Float[Tensor, "T V"]:
    """Distribution that tokens are sampled from, after temperature and top-p."""
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


def _answer(
    logprobs: Float[Tensor, "T V"], token_ids: np.ndarray, kinds: Sequence[ScoreKind[Scores]], hidden: Tensor
) -> ScoreAnswer:
    """Scores of each kind from log-probabilities and hidden states."""
    ids, total = torch.as_tensor(token_ids).long(), logprobs.new_zeros(len(logprobs), 1)
    rows = LogitRows.of(logprobs, total, ids, max((kind.depth for kind in kinds), default=0))
    return tuple(kind.answer(**_arrays(kind.read(rows)), **_states(kind, hidden)) for kind in kinds)


def _arrays(read: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Numpy arrays: integers as int32, as they travel; floats in their own precision."""
    return {name: (x if x.is_floating_point() else x.to(torch.int32)).numpy() for name, x in read.items()}


def _states(kind: ScoreKind[Scores], hidden: Tensor) -> dict[str, RemoteRows]:
    pieces = ((_words(hidden), np.arange(len(hidden))),)
    return {column.name: RemoteRows(pieces=pieces) for column in kind.columns() if column.remote}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Teacher:
    """Teacher that answers all score kinds."""

    name: str
    model: TinyModel
    world: World
    log: RequestLog

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreAnswer]:
        await asyncio.sleep(0)
        _check_readable(requests, self.world.vocabulary)
        self.log.score_requests.extend((self.name, request) for request in requests)
        with torch.no_grad():
            hidden = self.model.hidden_states([(r.context_ids, r.token_ids) for r in requests])
            return [self._answer(h.roll(self.world.shift, 0), r) for h, r in zip(hidden, requests, strict=True)]

    def _answer(self, hidden: Float[Tensor, "T H"], request: ScoreRequest) -> ScoreAnswer:
        logprobs = self.model.logits(hidden).log_softmax(-1)
        if 0 <= self.world.perturbed_position < len(request.token_ids):
            position = self.world.perturbed_position
            logprobs[position, int(request.token_ids[position])] -= 1.0
            logprobs = logprobs.log_softmax(-1)
        return _answer(logprobs, request.token_ids, request.kinds, hidden)


def _check_readable(requests: Sequence[ScoreRequest], vocabulary: int) -> None:
    for request in requests:
        for kind in request.kinds:
            problem = kind.unreadable(len(request.token_ids), vocabulary, vocabulary)
            if problem:
                raise ConfigurationError(
                    f"the certificate has a vocabulary of {vocabulary} ids and cannot give {kind.asked()}: {problem}; "
                    "call the setting of the scorer that counts ids `k`, which the certificate lowers, or set it lower"
                )


def _words(hidden: Tensor) -> np.ndarray:
    """Hidden states as they travel: bfloat16 as 16-bit words."""
    if hidden.dtype == torch.bfloat16:
        return hidden.contiguous().view(torch.int16).numpy().view(np.uint16)
    return hidden.numpy()


class EnumeratedGrader:
    """Grader with rewards 0, 0.25 .. 1 that depend on every token."""

    async def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        await asyncio.sleep(0)
        return [reward(completion) for completion in completions]


def reward(completion: str) -> float:
    """Reward of a completion."""
    return sum(int(t) * (i + 1) for i, t in enumerate(completion.split())) % 5 / 4


class IdTokenizer:
    """Tokenizer whose tokens are the decimal ids; any other word is one of the first seven."""

    eos_id = 0

    def encode(self, text: str) -> np.ndarray:
        ids = [int(word) if word.isdecimal() else crc32(word.encode()) % 7 for word in text.split()]
        return np.asarray(ids, dtype=np.int32)

    def encode_all(self, prompts: Sequence[PromptText]) -> list[np.ndarray]:
        return [self.encode(str(prompt.text)) for prompt in prompts]

    def decode(self, ids: np.ndarray) -> str:
        return " ".join(map(str, np.asarray(ids).tolist()))
