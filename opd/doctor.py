"""Is this teacher fit to teach this student? Probes of the running parts, through the ports alone.

Every check asks one question and answers with a `Finding`: what was measured, and, where training would be wrong, a
sentence that says why and what to do. Nothing here needs a second model to compare with: a shifted, renormalised or
unsteady teacher contradicts itself. The probes cost a few short completions and a dozen teacher calls.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from opd.errors import DataError
from opd.logits import StudentLogits
from opd.method import weigh
from opd.packing import TokenMean, pack
from opd.ports import (
    Engines,
    Kinds,
    LastHidden,
    Learner,
    LogprobTeacher,
    Sampling,
    ScoreRequest,
    TextEngine,
    TopK,
    Want,
    WrittenToken,
)
from opd.rollouts.student import write
from opd.scorers.reward import task_rewards
from opd.scorers.teacher import TeacherHidden
from opd.scorers.testimony import verify
from opd.types import (
    Batch,
    Prompt,
    Scored,
    Scores,
    Stop,
    TokenLoss,
    TokenScores,
    TopKScores,
    Trajectory,
    VocabularyScores,
)


class Verdict(Enum):
    """What a finding means for the run."""

    FINE = "fine"
    WARNING = "warning"  # training is right, but may not be what is wanted
    REFUSED = "refused"  # training would be wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """`measured` is for people; `sentence` is empty when all is well."""

    check: str
    verdict: Verdict
    measured: str
    sentence: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """Where a finding stops being fine. Chosen by us; no paper gives them, except where named.

    `tolerance`: nats by which two readings of the same text may differ (float32; bfloat16 kernels differ by up to
    0.3). `overlap`: share of the student's top-k that the teacher's holds below which a cold start is advised
    (successful runs of arXiv 2604.13016 start at about 0.72). `surprise`: nats of the teacher's mean logprob at
    special places (first token, end of text) under which it does not expect what the student does there.
    """

    tolerance: float = 1e-3
    overlap: float = 0.4
    surprise: float = 12.0
    padding_mass: float = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Patient:
    """A student, its learner and one teacher, as the run will use them.

    `replicas` are the teacher's members one by one (and, to compare backends, the same teacher on another one);
    `answers` are the request kinds it can answer; `vocabulary` counts the tokenizer's tokens (columns beyond are
    padding); `twin` is a teacher of the same backend made from the student's checkpoint; `support` is the k of top-k
    probes; `exact` says that the learner can read hidden states with the teacher's output matrix.
    """

    name: str
    engines: Engines
    learner: Learner
    replicas: Sequence[LogprobTeacher]
    answers: Kinds
    vocabulary: int
    twin: LogprobTeacher | None = None
    support: int = 16
    exact: bool = True
    thresholds: Thresholds = Thresholds()

    @property
    def teacher(self) -> LogprobTeacher:
        """The teacher as the run asks it."""
        return self.engines.teachers[self.name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Short completions of the student (with its top-k), and what the teacher says of their tokens."""

    written: Sequence[Trajectory]
    said: Sequence[TokenScores]


Check = Callable[[Patient, Evidence], Awaitable[Finding]]


async def examine(patient: Patient, prompts: Sequence[Prompt], max_tokens: int) -> list[Finding]:
    """All findings about `patient`; stops after the first check if the teacher's answers cannot be read at all."""
    sampling = Sampling(max_tokens=max_tokens, topk=min(patient.support, patient.vocabulary))
    written = await write(prompts, patient.engines.student, sampling)
    try:
        said = await _ask(patient.teacher, written, WrittenToken())
    except DataError as error:
        return [_refused("answers", "unreadable", f"teacher {patient.name!r} cannot be used: {error}")]
    evidence = Evidence(written=written, said=said)
    fine = Finding(check="answers", verdict=Verdict.FINE, measured=f"{sum(map(len, written))} tokens scored")
    return [fine, *[await check(patient, evidence) for check in _checks(patient)]]


