"""Diagnostics of student and teacher that every run logs, from the chunk of logits that the loss already has.

`diagnosed` adds them to the loss of any objective. Everything here is per token, detached, in nats, and NaN where it is
not defined; what cannot be known from the scores at hand is absent.
"""

import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor

from opd.loss.chunked import StudentLogits, likeliest
from opd.ports import LossFunction
from opd.types import Batch, Scores, TokenLoss, TopKScores, VocabularyScores

DEPTHS = (64, 256, 1024)
"""Edges of the position buckets: a token's place in its completion. Ours; the paper's are a figure's axis."""

OVERLAP_EVERY = 4
"""The overlap is measured at every fourth place of a completion (NaN between them): finding the likeliest tokens is
most of what diagnostics cost. By place and not by row, so that packing does not matter."""

TAIL_TOKENS = 2500
"""Length of a completion's end that is measured for repetition: about the 10,000 characters of StableOPD (inferred)."""

Metrics = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Overlap of the likeliest tokens of two distributions, per token (arXiv 2604.13016, section 4b, k = 16 there).

    `ratio` is |S_p & S_q| / k. `advantage` is `sum p' (log q' - log p')` over the intersection, both renormalized on
    it and weighted by the student: never above 0, 0 where they agree, NaN where the intersection is empty. The
    masses are what each model gives to the intersection.
    """

    ratio: Float[Tensor, " n"]
    advantage: Float[Tensor, " n"]
    student_mass: Float[Tensor, " n"]
    teacher_mass: Float[Tensor, " n"]


def overlap(p: Float[Tensor, "n V"], q: Float[Tensor, "n V"], k: int) -> Overlap:
    """The overlap of student `p` and teacher `q` (log-probabilities) on their `k` likeliest tokens."""
    own, others = likeliest(p, k), likeliest(q, k)
    return _overlap(p.gather(-1, own), q.gather(-1, own), (own[:, :, None] == others[:, None, :]).any(-1))


def _overlap(p: Float[Tensor, "n k"], q: Float[Tensor, "n k"], shared: Bool[Tensor, "n k"]) -> Overlap:
    """`p`, `q` at the student's `k` likeliest tokens, of which the `shared` ones are the intersection."""
    own, others = (torch.where(shared, x, -torch.inf).log_softmax(-1) for x in (p, q))
    terms = torch.where(shared, own.exp() * (others - own), 0.0)
    return Overlap(
        ratio=shared.to(p.dtype).mean(-1),
        advantage=torch.where(shared.any(-1), terms.sum(-1), torch.nan),
        student_mass=torch.where(shared, p.exp(), 0.0).sum(-1),
        teacher_mass=torch.where(shared, q.exp(), 0.0).sum(-1),
    )


def diagnosed(objective: LossFunction, student: StudentLogits, batch: Batch[Any]) -> TokenLoss:
    """Loss of an objective with its own metrics and all diagnostics of the batch.

    An objective reports what it alone knows, such as its estimate of the reverse KL; where a diagnostic has the same
    name, the diagnostic is logged, since it is exact. A sum of terms has the diagnostics of every term already.
    """
    result = objective(student, batch)
    return result if batch.terms else replace(result, metrics={**result.metrics, **diagnostics(student, batch)})


def diagnostics(student: StudentLogits, batch: Batch[Any]) -> Metrics:
    """All that the scores in `batch` allow, whatever the objective makes of them.

    Over the whole vocabulary, on a support, or of the student alone: its entropy, also by depth, and the mismatch.
    Without any scores there is no mismatch, either: the text is that of a teacher or a data set (SFT).
    """
    match batch.scores:
        case VocabularyScores():
            return vocabulary_metrics(student, batch)
        case TopKScores():
            return topk_metrics(student, batch)
    alone = by_depth({"entropy": student.entropy}, batch.depth)
    return alone if type(batch.scores) is Scores else {**alone, **mismatch(student.at(batch.target_ids), batch)}


@torch.no_grad()
def vocabulary_metrics(student: StudentLogits, batch: Batch[VocabularyScores]) -> Metrics:
    """Diagnostics of two whole distributions: both KLs, the overlap at `student.overlap_k` (none at 0), the mismatch,
    and, also by depth, both entropies, their gap |H(q) - H(p)| and the teacher's fidelity.

    Fidelity is `max_v q(v)`, the teacher's confidence after the student's text, whose decay with depth is the
    supervision fidelity decay of arXiv 2605.30833.
    """
    p, q = student.logprobs, batch.scores.vocabulary_logprobs
    gap, q_probs = p - q, q.exp()
    teacher_entropy = -_dot(q_probs, q)
    spread = {
        "entropy": student.entropy,
        "teacher_entropy": teacher_entropy,
        "entropy_gap": (teacher_entropy - student.entropy).abs(),
        "fidelity": q.amax(-1).exp(),
    }
    metrics = {
        "reverse_kl": _dot(student.probs, gap),
        "forward_kl": -_dot(q_probs, gap),
        **by_depth(spread, batch.depth),
        **mismatch(student.at(batch.target_ids), batch),
    }
    if not student.overlap_k:
        return metrics
    some = _measured(batch)
    found = overlap(p[some], q[some], min(student.overlap_k, p.shape[-1]))
    named = {
        "overlap_ratio": found.ratio,
        "overlap_token_advantage": found.advantage,
        "overlap_student_mass": found.student_mass,
        "overlap_teacher_mass": found.teacher_mass,
    }
    return metrics | {name: _spread(value, some, len(batch)) for name, value in named.items()}


