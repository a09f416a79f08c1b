"""Checks of the doctor that the learner answers: its log-probabilities against those of teacher and engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from opd.doctor.findings import Evidence, Finding, Subject, fine, refused
from opd.loss.chunked import StudentLogits
from opd.loss.packing import TokenMean, pack
from opd.method.method import loss_masks
from opd.scorers.teacher import TeacherHidden
from opd.types import Batch, Scored, Scores, TokenLoss, Trajectory, VocabularyScores


@dataclass(frozen=True, slots=True, kw_only=True)
class _HeadGap:
    """|teacher's own log-probability of the sampled token - that from its hidden states|, as a metric."""

    consumes: ClassVar[type[Scores]] = VocabularyScores

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> TokenLoss:
        read = torch.as_tensor(batch.scores.vocabulary_logprobs).gather(-1, batch.target_ids[:, None])[:, 0]
        gap = (read - batch.scores.logprobs).abs()
        return TokenLoss(loss=gap, metrics={"gap": gap})


@dataclass(frozen=True, slots=True, kw_only=True)
class _WriterGap:
    """|learner - engine| logprob of the sampled token, as a metric."""

    consumes: ClassVar[type[Scores]] = Scores

    def __call__(self, student: StudentLogits, batch: Batch[Scores]) -> TokenLoss:
        gap: Float[Tensor, " L"] = (student.at(batch.target_ids) - batch.behavior_logprobs).abs()
        return TokenLoss(loss=gap, metrics={"gap": gap})


async def hidden_states(subject: Subject, evidence: Evidence) -> Finding:
    """Check that hidden states times the output matrix of the learner repeat the teacher's own logprobs."""
    scores = await TeacherHidden()(evidence.written, subject.context)
    gap = (await _evaluated(subject, evidence.written, scores, _HeadGap()))["gap"]
    measured = f"{gap:.2g} nats on average between logprobs and hidden states"
    if not gap <= subject.thresholds.mean_tolerance:
        return refused(
            "hidden states",
            measured,
            f"the hidden states of teacher {subject.name!r}, read with the output matrix of its checkpoint, give "
            "other logprobs than it says itself; another checkpoint, a temperature or a final norm is in between",
        )
    return fine("hidden states", measured)


async def engine_equals_learner(subject: Subject, evidence: Evidence) -> Finding:
    """Check that the learner scores the engine's text as the engine did: the learner as the student's teacher."""
    nothing = [Scores() for _ in evidence.written]
    gap = (await _evaluated(subject, evidence.written, nothing, _WriterGap()))["gap"]
    measured = f"{gap:.2g} nats on average between engine and learner"
    if not gap <= subject.thresholds.mean_tolerance:
        return refused(
            "engine and learner",
            measured,
            "the student's engine and the learner disagree about what the engine wrote; sampling is not at temperature "
            "1, or one of them holds another checkpoint or dtype: make student.path and dtypes agree",
        )
    return fine("engine and learner", measured)


async def _evaluated(
    subject: Subject, written: Sequence[Trajectory], scores: Sequence[Scores], objective: _HeadGap | _WriterGap
) -> Mapping[str, float]:
    scored = [Scored(trajectory=t, scores=s) for t, s in zip(written, scores, strict=True)]
    batches = pack(scored, loss_masks(scored), subject.learner.layout, TokenMean())
    return await subject.learner.evaluate(batches, objective)
