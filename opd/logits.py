"""The student's distribution at the trained tokens, a chunk of rows at a time.

A vocabulary-wide tensor exists for one chunk only: the gradient with respect to hidden states and head is
computed in the forward pass, chunk by chunk, so peak memory does not grow with the number of tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.errors import ConfigurationError
from opd.tally import Tally
from opd.types import Batch, EnsembleScores, HiddenScores, Scores, TokenLoss, VocabularyScores


@dataclass(frozen=True, kw_only=True)
class StudentLogits:
    """The student at `n` trained tokens, before the softmax (float32 or float64, temperature 1).

    Diagnostics compare its `overlap_k` likeliest tokens with the teacher's (Rethinking OPD uses 16; 0: none).
    """

    logits: Float[Tensor, "n V"]
    overlap_k: int = 16

    @cached_property
    def logprobs(self) -> Float[Tensor, "n V"]:
        """Full log-softmax."""
        return self.logits.log_softmax(-1)

    @cached_property
    def probs(self) -> Float[Tensor, "n V"]:
        """Probabilities, detached (for diagnostics)."""
        return self.logprobs.detach().exp()

    def at(self, ids: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Log-probability of one id per token."""
        return self.logprobs.gather(-1, ids[:, None])[:, 0]

    def at_support(self, ids: Int[Tensor, "n K"]) -> Float[Tensor, "n K"]:
        """Log-probabilities of `K` ids per token, under the full softmax."""
        return self.logprobs.gather(-1, ids)

    @cached_property
    def entropy(self) -> Float[Tensor, " n"]:
        """Entropy in nats, detached (a diagnostic)."""
        return -(self.probs * self.logprobs.detach()).sum(-1)


_BLOCK = 128  # columns; about sqrt(V / k) is best, and nothing depends on it


def likeliest(values: Float[Tensor, "n V"], k: int) -> Int[Tensor, "n k"]:
    """Ids of the `k` greatest values per row, greatest first; of equal ones any.

    Exact, in one cheap pass: the k greatest lie in the k blocks of columns with the greatest maxima. A tenth of the
    time of `topk` at 152k columns.
    """
    blocks = values.shape[-1] // _BLOCK
    if blocks <= k:
        return values.topk(k).indices
    body = values[:, : blocks * _BLOCK].unflatten(-1, (blocks, _BLOCK))
    best = body.amax(-1).topk(k).indices[:, :, None]
    columns = (best * _BLOCK + torch.arange(_BLOCK, device=values.device)).flatten(1)
    rest = torch.arange(blocks * _BLOCK, values.shape[-1], device=values.device).expand(len(values), -1)
    columns = torch.cat([columns, rest], dim=-1)
    return columns.gather(-1, values.gather(-1, columns).topk(k).indices)


@torch.no_grad()
def vocabulary_scores(scores: HiddenScores | EnsembleScores, heads: Sequence[Float[Tensor, "V _"]]) -> VocabularyScores:
    """The exact distribution from hidden states and the teachers' own output matrices; no gradient.

    Rows are grouped by `scores.head`; matrices may have different widths. An ensemble's is the logarithm of the
    weighted mean of its members' probabilities, added up one member at a time.
    """
    if isinstance(scores, HiddenScores):
        return VocabularyScores(logprobs=torch.as_tensor(scores.logprobs), vocabulary_logprobs=_logprobs(scores, heads))
    total = None
    for member, share in zip(scores.members, torch.as_tensor(scores.shares).T, strict=True):
        weighted = _logprobs(member, heads)
        weighted += share.log().to(weighted.dtype)[:, None]
        total = weighted if total is None else torch.logaddexp(total, weighted, out=total)
    assert total is not None
    return VocabularyScores(logprobs=torch.as_tensor(scores.logprobs), vocabulary_logprobs=total)


def _logprobs(scores: HiddenScores, heads: Sequence[Float[Tensor, "V _"]]) -> Float[Tensor, "n V"]:
    hidden = torch.as_tensor(scores.hidden)
    if len(heads) == 1:  # no need to ask the device which rows are whose
        return _read(hidden, heads[0])
    owner = torch.as_tensor(scores.head, device=hidden.device)
    present = owner.unique().tolist()
    if present and present[-1] >= len(heads):
        raise ConfigurationError(
            f"hidden states name output matrix {present[-1]}, but the learner was given {len(heads)}; pass the "
            "checkpoint of every teacher to the learner, in the order of the run's teachers"
        )
    if len(present) == 1:
        return _read(hidden, heads[present[0]])
    rows = {number: (owner == number).nonzero()[:, 0] for number in present}
    wide = torch.float64 if heads[0].dtype == torch.float64 else torch.float32
    logprobs = torch.empty(len(hidden), len(heads[0]), dtype=wide, device=hidden.device)
    for number, mine in rows.items():
        logprobs[mine] = _read(hidden[mine], heads[number])
    return logprobs


