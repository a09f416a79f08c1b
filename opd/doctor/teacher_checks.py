"""Checks of a teacher: one property each, measured on the teacher's scores of the student's texts.

None needs a second model to compare with: a shifted, renormalized or unsteady teacher contradicts itself.
"""

from dataclasses import replace

import numpy as np

from opd.doctor.findings import Evidence, Finding, Subject, ask, distance, fine, refused, warned
from opd.ports import SampledToken, TopK
from opd.types import StopReason, TopKScores, Trajectory
from opd.types.log_probs import ROUNDING


async def causality(subject: Subject, evidence: Evidence) -> Finding:
    """Causality: a changed token must change scores from its place on, and none before it.

    An answer that is one position early or late fails one of the two, without any reference to compare with: the change
    at the token is compared with the changes before and behind it, and with what the same question asked twice gives.
    """
    texts = [(t, s) for t, s in zip(evidence.written, evidence.scores, strict=True) if len(t) > 1]
    if not texts:
        return warned("alignment", "no completion has two tokens", "alignment of teacher and student is unknown")
    written, plain = [t for t, _ in texts], [s for _, s in texts]
    places = [1 + number % max(1, len(t) - 2) for number, t in enumerate(written)]
    changed = [_exchanged(t, at, subject.vocabulary) for t, at in zip(written, places, strict=True)]
    again = await ask(subject.teacher, changed, SampledToken())
    repeated = await ask(subject.teacher, written, SampledToken())
    floor = max(ROUNDING, *[distance(a, b) for a, b in zip(plain, repeated, strict=True)])
    pairs = list(zip(plain, again, places, strict=True))
    before = float(np.median([distance(a, b, at - 1, at) for a, b, at in pairs]))
    here = float(np.median([distance(a, b, at, at + 1) for a, b, at in pairs]))
    behind = max(distance(a, b, at + 1) for a, b, at in pairs)
    return _aligned(subject, before=before, here=here, behind=behind, floor=floor)


def _aligned(subject: Subject, *, before: float, here: float, behind: float, floor: float) -> Finding:
    """Finding from the changes (nats) before, at and behind an exchanged token; `floor` is that of no exchange."""
    measured = f"changed token: {here:.2g} nats at it, {before:.2g} before it, {behind:.2g} behind it"
    server = "shift its answers, or check the server's prompt_logprobs offset"
    if before > floor and before > here / 4:
        return refused(
            "alignment",
            measured,
            f"teacher {subject.name!r} is one position early: changing a token changes what it says of the token "
            f"before; {server}",
        )
    if here <= floor and behind > 4 * floor:
        return refused(
            "alignment",
            measured,
            f"teacher {subject.name!r} is late: changing a token does not change what it says of it, but of what "
            f"follows; {server}",
        )
    if here < subject.thresholds.flat:
        known = "" if here > floor else ", so that its alignment cannot be told"
        return warned(
            "alignment",
            measured,
            f"teacher {subject.name!r} is flat: which token stands in a text hardly changes what it says{known}; it "
            "looks like a model that was never trained: check its path",
        )
    return fine("alignment", measured)


def _exchanged(trajectory: Trajectory, at: int, vocabulary: int) -> Trajectory:
    """The same text with one token exchanged."""
    ids = trajectory.token_ids.copy()
    ids[at] = (ids[at] + 1) % vocabulary
    return replace(trajectory, token_ids=ids)


async def steadiness(subject: Subject, evidence: Evidence) -> Finding:
    """Batch invariance: the same text in another batch and order gets the same scores."""
    backwards = (await ask(subject.teacher, evidence.written[::-1], SampledToken()))[::-1]
    alone = await ask(subject.teacher, evidence.written[:1], SampledToken())
    gap = max(
        *[distance(a, b) for a, b in zip(evidence.scores, backwards, strict=True)],
        distance(evidence.scores[0], alone[0]),
    )
    measured = f"{gap:.2g} nats between orders"
    if gap > subject.thresholds.tolerance:
        return refused(
            "steadiness",
            measured,
            f"teacher {subject.name!r} answers differently when requests come in another order or alone; its answers "
            "are swapped between requests, or its kernels depend on the batch: use dtype FLOAT32, or mend the server",
        )
    return fine("steadiness", measured)