def _checks(patient: Patient) -> Sequence[Check]:
    checks: list[Check] = [causality, steadiness, replicas_agree]
    if TopK in patient.answers:
        checks += [full_softmax, padding, overlap]
    if LastHidden in patient.answers and patient.exact:
        checks += [hidden_states]
    if patient.twin is not None:
        checks += [own_teacher]
    return [*checks, engine_equals_learner, first_token, end_of_text]


async def causality(patient: Patient, evidence: Evidence) -> Finding:
    """Change one token: what stands before it must not notice, and it must.

    An answer that is one position early or late fails one of the two, without any reference to compare with.
    """
    changed, places = [], []
    for number, trajectory in enumerate(t for t in evidence.written if len(t) > 1):
        place = 1 + number % (len(trajectory) - 1)
        ids = trajectory.token_ids.copy()
        ids[place] = (ids[place] + 1) % patient.vocabulary
        changed.append(replace(trajectory, token_ids=ids))
        places.append(place)
    if not changed:
        return _warned("alignment", "no completion has two tokens", "alignment of teacher and student is unknown")
    plain = [s for t, s in zip(evidence.written, evidence.said, strict=True) if len(t) > 1]
    again = await _ask(patient.teacher, changed, WrittenToken())
    before = max(_gap(a, b, 0, at) for a, b, at in zip(plain, again, places, strict=True))
    here = float(np.median([_gap(a, b, at, at + 1) for a, b, at in zip(plain, again, places, strict=True)]))
    tolerance = patient.thresholds.tolerance
    measured = f"changed token: {here:.2g} nats at it, {before:.2g} before it"
    if before > tolerance:
        return _refused(
            "alignment",
            measured,
            f"teacher {patient.name!r} is one position early: changing a token changes what it says of the token "
            "before; shift its answers, or check the server's prompt_logprobs offset",
        )
    if here <= tolerance:
        return _refused(
            "alignment",
            measured,
            f"teacher {patient.name!r} is late: changing a token does not change what it says of it; shift its "
            "answers, or check the server's prompt_logprobs offset",
        )
    return _fine("alignment", measured)


async def steadiness(patient: Patient, evidence: Evidence) -> Finding:
    """The same text in other company and order gets the same answer."""
    backwards = (await _ask(patient.teacher, evidence.written[::-1], WrittenToken()))[::-1]
    alone = await _ask(patient.teacher, evidence.written[:1], WrittenToken())
    gap = max(*[_gap(a, b) for a, b in zip(evidence.said, backwards, strict=True)], _gap(evidence.said[0], alone[0]))
    measured = f"{gap:.2g} nats between orders"
    if gap > patient.thresholds.tolerance:
        return _refused(
            "steadiness",
            measured,
            f"teacher {patient.name!r} answers differently when requests come in another order or alone; its answers "
            "are swapped between requests, or its kernels depend on the batch: use dtype FLOAT32, or mend the server",
        )
    return _fine("steadiness", measured)


async def replicas_agree(patient: Patient, evidence: Evidence) -> Finding:
    """Every member of the pool is the same teacher."""
    if len(patient.replicas) < 2:
        return _fine("replicas", "one replica")
    worst = 0.0
    for number, replica in enumerate(patient.replicas):
        answers = await _ask(replica, evidence.written[:4], WrittenToken())
        gap = max(_gap(a, b) for a, b in zip(evidence.said, answers, strict=False))
        worst = max(worst, gap)
        if gap > patient.thresholds.tolerance:
            return _refused(
                "replicas",
                f"replica {number} differs by {gap:.2g} nats",
                f"the replicas of teacher {patient.name!r} disagree; replica {number} serves another checkpoint or "
                "dtype: restart it with the same path",
            )
    return _fine("replicas", f"{len(patient.replicas)} agree within {worst:.2g} nats")