def _read(hidden: Float[Tensor, "n H"], head: Float[Tensor, "V W"]) -> Float[Tensor, "n V"]:
    """Log-probabilities of rows that one matrix reads; what stands beyond its width is padding."""
    logits = hidden[:, : head.shape[1]].to(head.dtype) @ head.T
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def read(batch: Batch[Scores], heads: Tensor | Sequence[Tensor] | None) -> Batch[Scores]:
    """`batch` with hidden states turned into vocabulary log-probabilities (call it on a chunk of rows).

    `heads` are the teachers' output matrices `[V, H]`, by the number that `HiddenScores.head` names; of a single
    teacher also the matrix itself.
    """
    if not isinstance(batch.scores, HiddenScores | EnsembleScores):
        return batch
    given = [heads] if isinstance(heads, Tensor) else heads
    if not given:
        raise ConfigurationError(
            "hidden states of a teacher need its output matrix to become probabilities, but the learner was "
            "given none; pass the teacher's checkpoint to the learner"
        )
    return replace(batch, scores=vocabulary_scores(batch.scores, given))


Evaluate = Callable[[StudentLogits, int, int], TokenLoss]


class _ChunkedLoss(torch.autograd.Function):
    """`sum(weights * loss)` over chunks of rows, with both gradients ready when the forward pass ends."""

    @staticmethod
    def forward(ctx, hidden, head, weights, evaluate, chunk, metrics):
        total = hidden.new_zeros((), dtype=torch.float64)
        grad_hidden = torch.zeros_like(hidden)
        # Many chunks add up here; a 16-bit sum would forget the small ones.
        wide = head.dtype if head.dtype == torch.float64 else torch.float32
        grad_head = torch.zeros_like(head, dtype=wide)
        for start in range(0, len(hidden), chunk):
            stop = min(start + chunk, len(hidden))
            with torch.enable_grad():
                rows = hidden[start:stop].detach().requires_grad_()
                matrix = head.detach().requires_grad_()
                value = _weighted(rows, matrix, weights, evaluate, start, stop, metrics)
                part_hidden, part_head = torch.autograd.grad(value, (rows, matrix))
            grad_hidden[start:stop] = part_hidden
            grad_head += part_head
            total += value.detach()
        ctx.save_for_backward(grad_hidden, grad_head.to(head.dtype))
        return total

    @staticmethod
    def backward(ctx, *grads):
        (grad,), (grad_hidden, grad_head) = grads, ctx.saved_tensors
        return grad_hidden * grad, grad_head * grad, None, None, None, None


def _weighted(
    rows: Float[Tensor, "n H"],
    matrix: Float[Tensor, "V H"],
    weights: Float[Tensor, " L"],
    evaluate: Evaluate,
    start: int,
    stop: int,
    metrics: list[Tally],
) -> Float[Tensor, ""]:
    """The weighted loss of one chunk; appends its sums to `metrics` without waiting for the device."""
    logits = rows @ matrix.T
    student = StudentLogits(logits=logits if logits.dtype == torch.float64 else logits.float())
    result = evaluate(student, start, stop)
    weight = weights[start:stop]
    active = weight > 0
    metrics.append(Tally.of(result.metrics, active))
    # `where`, not the product alone: a token of weight 0 may have an infinite loss.
    return (weight * torch.where(active, result.loss, 0.0)).sum()


def chunked_loss(
    hidden: Float[Tensor, "L H"],
    head: Float[Tensor, "V H"],
    weights: Float[Tensor, " L"],
    evaluate: Evaluate,
    chunk: int,
) -> tuple[Float[Tensor, ""], Tally]:
    """The weighted sum of a per-token loss (float64 scalar with gradient) and the tally of its metrics.

    `evaluate(student, start, stop)` is the loss of rows `start:stop`. Metrics count rows of weight above 0.
    Peak memory: `chunk * V` whatever `L` is. Without gradients enabled nothing is stored.
    """
    metrics: list[Tally] = []
    if torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad):
        total = _ChunkedLoss.apply(hidden, head, weights, evaluate, chunk, metrics)
        assert isinstance(total, Tensor)
    else:
        total = hidden.new_zeros((), dtype=torch.float64)
        for start in range(0, len(hidden), chunk):
            stop = min(start + chunk, len(hidden))
            total += _weighted(hidden[start:stop], head, weights, evaluate, start, stop, metrics)
    return total, reduce(Tally.plus, metrics)
