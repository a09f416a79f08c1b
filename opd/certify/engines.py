"""Context of an enumerable world; nothing in them waits or is random, and they note what they were asked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int32
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
from opd.types import RemoteRows, Scores, StopReason, TokenScores
from opd.types.prompt_rows import PromptText


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What an engine was asked to write, what it wrote, and the logs of the chances with which it drew each token."""

    request: GenerateRequest
    as_teacher: bool
    token_ids: Int32[np.ndarray, " T"]
    chances: Float[Tensor, "T V"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Notes:
    """What the parts of a method asked the engines: texts by (prompt, sample), questions with a teacher's name."""

    written: dict[tuple[str, int], Written] = field(default_factory=dict)
    asked: list[tuple[str, ScoreRequest]] = field(default_factory=list)


def engines(world: World, notes: Notes) -> Context:
    """Everything that the parts of a method may call in `world`."""
    return Context(
        student=_Writer(model=world.writer, world=world, notes=notes, as_teacher=False),
        teachers={
            name: _Reader(name=name, model=model, world=world, notes=notes) for name, model in world.teachers.items()
        },
        writers={
            name: _Writer(model=model, world=world, notes=notes, as_teacher=True)
            for name, model in world.authors.items()
        },
        graders={"": EnumeratedGrader()},
        tokenizer=Words(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Writer:
    """Writes the enumerated completions, and testifies as a sampler of `model` would."""

    model: TinyModel
    world: World
    notes: Notes
    as_teacher: bool

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
        return [self._write(r, x, written) for r, x, (_, written) in zip(requests, rows, texts, strict=True)]

    def _write(self, request: GenerateRequest, logprobs: Float[Tensor, "T V"], written: np.ndarray) -> Completion:
        chances = sampled(logprobs, request.sampling)
        note = Written(request=request, as_teacher=self.as_teacher, token_ids=written, chances=chances)
        self.notes.written[request.prompt_id, request.sample] = note
        topk = request.sampling.topk
        (behavior,) = _said(chances, written, (TopK(k=topk) if topk else SampledToken(),), chances[:, :0])
        assert isinstance(behavior, TokenScores)
        return Completion(
            token_ids=written,
            behavior=behavior,
            versions=np.zeros(len(written), dtype=np.int32),
            stop=StopReason.END,
        )

    def _paths(self, prompt_id: str) -> list[np.ndarray]:
        name, _, number = prompt_id.partition("/")
        known = name == "state" and number.isdigit() and int(number) < len(self.world.contexts)
        return self.world.paths(int(number)) if known else []

    async def receive(self, weights: Any) -> WeightAck:
        raise NotImplementedError("nothing is published in an enumerated world")


def sampled(logprobs: Float[Tensor, "T V"], sampling: Sampling) -> Float[Tensor, "T V"]:
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


def _said(
    logprobs: Float[Tensor, "T V"], written: np.ndarray, kinds: Sequence[ScoreKind[Scores]], hidden: Tensor
) -> ScoreAnswer:
    """What a model with these log-probabilities and hidden states answers to each kind."""
    ids, total = torch.as_tensor(written).long(), logprobs.new_zeros(len(logprobs), 1)
    rows = LogitRows.of(logprobs, total, ids, max((kind.depth for kind in kinds), default=0))
    return tuple(kind.answer(**_arrays(kind.read(rows)), **_states(kind, hidden)) for kind in kinds)


def _arrays(read: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Integers as they travel, other numbers as exact as they are."""
    return {name: (x if x.is_floating_point() else x.to(torch.int32)).numpy() for name, x in read.items()}


def _states(kind: ScoreKind[Scores], hidden: Tensor) -> dict[str, RemoteRows]:
    pieces = ((_words(hidden), np.arange(len(hidden))),)
    return {column.name: RemoteRows(pieces=pieces) for column in kind.columns() if column.remote}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """A teacher that knows everything about itself."""

    name: str
    model: TinyModel
    world: World
    notes: Notes

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreAnswer]:
        _check_readable(requests, self.world.vocabulary)
        self.notes.asked.extend((self.name, request) for request in requests)
        with torch.no_grad():
            hidden = self.model.readings([(r.context_ids, r.token_ids) for r in requests])
            return [self._read(h.roll(self.world.shift, 0), r) for h, r in zip(hidden, requests, strict=True)]

    def _read(self, hidden: Float[Tensor, "T H"], request: ScoreRequest) -> ScoreAnswer:
        logprobs = self.model.logits(hidden).log_softmax(-1)
        if 0 <= self.world.doubt < len(request.token_ids):
            logprobs[self.world.doubt, int(request.token_ids[self.world.doubt])] -= 1.0
            logprobs = logprobs.log_softmax(-1)
        return _said(logprobs, request.token_ids, request.kinds, hidden)


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
    """As hidden states travel: bfloat16 as 16-bit words."""
    if hidden.dtype == torch.bfloat16:
        return hidden.contiguous().view(torch.int16).numpy().view(np.uint16)
    return hidden.numpy()


class EnumeratedGrader:
    """Rewards 0, 0.25 .. 1 that depend on every token."""

    async def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [reward(completion) for completion in completions]


def reward(completion: str) -> float:
    """What the grader gives."""
    return sum(int(t) * (i + 1) for i, t in enumerate(completion.split())) % 5 / 4


class Words:
    """Ids are their own names."""

    eos_id = 0

    def encode(self, text: str) -> np.ndarray:
        return np.asarray([int(word) for word in text.split()], dtype=np.int32)

    def encode_all(self, prompts: Sequence[PromptText]) -> list[np.ndarray]:
        return [self.encode(str(said.text)) for said in prompts]

    def decode(self, ids: np.ndarray) -> str:
        return " ".join(map(str, np.asarray(ids).tolist()))
