"""The student's distribution at the trained tokens, a chunk of rows at a time.

A vocabulary-wide tensor exists for one chunk only: the gradient with respect to hidden states and head is
computed in the forward pass, chunk by chunk, so peak memory does not grow with the number of tokens. Chunks are
large, for the matrix products; within them the objective sees blocks of few rows, which stay in a CPU's cache.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.errors import ConfigurationError
from opd.loss.metric_sums import MetricSums, MetricTable
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
        """Full log-softmax, with its graph: computed once, also if a diagnostic, which has no gradient, is first."""
        with torch.enable_grad():
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

    def outside(self, ids: Int[Tensor, "n K"]) -> Float[Tensor, " n"]:
        """Log-mass of all ids but `ids` (fewer than there are): a sum over the row, since `1 - sum` has lost it."""
        return self.logprobs.scatter(-1, ids, -torch.inf).logsumexp(-1)

    @cached_property
    def entropy(self) -> Float[Tensor, " n"]:
        """Entropy in nats, detached (a diagnostic)."""
        return -torch.linalg.vecdot(self.probs, self.logprobs.detach())


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
        logprobs = _logprobs(scores, heads)
    else:
        logprobs = mixture((_logprobs(m, heads) for m in scores.members), list(torch.as_tensor(scores.shares).T))
    return VocabularyScores(logprobs=torch.as_tensor(scores.logprobs), vocabulary_logprobs=logprobs)


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
    return log_softmax_(_logits(hidden[:, : head.shape[1]].to(head.dtype), head))


def read(batch: Batch[Scores], heads: Tensor | Sequence[Tensor] | None) -> Batch[Scores]:
    """`batch` with hidden states turned into vocabulary log-probabilities (call it on a chunk of rows).

    `heads` are the teachers' output matrices `[V, H]`, by the number that `HiddenScores.head` names; of a single
    teacher also the matrix itself.
    """
    given = [heads] if isinstance(heads, Tensor) else heads
    every = (batch.scores, *(term.scores for term in batch.terms.values()))
    if not any(isinstance(scores, HiddenScores | EnsembleScores) for scores in every):
        return batch

    def whole(scores: Scores) -> Scores:
        if not isinstance(scores, HiddenScores | EnsembleScores):
            return scores
        if not given:
            raise ConfigurationError(
                "hidden states of a teacher need its output matrix to become probabilities, but the learner was "
                "given none; pass the teacher's checkpoint to the learner"
            )
        return vocabulary_scores(scores, given)

    return batch.with_scores(whole)


def log_softmax_(logits: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
    """Log-softmax in place, a block of rows at a time: a whole second `[n, V]` never exists. No gradient."""
    block = _block_rows(logits)
    for start in range(0, len(logits), block):
        rows = logits[start : start + block]
        rows.copy_(rows.log_softmax(-1))
    return logits


def mixture(
    members: Iterable[Float[Tensor, "n V"]], shares: Sequence[Float[Tensor, " n"] | float]
) -> Float[Tensor, "n V"]:
    """`log sum_m shares[m] exp(members[m])`: several teachers as one, in the memory of two of them.

    `members` are log-probabilities, read one after another (give a generator); they are overwritten.

    Raises:
        ConfigurationError: there are no members, or not one for each share.
    """
    source, total, count = iter(members), None, 0
    for share in shares:  # no zip: it would hold the last member while the next one is being made
        member = next(source, None)
        if member is None:
            break
        count += 1
        member += torch.as_tensor(share, dtype=member.dtype, device=member.device).log()[..., None]
        total = member if total is None else torch.logaddexp(total, member, out=total)
        del member
    if total is None or count < len(shares) or next(source, None) is not None:
        raise ConfigurationError(
            f"a mixture of teachers needs one member for each of {len(shares)} shares and at least one, but got "
            f"{count if count < len(shares) else 'more'}; give as many shares as teachers"
        )
    return total


Evaluate = Callable[[StudentLogits, int, int], TokenLoss]
Prepare = Callable[[int, int], Evaluate]

HOST_CHUNK, DEVICE_CHUNK, _HOST_BLOCK = 2**26, 2**29, 2**23  # bytes of logits


def _block_rows(logits: Tensor) -> int:
    """Number of rows to work on at once: on a CPU so few that what is computed of them stays in its cache."""
    if logits.device.type != "cpu":
        return max(1, len(logits))
    return max(1, _HOST_BLOCK // (logits.shape[-1] * logits.element_size()))


def chunk_rows(head: Float[Tensor, "V H"]) -> int:
    """Number of rows of logits to have at once: 64 MiB of them on a CPU, 512 MiB on a GPU.

    Fewer make the matrix products slow, more only need memory.
    """
    size = HOST_CHUNK if head.device.type == "cpu" else DEVICE_CHUNK
    return max(1, size // (len(head) * (8 if head.dtype == torch.float64 else 4)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Evaluation:
    """Evaluation plan of a loss, with the table of its metrics."""

    prepare: Prepare
    weights: Float[Tensor, " L"]
    chunk: int
    in_blocks: bool
    overlap_k: int
    found: MetricTable

    def loss(self, logits: Float[Tensor, "n V"], start: int, stop: int, evaluate: Evaluate) -> Float[Tensor, ""]:
        """The weighted loss of rows `start:stop`, whose logits are given."""
        result = evaluate(StudentLogits(logits=logits, overlap_k=self.overlap_k), start, stop)
        self.found.write(start, result.metrics)
        weight = self.weights[start:stop]
        # `where`, not the product alone: a token of weight 0 may have an infinite loss.
        return (weight * torch.where(weight > 0, result.loss, 0.0)).sum()

    def chunks(self, rows: int) -> Iterator[tuple[int, int]]:
        return ((start, min(start + self.chunk, rows)) for start in range(0, rows, self.chunk))

    def blocks(self, logits: Tensor) -> Iterator[slice]:
        size = _block_rows(logits) if self.in_blocks else len(logits)
        return (slice(start, start + size) for start in range(0, len(logits), size))


def _logits(rows: Float[Tensor, "n H"], head: Float[Tensor, "V H"]) -> Float[Tensor, "n V"]:
    logits = rows @ head.T
    return logits if logits.dtype == torch.float64 else logits.float()


class _FlatLoss(torch.autograd.Function):
    """`sum(weights * loss)` over chunks of rows, with both gradients ready when the forward pass ends.

    The gradient with respect to logits takes their place, block by block, so a chunk exists once for the student
    and once for its teacher; from there two matrix products lead to both gradients.
    """

    @staticmethod
    def forward(ctx, hidden, head, plan):
        total = hidden.new_zeros((), dtype=torch.float64)
        grad_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        # Many chunks add up here; a 16-bit sum would forget the small ones.
        wide = head.dtype if head.dtype == torch.float64 else torch.float32
        grad_head = torch.zeros_like(head, dtype=wide) if head.requires_grad else None
        for start, stop in plan.chunks(len(hidden)):
            total += _chunk(hidden.detach(), head.detach(), plan, start, stop, grad_hidden, grad_head)
        ctx.gradients = (grad_hidden, None if grad_head is None else grad_head.to(head.dtype))
        return total

    @staticmethod
    def backward(ctx, *grads):
        if ctx.gradients is None:
            raise RuntimeError("the gradients of a flat loss are given away by the first backward; compute it again")
        gradients, ctx.gradients = ctx.gradients, None  # ours alone, so they are scaled in place
        return *(g if g is None else g.mul_(grads[0]) for g in gradients), None


def _chunk(
    hidden: Float[Tensor, "L H"],
    head: Float[Tensor, "V H"],
    plan: _Evaluation,
    start: int,
    stop: int,
    grad_hidden: Float[Tensor, "L H"] | None,
    grad_head: Float[Tensor, "V H"] | None,
) -> Float[Tensor, ""]:
    """The loss of one chunk; adds to both gradients."""
    evaluate = plan.prepare(start, stop)  # first, so that reading the teacher and the student's logits do not meet
    logits = _logits(hidden[start:stop], head)
    total = hidden.new_zeros((), dtype=torch.float64)
    for block in plan.blocks(logits):
        rows = logits[block]
        with torch.enable_grad():
            leaf = rows.detach().requires_grad_()
            value = plan.loss(leaf, start + block.start, start + block.start + len(rows), evaluate)
            (grad,) = torch.autograd.grad(value, leaf)
        if len(rows) == len(logits):
            logits = grad
        else:
            rows.copy_(grad)
        total += value  # keeps no graph: autograd is off here
    grads = logits.to(head.dtype)
    if grad_hidden is not None:
        torch.mm(grads, head, out=grad_hidden[start:stop])
    if grad_head is not None and grad_head.dtype == grads.dtype:
        grad_head.addmm_(grads.T, hidden[start:stop])
    elif grad_head is not None:
        grad_head += grads.T @ hidden[start:stop]
    return total


def flat_loss(
    hidden: Float[Tensor, "L H"],
    head: Float[Tensor, "V H"],
    weights: Float[Tensor, " L"],
    prepare: Prepare,
    *,
    chunk: int = 0,
    overlap_k: int = 16,
) -> tuple[Float[Tensor, ""], MetricSums]:
    """The weighted sum of a per-token loss (float64 scalar with gradient) and the sums of its metrics.

    For every chunk of rows `prepare(start, stop)` is called once (a teacher's logits are made here), and what it
    returns is called as `evaluate(student, i, j)` for blocks of rows `start <= i < j <= stop`, in order. The result
    does not depend on chunks and blocks. Memory beyond the gradients: `chunk * V` logits of student and teacher
    (`chunk` = 0: see `chunk_rows`) and what the objective makes of one block, whatever `L` is. The gradients can be
    asked for once. Metrics count rows of weight above 0. Without gradients enabled nothing is stored.
    """
    return _flat(hidden, head, weights, prepare, chunk or chunk_rows(head), overlap_k, in_blocks=True)


def chunked_loss(
    hidden: Float[Tensor, "L H"],
    head: Float[Tensor, "V H"],
    weights: Float[Tensor, " L"],
    evaluate: Evaluate,
    chunk: int,
) -> tuple[Float[Tensor, ""], MetricSums]:
    """`flat_loss` in its simple form: `evaluate(student, start, stop)` is called once per chunk."""
    return _flat(hidden, head, weights, lambda *_: evaluate, chunk, 16, in_blocks=False)


def _flat(
    hidden: Tensor, head: Tensor, weights: Tensor, prepare: Prepare, chunk: int, overlap_k: int, in_blocks: bool
) -> tuple[Tensor, MetricSums]:
    found = MetricTable(rows=len(hidden), device=hidden.device)
    plan = _Evaluation(
        prepare=prepare, weights=weights, chunk=chunk, in_blocks=in_blocks, overlap_k=overlap_k, found=found
    )  # fmt: skip
    if torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad):
        total = _FlatLoss.apply(hidden, head, plan)
        assert isinstance(total, Tensor)
    else:
        total = hidden.new_zeros((), dtype=torch.float64)
        for start, stop in plan.chunks(len(hidden)):
            evaluate = prepare(start, stop)
            logits = _logits(hidden[start:stop], head)
            for block in plan.blocks(logits):
                rows = logits[block]
                total += plan.loss(rows, start + block.start, start + block.start + len(rows), evaluate)
    return total, found.sums(weights > 0)