@torch.no_grad()
def topk_metrics(student: StudentLogits, batch: Batch[TopKScores]) -> Metrics:
    """Diagnostics on a support S: the mass of both on S, the student's entropy (also by depth), and the overlap of S
    with the student's own likeliest tokens.

    `support_overlap` is the share of the student's k likeliest (k = `student.overlap_k`, at most as many as S has)
    that lie in S, `support_token_advantage` the advantage on those. With the teacher's top-k as S they are the
    overlap ratio and the overlap-token advantage; with the student's they measure how stale S is. The teacher's entropy
    and both full KLs are not known, hence absent.
    """
    p, q, ids = student.at_support(batch.scores.topk_ids), batch.scores.topk_logprobs, batch.scores.topk_ids
    metrics = {
        "student_mass": p.exp().sum(-1),
        "teacher_mass": q.exp().sum(-1),
        **by_depth({"entropy": student.entropy}, batch.depth),
        **mismatch(student.at(batch.target_ids), batch),
    }
    if not student.overlap_k:
        return metrics
    some = _measured(batch)
    logprobs = student.logprobs[some]
    own = likeliest(logprobs, min(student.overlap_k, ids.shape[-1]))
    same = own[:, :, None] == ids[some][:, None, :]
    teacher = torch.where(same, q[some][:, None, :], -torch.inf).amax(-1)  # the teacher, at the student's tokens
    found = _overlap(logprobs.gather(-1, own), teacher, same.any(-1))
    named = {"support_overlap": found.ratio, "support_token_advantage": found.advantage}
    return metrics | {name: _spread(value, some, len(batch)) for name, value in named.items()}


def _measured(batch: Batch[Scores]) -> Int[Tensor, " m"]:
    """The rows at which the overlap is measured."""
    return (batch.depth % OVERLAP_EVERY == 0).nonzero()[:, 0]


def _spread(values: Float[Tensor, " m"], rows: Int[Tensor, " m"], count: int) -> Float[Tensor, " n"]:
    """`values` at `rows`, NaN at all others."""
    return values.new_full((count,), torch.nan).index_copy(0, rows, values)


def _dot(a: Float[Tensor, "n V"], b: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    """Row by row, without a product of the whole vocabulary in between."""
    return torch.linalg.vecdot(a, b.to(a.dtype))


def by_depth(values: Metrics, depth: Int[Tensor, " n"]) -> Metrics:
    """The metrics, and each once more per position bucket, NaN at the tokens of other buckets.

    Example: `entropy` gives `entropy`, `entropy_0_63`, `entropy_64_255`, `entropy_256_1023`, `entropy_1024_up`.
    """
    bucket = torch.bucketize(depth, torch.tensor(DEPTHS, device=depth.device), right=True)
    own = [bucket == i for i in range(len(DEPTHS) + 1)]
    starts = (0, *DEPTHS)
    ends = (*(str(edge - 1) for edge in DEPTHS), "up")
    found = dict(values)
    for name, value in values.items():
        for start, end, here in zip(starts, ends, own, strict=True):
            found[f"{name}_{start}_{end}"] = torch.where(here, value, torch.nan)
    return found


def mismatch(student_logprobs: Float[Tensor, " n"], batch: Batch[Scores]) -> Metrics:
    """Mismatch of the learner and the behavior at the sampled token, detached: the importance ratio
    `p / mu`, |p - mu|, and |log p - log mu|.

    With fresh rollouts at temperature 1 all of it is numerics of two engines; staleness, temperature and top-p add
    to it. The last two are reported as mean and maximum.
    """
    gap = student_logprobs.detach() - batch.behavior_logprobs
    probs_diff = (student_logprobs.detach().exp() - batch.behavior_logprobs.exp()).abs()
    return {"ratio": gap.exp(), "probs_diff": probs_diff, "logprob_gap": gap.abs()}


def repetition(token_ids: Int32[np.ndarray, " T"], n: int = 3) -> float:
    """The share of a completion's n-grams that have occurred in it before, in [0, 1]; 0 below n + 1 tokens.

    Example: `repetition([5, 6, 7, 5, 6, 7, 5])` is 0.4 (of five 3-grams two are repeats).
    """
    grams = len(token_ids) - n + 1
    if grams < 2:
        return 0.0
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(token_ids), n)
    return 1 - len(np.unique(windows, axis=0)) / grams


def compression(token_ids: Int32[np.ndarray, " T"]) -> float:
    """Compression ratio of the last `TAIL_TOKENS` ids (4 bytes each) under zlib; 1 for an empty completion.

    After StableOPD (arXiv 2604.08527), which does so with the last 10,000 characters and calls a ratio above 10
    repetitive. Ids instead of characters are our choice: they are what is generated, and need no tokenizer.
    """
    data = np.asarray(token_ids[-TAIL_TOKENS:], dtype="<i4").tobytes()
    return len(data) / len(zlib.compress(data)) if data else 1.0
