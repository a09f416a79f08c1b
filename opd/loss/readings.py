"""Readings: numbers per token of the current student and its teachers, read by the learner before a step is weighed.

Token weights see the whole step, but nothing that only the learner has: the current student's distribution, and the
teacher's over the whole vocabulary. What they need of those they declare as readings (`opd.ports.Reading`), and the
learner computes all of them in one pass without a gradient. Every reading is in nats or a share, and at temperature 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from opd.loss.chunked import Evaluate, StudentLogits, flat_loss, likeliest
from opd.ports import Reading
from opd.settings.ranges import TopIds
from opd.settings.validation import settings
from opd.types import Batch, Scores, TokenLoss, TopKScores, VocabularyScores


@torch.no_grad()
def token_readings(
    hidden: Float[Tensor, "L H"],
    head: Float[Tensor, "V H"],
    rows: Callable[[int, int], Batch[Any]],
    readings: Sequence[Reading],
    *,
    chunk: int = 0,
) -> Float32[Tensor, "R L"]:
    """All `readings` at `L` tokens, chunk by chunk as a loss is evaluated (`opd.loss.chunked.flat_loss`).

    `rows(start, stop)` is the batch of these tokens, its teachers' distributions read.
    """
    found = torch.empty((len(readings), len(hidden)), dtype=torch.float32, device=hidden.device)

    def prepare(first: int, last: int) -> Evaluate:
        there = rows(first, last)

        def evaluate(student: StudentLogits, start: int, stop: int) -> TokenLoss:
            block = there.rows(start - first, stop - first)
            for values, reading in zip(found, readings, strict=True):
                values[start:stop] = reading(student, block)
            return TokenLoss(loss=student.logits.new_zeros(stop - start), metrics={})

        return evaluate

    flat_loss(hidden, head, hidden.new_zeros(len(hidden)), prepare, chunk=chunk, overlap_k=0)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentEntropy:
    """Entropy of the student over the whole vocabulary, in nats."""

    consumes: ClassVar[type[Scores]] = Scores

    def __call__(self, student: StudentLogits, batch: Batch[Any]) -> Float[Tensor, " L"]:
        return student.entropy


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class StudentTopEntropy:
    """Entropy of the student's `k` likeliest tokens renormalized, over its greatest, log k: in [0, 1]."""

    consumes: ClassVar[type[Scores]] = Scores

    # number of likeliest tokens
    k: TopIds = 16

    def __call__(self, student: StudentLogits, batch: Batch[Any]) -> Float[Tensor, " L"]:
        p = student.logprobs
        k = min(self.k, p.shape[-1])
        top = p.gather(-1, likeliest(p, k)).log_softmax(-1)
        return -(top.exp() * top).sum(-1) / log(max(k, 2))  # of a single token it is 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherEntropy:
    """Entropy of the teacher over the whole vocabulary, in nats."""

    consumes: ClassVar[type[Scores]] = VocabularyScores

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> Float[Tensor, " L"]:
        q = batch.scores.vocabulary_logprobs
        return -torch.linalg.vecdot(q.exp(), q)


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyReverseKL:
    """KL(student||teacher) over the whole vocabulary, in nats."""

    consumes: ClassVar[type[Scores]] = VocabularyScores

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> Float[Tensor, " L"]:
        p, q = student.logprobs, batch.scores.vocabulary_logprobs
        return torch.linalg.vecdot(p.exp(), p - q)


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportReverseKL:
    """KL(student||teacher) on the scorer's support with all other ids as one outcome: at most that of all of them."""

    consumes: ClassVar[type[Scores]] = TopKScores

    def __call__(self, student: StudentLogits, batch: Batch[TopKScores]) -> Float[Tensor, " L"]:
        scores = batch.scores
        p, rest = student.at_support(scores.topk_ids), student.outside(scores.topk_ids)
        return (p.exp() * (p - scores.topk_logprobs)).sum(-1) + rest.exp() * (rest - scores.rest)


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class UnionForwardKL:
    """KL(teacher||student), both renormalized on the union of their `k` likeliest tokens (arXiv 2605.26844, D_t)."""

    consumes: ClassVar[type[Scores]] = VocabularyScores

    # likeliest tokens of each
    k: TopIds = 16

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> Float[Tensor, " L"]:
        p, q = student.logprobs, batch.scores.vocabulary_logprobs
        ids, twice = _union(p, q, min(self.k, p.shape[-1]))
        own, taught = (x.gather(-1, ids).masked_fill(twice, -torch.inf).log_softmax(-1) for x in (p, q))
        return torch.where(twice, 0.0, taught.exp() * (taught - own)).sum(-1)


def _union(
    p: Float[Tensor, "n V"], q: Float[Tensor, "n V"], k: int
) -> tuple[Int[Tensor, "n K2"], Bool[Tensor, "n K2"]]:
    """The `k` likeliest ids of both, and which of them are named for the second time."""
    own, others = likeliest(p, k), likeliest(q, k)
    again = (others[:, :, None] == own[:, None, :]).any(-1)
    return torch.cat([own, others], dim=-1), torch.cat([torch.zeros_like(again), again], dim=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class Compatibility:
    """Mass that the teacher gives to the student's `k` likeliest tokens (arXiv 2605.26844, C_t, exact)."""

    consumes: ClassVar[type[Scores]] = VocabularyScores

    # likeliest tokens of the student
    k: TopIds = 16

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> Float[Tensor, " L"]:
        p, q = student.logprobs, batch.scores.vocabulary_logprobs
        return q.gather(-1, likeliest(p, min(self.k, p.shape[-1]))).exp().sum(-1)