async def replicas_agree(subject: Subject, evidence: Evidence) -> Finding:
    """Agreement of all replicas of the pool."""
    if len(subject.replicas) < 2:
        return fine("replicas", "one replica")
    worst = 0.0
    for number, replica in enumerate(subject.replicas):
        answers = await ask(replica, evidence.written[:4], SampledToken())
        gap = max(distance(a, b) for a, b in zip(evidence.scores, answers, strict=False))
        worst = max(worst, gap)
        if gap > subject.thresholds.tolerance:
            return refused(
                "replicas",
                f"replica {number} differs by {gap:.2g} nats",
                f"the replicas of teacher {subject.name!r} disagree; replica {number} serves another checkpoint or "
                "dtype: restart it with the same path",
            )
    return fine("replicas", f"{len(subject.replicas)} agree within {worst:.2g} nats")


async def backends_agree(subject: Subject, evidence: Evidence) -> Finding:
    """Agreement of two backends on the same checkpoint."""
    assert subject.reference is not None
    scores = await ask(subject.reference, evidence.written, SampledToken())
    gap = max(distance(a, b) for a, b in zip(evidence.scores, scores, strict=True))
    measured = f"{gap:.2g} nats from the torch backend"
    if gap > subject.thresholds.tolerance:
        return refused(
            "backends",
            measured,
            f"teacher {subject.name!r} does not say what its checkpoint says under a plain forward pass; its backend "
            "or server holds other weights, applies a temperature, or computes in a narrower dtype: restart it with "
            "the same path and dtype, or set teacher.backend=TORCH",
        )
    return fine("backends", measured)


async def full_softmax(subject: Subject, evidence: Evidence) -> Finding:
    """Full softmax: top-k logprobs are not renormalized on the k, and agree with the sampled token's."""
    wide = await topk(subject, evidence)
    few = await ask(subject.teacher, evidence.written, TopK(k=2))
    gap = max(
        float(np.abs(np.asarray(w.topk_logprobs)[:, :2] - np.asarray(f.topk_logprobs)).max())
        for w, f in zip(wide, few, strict=True)
    )
    mass = max(float(np.exp(np.asarray(w.topk_logprobs)).sum(-1).max()) for w in wide)
    inside = [
        np.abs(np.asarray(w.topk_logprobs) - np.asarray(s.logprobs)[:, None])[np.asarray(w.topk_ids) == ids[:, None]]
        for w, s, ids in zip(wide, evidence.scores, [t.token_ids for t in evidence.written], strict=True)
    ]
    written = float(max((part.max() for part in inside if len(part)), default=0.0))
    tolerance = subject.thresholds.tolerance
    measured = (
        f"top-2 of 2 and of {subject.support} differ by {gap:.2g}, sampled token by {written:.2g}, mass {mass:.4f}"
    )
    if gap > tolerance or mass > 1 + tolerance:
        return refused(
            "full softmax",
            measured,
            f"teacher {subject.name!r} renormalizes its top-k: the same token has another logprob for another k; it "
            "must answer with logprobs of the full softmax at temperature 1",
        )
    if written > tolerance:
        return refused(
            "full softmax",
            measured,
            f"teacher {subject.name!r} says two things of one token, as written and within its top-k; its ids or "
            "positions are mixed up: mend the server",
        )
    return fine("full softmax", measured)


async def padding(subject: Subject, evidence: Evidence) -> Finding:
    """Padding: columns of the output beyond the tokenizer hold no probability."""
    wide = await topk(subject, evidence)
    supports = [(w.topk_ids, w.topk_logprobs) for w in wide] + [
        (b.topk_ids, b.topk_logprobs) for t in evidence.written if isinstance(b := t.behavior, TopKScores)
    ]
    mass = max(float((np.exp(lp) * (np.asarray(ids) >= subject.vocabulary)).sum(-1).max()) for ids, lp in supports)
    measured = f"mass {mass:.2g} beyond {subject.vocabulary} tokens"
    if mass > subject.thresholds.padding_mass:
        return refused(
            "padding",
            measured,
            f"student or teacher {subject.name!r} gives probability to ids that are no tokens; the checkpoint and the "
            "tokenizer do not belong together: copy the right tokenizer",
        )
    return fine("padding", measured)