async def full_softmax(patient: Patient, evidence: Evidence) -> Finding:
    """Top-k logprobs are under the full softmax, not renormalised on the k, and know the written token."""
    wide = await _topk(patient, evidence)
    few = [s for s in await _ask(patient.teacher, evidence.written, TopK(k=2)) if isinstance(s, TopKScores)]
    gap = max(
        float(np.abs(np.asarray(w.topk_logprobs)[:, :2] - np.asarray(f.topk_logprobs)).max())
        for w, f in zip(wide, few, strict=True)
    )
    mass = max(float(np.exp(np.asarray(w.topk_logprobs)).sum(-1).max()) for w in wide)
    inside = [
        np.abs(np.asarray(w.topk_logprobs) - np.asarray(s.logprobs)[:, None])[np.asarray(w.topk_ids) == ids[:, None]]
        for w, s, ids in zip(wide, evidence.said, [t.token_ids for t in evidence.written], strict=True)
    ]
    written = float(max((part.max() for part in inside if len(part)), default=0.0))
    tolerance = patient.thresholds.tolerance
    measured = (
        f"top-2 of 2 and of {patient.support} differ by {gap:.2g}, written token by {written:.2g}, mass {mass:.4f}"
    )
    if gap > tolerance or mass > 1 + tolerance:
        return _refused(
            "full softmax",
            measured,
            f"teacher {patient.name!r} renormalises its top-k: the same token has another logprob for another k; it "
            "must answer with logprobs of the full softmax at temperature 1",
        )
    if written > tolerance:
        return _refused(
            "full softmax",
            measured,
            f"teacher {patient.name!r} says two things of one token, as written and within its top-k; its ids or "
            "positions are mixed up: mend the server",
        )
    return _fine("full softmax", measured)


async def padding(patient: Patient, evidence: Evidence) -> Finding:
    """Columns of the output beyond the tokenizer hold no probability."""
    wide = await _topk(patient, evidence)
    said = [(w.topk_ids, w.topk_logprobs) for w in wide] + [
        (b.topk_ids, b.topk_logprobs) for t in evidence.written if isinstance(b := t.behavior, TopKScores)
    ]
    mass = max(float((np.exp(lp) * (np.asarray(ids) >= patient.vocabulary)).sum(-1).max()) for ids, lp in said)
    measured = f"mass {mass:.2g} beyond {patient.vocabulary} tokens"
    if mass > patient.thresholds.padding_mass:
        return _refused(
            "padding",
            measured,
            f"student or teacher {patient.name!r} gives probability to ids that are no tokens; the checkpoint and the "
            "tokenizer do not belong together: copy the right tokenizer",
        )
    return _fine("padding", measured)


async def overlap(patient: Patient, evidence: Evidence) -> Finding:
    """How many of the student's likeliest tokens are among the teacher's (arXiv 2604.13016, overlap ratio)."""
    wide = await _topk(patient, evidence)
    shares = [
        (np.asarray(b.topk_ids)[:, :, None] == np.asarray(w.topk_ids)[:, None, :]).any(-1).mean(-1)
        for t, w in zip(evidence.written, wide, strict=True)
        if isinstance(b := t.behavior, TopKScores)
    ]
    ratio = float(np.concatenate(shares).mean())
    if ratio < patient.thresholds.overlap:
        return _warned(
            "overlap",
            f"{ratio:.2f} at k={patient.support}: cold-start first",
            f"only {ratio:.0%} of the student's likeliest tokens are among those of teacher {patient.name!r}; such "
            "pairs learn badly on-policy: train on the teacher's text first (method=sft), then distil",
        )
    return _fine("overlap", f"{ratio:.2f} at k={patient.support}: compatible")


@dataclass(frozen=True, slots=True, kw_only=True)
class _HeadGap:
    """|what the teacher said of the written token - what its hidden states say of it|, as a metric."""

    @property
    def consumes(self) -> type[Scores]:
        return VocabularyScores

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> TokenLoss:
        read = torch.as_tensor(batch.scores.vocabulary_logprobs).gather(-1, batch.target_ids[:, None])[:, 0]
        gap = (read - batch.scores.logprobs).abs()
        return TokenLoss(loss=gap, metrics={"gap": gap})


