"""Loss kernels against the same loss written plainly in float64: value and both gradients."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from launch.cli.selftest.rows import Outcome, Row
from learner.config import LossKernel
from learner.liger import check_kernel, with_kernel
from opd.errors import ConfigurationError
from opd.loss.chunked import StudentLogits, flat_loss
from opd.objectives.vocabulary import FullForwardKL, FullReverseKL, JensenShannon
from opd.types import Batch, VocabularyScores

_ROWS, _WIDTH, _VOCABULARY = 96, 64, 4096
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 0.02}
"""Relative error of value and gradients: a few roundings of the type, of which bfloat16 has one in 256."""


def loss_kernels() -> list[Row]:
    """Every divergence over the whole vocabulary, in the precisions that train, on every kind of device there is."""
    rows = list(_on("cpu"))
    if not torch.cuda.is_available():
        return [*rows, Row(check="loss", name="on a GPU", outcome=Outcome.NOT_HERE, said="torch sees none")]
    return [*rows, *_on("cuda"), *_fused()]


def _on(place: str) -> Iterator[Row]:
    for objective in (FullReverseKL(), FullForwardKL(), JensenShannon()):
        for dtype, limit in LIMITS.items():
            name = f"{type(objective).__name__}, {str(dtype).removeprefix('torch.')}, {place}"
            yield Row.at_most("loss", name, error_of(objective, objective, dtype, place), limit)


def _fused() -> Iterator[Row]:
    for objective in (FullReverseKL(), FullForwardKL(), JensenShannon()):
        name = f"{type(objective).__name__}, liger"
        try:
            check_kernel(LossKernel.LIGER, torch.device("cuda"))
        except ConfigurationError as error:
            yield Row(check="loss", name=name, outcome=Outcome.NOT_HERE, said=str(error))
            return
        fused = with_kernel(LossKernel.LIGER, objective)
        yield Row.at_most("loss", name, error_of(fused, objective, torch.float32, "cuda"), LIMITS[torch.float32])


def error_of(objective: Any, plain: Any, dtype: torch.dtype, place: str) -> float:
    """Greatest relative error of the loss, and of the gradients of states and output matrix, against float64."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(_ROWS, _WIDTH, generator=random).to(dtype)
    head = (torch.randn(_VOCABULARY, _WIDTH, generator=random) / 4).to(dtype)
    teacher = (torch.randn(_ROWS, _VOCABULARY, generator=random) * 2).log_softmax(-1)
    ours = _measured(objective, hidden.to(place), head.to(place), teacher.to(place), in_chunks=True)
    right = _measured(plain, hidden.double(), head.double(), teacher.double(), in_chunks=False)
    return max(_relative(a.double().cpu(), b) for a, b in zip(ours, right, strict=True))


def _measured(objective: Any, hidden: Tensor, head: Tensor, teacher: Tensor, *, in_chunks: bool) -> list[Tensor]:
    """The loss and its gradients, in chunks as the learner has it or as the sum that it is."""
    hidden, head = hidden.detach().requires_grad_(), head.detach().requires_grad_()
    batch = _batch(teacher)

    def evaluate(student: StudentLogits, start: int, stop: int) -> Any:
        return objective(student, batch.rows(start, stop))

    if in_chunks:
        total, _ = flat_loss(hidden, head, batch.weights, lambda *_: evaluate, chunk=40, overlap_k=0)
    else:
        student = StudentLogits(logits=hidden @ head.T, overlap_k=0)
        total = (batch.weights * objective(student, batch).loss).sum()
    return [total.detach(), *torch.autograd.grad(total, (hidden, head))]


def _batch(teacher: Tensor) -> Batch[VocabularyScores]:
    every = torch.arange(len(teacher), device=teacher.device)
    ids = every * 37 % teacher.shape[1]
    logprobs = teacher.gather(-1, ids[:, None])[:, 0]
    return Batch(
        input_ids=ids,
        position_ids=every,
        cu_seqlens=torch.tensor([0, len(every)], device=teacher.device),
        predict_at=every,
        target_ids=ids,
        behavior_logprobs=logprobs,
        weights=(1 + every % 3).to(teacher.dtype) / len(every),
        depth=every,
        scores=VocabularyScores(logprobs=logprobs, vocabulary_logprobs=teacher),
        denominator=1.0,
    )


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())
