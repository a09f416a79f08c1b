"""Digests of loss, gradient and metrics of every shipped method on seeded random batches.

For changes that must not change arithmetic: record it before (`python scripts/method_digests.py > before`), after, and
compare the two with `diff`. A line is a method, a dtype and a seed; equal digests are equal bits. CPU, one thread.
"""

import hashlib
from typing import Any

import torch
from torch import Tensor

from launch.config.run_config import run_config
from launch.config.shipped_files import groups
from launch.plan.checks.methods.factors import at_step
from opd.loss.chunked import StudentLogits
from opd.loss.metrics import diagnosed
from opd.method.schedules import with_values
from opd.types import (
    AdvantageScores,
    Batch,
    CreditScores,
    DeltaScores,
    DeviationScores,
    EvidenceScores,
    Scores,
    TargetScores,
    TokenLoss,
    TokenScores,
    TopKReturnScores,
    TopKScores,
    VocabularyScores,
)

ROWS, V = 48, 300


def scores(kind: type[Scores], k: int, q: Tensor, at: Tensor, credit: Tensor) -> Scores:
    """Scores of `kind` from a teacher's log-probabilities `q` `[ROWS, V]` at the sampled tokens `at`."""
    own = q.gather(-1, at[:, None])[:, 0]
    if issubclass(kind, TopKScores):
        top, ids = q.topk(k)
        rest = q.scatter(-1, ids, -torch.inf).logsumexp(-1)
        more = {"returns": credit} if kind is TopKReturnScores else {}
        if kind is DeltaScores:
            more = {"base": own - credit, "topk_base": top - credit[:, None]}
        return kind(logprobs=own, topk_ids=ids, topk_logprobs=top, rest=rest, **more)
    if kind is VocabularyScores:
        return VocabularyScores(logprobs=own, vocabulary_logprobs=q)
    if kind is AdvantageScores:
        return AdvantageScores(advantages=credit, rewards=credit)
    if kind is CreditScores:
        return CreditScores(logprobs=own, credit=credit)
    if kind is EvidenceScores:
        return EvidenceScores(logprobs=own, plain=own - credit)
    if kind is DeviationScores:
        return DeviationScores(logprobs=own, falls=credit.relu(), rises=(-credit).relu())
    if kind is TargetScores:
        return TargetScores(target_ids=at[:, None], target_probs=torch.ones_like(own)[:, None], targets=credit.abs())
    return TokenScores(logprobs=own) if kind is TokenScores else Scores()


def kind_of(method: Any) -> type[Scores]:
    """Class of the scores that a method's objective reads."""
    return getattr(method.scorer.produces, "reads_as", method.scorer.produces)


def evaluated(method: Any, dtype: torch.dtype, seed: int) -> tuple[TokenLoss, Tensor]:
    """The loss of a method's objective and its gradient with respect to the student's logits."""
    draw = torch.Generator().manual_seed(seed)
    z, q = (torch.randn(ROWS, V, generator=draw, dtype=torch.float64) * 3 for _ in range(2))
    q = (q + z).log_softmax(-1).to(dtype)
    credit = torch.randn(ROWS, generator=draw, dtype=torch.float64).to(dtype)
    mu = (z + torch.randn(ROWS, V, generator=draw, dtype=torch.float64)).log_softmax(-1)
    at = torch.multinomial(mu.exp(), 1, generator=draw)[:, 0]
    rows, depth = torch.arange(ROWS), torch.randint(0, 1500, (ROWS,), generator=draw)
    kind, k = kind_of(method), getattr(method.scorer, "k", 16)
    batch = Batch(
        input_ids=rows,
        position_ids=rows,
        cu_seqlens=torch.tensor([0, ROWS]),
        predict_at=rows,
        target_ids=at,
        behavior_logprobs=mu.gather(-1, at[:, None])[:, 0].to(dtype),
        weights=torch.ones(ROWS, dtype=dtype),
        depth=depth,
        scores=scores(kind, k, q, at, credit),
        denominator=1.0,
    )
    leaf = z.to(dtype).requires_grad_()
    # Of a sum of terms the method's own: the others have scores of other kinds.
    objective = with_values(method.objective if method.is_sum else method.loss, at_step(1, 3))
    result = diagnosed(objective, StudentLogits(logits=leaf), batch)
    (gradient,) = torch.autograd.grad((result.loss * torch.rand(ROWS, generator=draw).to(dtype)).sum(), leaf)
    return result, gradient


def digest(*values: Tensor) -> str:
    """SHA-256 of the bytes, shortened."""
    found = hashlib.sha256()
    for value in values:
        found.update(value.detach().contiguous().numpy().tobytes())
    return found.hexdigest()[:12]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sorted(groups()["method"]):
        method = run_config(["experiment=shop", f"method={name}", "student.path=.", "prompts.group_size=4"]).method
        for dtype in (torch.float32, torch.float64):
            for seed in range(4):
                result, gradient = evaluated(method, dtype, seed)
                names = sorted(result.metrics)
                print(
                    name, dtype, seed, "loss", digest(result.loss), "gradient", digest(gradient),
                    "metrics", digest(*(result.metrics[n] for n in names)), *(names if not seed else []),
                )  # fmt: skip