@dataclass(frozen=True, slots=True, kw_only=True)
class _WriterGap:
    """|learner - engine| logprob of the written token, as a metric."""

    @property
    def consumes(self) -> type[Scores]:
        return Scores

    def __call__(self, student: StudentLogits, batch: Batch[Scores]) -> TokenLoss:
        gap: Float[Tensor, " L"] = (student.at(batch.target_ids) - batch.behavior_logprobs).abs()
        return TokenLoss(loss=gap, metrics={"gap": gap})


async def hidden_states(patient: Patient, evidence: Evidence) -> Finding:
    """Hidden states, read with the output matrix that the learner loaded, repeat the teacher's own logprobs."""
    said = await TeacherHidden()(evidence.written, patient.engines)
    gap = (await _evaluated(patient, evidence.written, said, _HeadGap()))["gap"]
    measured = f"{gap:.2g} nats between logprobs and hidden states"
    if gap > patient.thresholds.tolerance:
        return _refused(
            "hidden states",
            measured,
            f"the hidden states of teacher {patient.name!r}, read with the output matrix of its checkpoint, give "
            "other logprobs than it says itself; another checkpoint, a temperature or a final norm is in between",
        )
    return _fine("hidden states", measured)


async def engine_equals_learner(patient: Patient, evidence: Evidence) -> Finding:
    """What the learner says of what the engine wrote is what the engine said: the learner as the student's teacher."""
    nothing = [Scores() for _ in evidence.written]
    gap = (await _evaluated(patient, evidence.written, nothing, _WriterGap()))["gap"]
    measured = f"{gap:.2g} nats between engine and learner"
    if gap > patient.thresholds.tolerance:
        return _refused(
            "engine and learner",
            measured,
            "the student's engine and the learner disagree about what the engine wrote; sampling is not at temperature "
            "1, or one of them holds another checkpoint or dtype: make student.path and dtypes agree",
        )
    return _fine("engine and learner", measured)


async def first_token(patient: Patient, evidence: Evidence) -> Finding:
    """A chat template or thinking mode that differs shows at the first token of a completion."""
    teacher = float(np.mean([np.asarray(s.logprobs)[0] for s in evidence.said]))
    student = float(np.mean([np.asarray(t.behavior.logprobs)[0] for t in evidence.written]))
    measured = f"mean logprob of the first token: student {student:.2f}, teacher {teacher:.2f}"
    if student - teacher > patient.thresholds.surprise:
        return _refused(
            "first token",
            measured,
            f"teacher {patient.name!r} does not expect how completions begin; its chat template or thinking mode ends "
            "elsewhere: render the prompt with the teacher's template up to where the assistant writes",
        )
    return _fine("first token", measured)


async def end_of_text(patient: Patient, evidence: Evidence) -> Finding:
    """The token that ends a completion is one with which the teacher ends texts, too."""
    ends = [
        float(np.asarray(s.logprobs)[-1])
        for t, s in zip(evidence.written, evidence.said, strict=True)
        if t.stop is Stop.END
    ]
    if not ends:
        return _fine("end of text", "no completion ended within the probe")
    typical = float(np.median(ends))
    measured = f"median teacher logprob of the end: {typical:.2f} ({len(ends)} completions)"
    if typical < -patient.thresholds.surprise:
        return _refused(
            "end of text",
            measured,
            f"teacher {patient.name!r} does not know the token that ends the student's completions as an end; the "
            "student would learn never to stop: use one end-of-text id for both (eos_token_id)",
        )
    return _fine("end of text", measured)


async def own_teacher(patient: Patient, evidence: Evidence) -> Finding:
    """A teacher of the same backend that holds the student's checkpoint says what the student said: KL 0."""
    assert patient.twin is not None
    said = await _ask(patient.twin, evidence.written, WrittenToken())
    gap = max(_gap(t.behavior, s) for t, s in zip(evidence.written, said, strict=True))
    measured = f"{gap:.2g} nats from its own text"
    if gap > patient.thresholds.tolerance:
        return _refused(
            "own teacher",
            measured,
            f"a student that is its own teacher would still be moved: the backend of teacher {patient.name!r} reads "
            "the student's checkpoint otherwise than the rollout engine; use equal dtypes, or another teacher.backend",
        )
    return _fine("own teacher", measured)