async def overlap(subject: Subject, evidence: Evidence) -> Finding:
    """Overlap of the student's likeliest tokens with the teacher's (arXiv 2604.13016, overlap ratio)."""
    wide = await topk(subject, evidence)
    shares = [
        (np.asarray(b.topk_ids)[:, :, None] == np.asarray(w.topk_ids)[:, None, :]).any(-1).mean(-1)
        for t, w in zip(evidence.written, wide, strict=True)
        if isinstance(b := t.behavior, TopKScores)
    ]
    ratio = float(np.concatenate(shares).mean())
    if ratio < subject.thresholds.overlap:
        return warned(
            "overlap",
            f"{ratio:.2f} at k={subject.support}: cold-start first",
            f"only {ratio:.0%} of the student's likeliest tokens are among those of teacher {subject.name!r}; such "
            "pairs learn badly on-policy: train on the teacher's text first (method=sft), then distil",
        )
    return fine("overlap", f"{ratio:.2f} at k={subject.support}: compatible")


async def first_token(subject: Subject, evidence: Evidence) -> Finding:
    """Agreement on the first token of a completion, where a different chat template or thinking mode shows.

    Compared with the tokens after it: a teacher to which all the student's text is surprising (or that is flat) is
    not one with another template.
    """
    gaps = [
        np.asarray(t.behavior.logprobs, dtype=np.float64) - np.asarray(s.logprobs)
        for t, s in zip(evidence.written, evidence.scores, strict=True)
    ]
    first = float(np.mean([gap[0] for gap in gaps]))
    rest = np.concatenate([gap[1:] for gap in gaps])
    usual = max(0.0, float(rest.mean())) if len(rest) else 0.0
    measured = f"teacher finds the first token {first:.2f} nats less likely than the student, later ones {usual:.2f}"
    if first - usual > subject.thresholds.surprise:
        return refused(
            "first token",
            measured,
            f"teacher {subject.name!r} does not expect how completions begin; its chat template or thinking mode ends "
            "elsewhere: render the prompt with the teacher's template up to where the assistant writes",
        )
    return fine("first token", measured)


async def end_of_text(subject: Subject, evidence: Evidence) -> Finding:
    """End of text: the token that ends a completion is one with which the teacher ends texts, too."""
    ended = [s for t, s in zip(evidence.written, evidence.scores, strict=True) if t.stop is StopReason.END]
    if not ended:
        longest = max(len(t) for t in evidence.written)
        return warned(
            "end of text",
            f"none of {len(evidence.written)} completions ended within {longest} tokens",
            "no completion ended within the probe, so whether the student ends its texts with the teacher's token is "
            "unknown; if completions are meant to be shorter, check eos_token_id in its generation_config.json",
        )
    typical = float(np.median([np.asarray(s.logprobs)[-1] for s in ended]))
    others = np.concatenate([np.asarray(s.logprobs)[:-1] for s in ended])
    usual = float(others.mean()) if len(others) else 0.0
    measured = (
        f"median teacher logprob of the end: {typical:.2f} ({len(ended)} completions), of tokens before: {usual:.2f}"
    )
    if usual - typical > subject.thresholds.surprise:
        return refused(
            "end of text",
            measured,
            f"teacher {subject.name!r} does not know the token that ends the student's completions as an end; the "
            "student would learn never to stop: use one end-of-text id for both (eos_token_id)",
        )
    return fine("end of text", measured)


async def own_teacher(subject: Subject, evidence: Evidence) -> Finding:
    """Reference check: a teacher of the same backend with the student's checkpoint scores as the student: KL 0."""
    assert subject.twin is not None
    scores = await ask(subject.twin, evidence.written, SampledToken())
    gap = max(distance(t.behavior, s) for t, s in zip(evidence.written, scores, strict=True))
    measured = f"{gap:.2g} nats from its own text"
    if gap > subject.thresholds.tolerance:
        return refused(
            "own teacher",
            measured,
            f"a student that is its own teacher would still be moved: the backend of teacher {subject.name!r} reads "
            "the student's checkpoint otherwise than the rollout engine; use equal dtypes, or another teacher.backend",
        )
    return fine("own teacher", measured)


async def topk(subject: Subject, evidence: Evidence) -> list[TopKScores]:
    k = min(subject.support, subject.vocabulary)
    return await ask(subject.teacher, evidence.written, TopK(k=k))