async def teacher_gain(engines: Engines, writer: TextEngine, prompts: Sequence[Prompt], max_tokens: int) -> Finding:
    """Does the teacher end the student's half-written texts better than the student (arXiv 2604.13016, 6.1)?

    Both write on from the middle of the student's own completions; the task's grader judges the whole texts.
    """
    sampling = Sampling(max_tokens=max_tokens)
    written = await write(prompts, engines.student, sampling)
    halves = [t.token_ids[: len(t) // 2] for t in written]
    begun = [
        replace(p, id=f"{p.id}/gain", student_ids=np.concatenate([p.student_ids, half]))
        for p, half in zip(prompts, halves, strict=True)
    ]
    shares = []
    for engine in (engines.student, writer):
        rests = [Sampling(max_tokens=max(1, max_tokens - len(half))) for half in halves]
        ended = await asyncio.gather(*[write([p], engine, rest) for p, rest in zip(begun, rests, strict=True)])
        whole = [_after(half, t) for half, (t,) in zip(halves, ended, strict=True)]
        shares.append(float(np.mean(await task_rewards(whole, engines))))
    student, teacher = shares
    measured = f"from {len(prompts)} half-written texts: student {student:.1%}, teacher {teacher:.1%}"
    if teacher <= student:
        return _warned(
            "teacher gain",
            measured,
            "the teacher does not end the student's texts better than the student; there is little to learn on-policy",
        )
    return _fine("teacher gain", measured)


def _after(half: np.ndarray, rest: Trajectory) -> Trajectory:
    """A text in two parts, for a grader: what was said of its tokens is left out."""
    ids = np.concatenate([half, rest.token_ids]).astype(np.int32)
    nothing = TokenScores(logprobs=np.zeros(len(ids), dtype=np.float32))
    versions, mask = np.zeros(len(ids), dtype=np.int32), np.ones(len(ids), dtype=bool)
    return replace(rest, token_ids=ids, behavior=nothing, versions=versions, loss_mask=mask)


async def _ask(teacher: LogprobTeacher, written: Sequence[Trajectory], want: Want) -> list[TokenScores]:
    requests = [ScoreRequest(context_ids=t.prompt.teacher_ids, token_ids=t.token_ids, want=want) for t in written]
    answers = await teacher.score(requests)
    verify(requests, answers)
    return list(answers)


async def _topk(patient: Patient, evidence: Evidence) -> list[TopKScores]:
    k = min(patient.support, patient.vocabulary)
    answers = await _ask(patient.teacher, evidence.written, TopK(k=k))
    return [a for a in answers if isinstance(a, TopKScores)]


async def _evaluated(
    patient: Patient, written: Sequence[Trajectory], said: Sequence[Scores], objective: _HeadGap | _WriterGap
) -> Mapping[str, float]:
    scored = [Scored(trajectory=t, scores=s) for t, s in zip(written, said, strict=True)]
    batches = pack(scored, weigh({}, scored), patient.learner.layout, TokenMean())
    return await patient.learner.evaluate(batches, objective)


def _gap(a: TokenScores, b: TokenScores, start: int = 0, stop: int | None = None) -> float:
    difference = np.abs(np.asarray(a.logprobs)[start:stop] - np.asarray(b.logprobs)[start:stop])
    return float(difference.max()) if len(difference) else 0.0


def _fine(check: str, measured: str) -> Finding:
    return Finding(check=check, verdict=Verdict.FINE, measured=measured)


def _warned(check: str, measured: str, sentence: str) -> Finding:
    return Finding(check=check, verdict=Verdict.WARNING, measured=measured, sentence=sentence)


def _refused(check: str, measured: str, sentence: str) -> Finding:
    return Finding(check=check, verdict=Verdict.REFUSED, measured=measured, sentence=sentence)
