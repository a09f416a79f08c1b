"""liger-kernel in the place of torch's operations: the same losses, gradients and metrics, flat in the same way.

Runs where liger-kernel and Triton can be imported: on a GPU (`-m gpu`), and on any machine through Triton's interpreter
(docs/benchmarks.md has the command).
"""

import os
from math import exp
from typing import Any

import pytest
import torch
from torch import Tensor

from learner.config import LossKernel
from learner.liger import check_kernel, divergence, with_kernel
from opd.errors import ConfigurationError
from opd.loss.chunked import Evaluate, StudentLogits, flat_loss, read
from opd.objectives.sampled import SampledReverseKL
from opd.objectives.vocabulary import FullForwardKL, FullReverseKL, JensenShannon
from opd.types import Batch, HiddenScores, TokenLoss

needs_kernel = pytest.mark.gpu
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
OBJECTIVES = [FullReverseKL(), FullForwardKL(), JensenShannon(beta=0.5), JensenShannon(beta=0.1)]


def loss_of(objective: Any, case: dict[str, Tensor], chunk: int) -> tuple[Tensor, list[Tensor], dict[str, float]]:
    """The weighted sum, its gradients for hidden states and output matrix, and mean metrics."""
    hidden, head = (case[name].detach().requires_grad_() for name in ("hidden", "head"))
    rows = torch.arange(len(hidden), device=hidden.device)
    batch = Batch(
        input_ids=rows, position_ids=rows, cu_seqlens=rows[:2], predict_at=rows, target_ids=case["targets"],
        behavior_logprobs=case["behavior"], weights=case["weights"], depth=rows,
        scores=HiddenScores(logprobs=case["behavior"], hidden=case["teacher_hidden"]), denominator=1.0,
    )  # fmt: skip

    def prepare(first: int, last: int) -> Evaluate:
        scores = read(batch.rows(first, last), case["teacher_head"])

        def evaluate(student: StudentLogits, start: int, stop: int) -> TokenLoss:
            return objective(student, scores.rows(start - first, stop - first))

        return evaluate

    total, tally = flat_loss(hidden, head, batch.weights, prepare, chunk=chunk)
    return total.detach(), list(torch.autograd.grad(total * exp(0.5), (hidden, head))), tally.means()


def case_of(rows: int, vocabulary: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(DEVICE)

    every = torch.arange(rows, device=DEVICE)
    return {
        "hidden": normal(rows, 16), "head": normal(vocabulary, 16), "teacher_hidden": normal(rows, 24),
        "teacher_head": normal(vocabulary, 24) / 2, "behavior": -normal(rows).abs(),
        "targets": every % vocabulary, "weights": normal(rows).abs() * (every % 3 > 0),
    }  # fmt: skip


@needs_kernel
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize(("rows", "vocabulary", "chunk"), [(1, 61, 1), (9, 61, 4), (7, 1021, 0)])
def test_the_kernel_gives_the_plain_losses_gradients_and_metrics(
    objective: Any, rows: int, vocabulary: int, chunk: int
) -> None:
    case = case_of(rows, vocabulary)
    plain, plain_gradients, plain_metrics = loss_of(objective, case, chunk)
    kernel = with_kernel(LossKernel.LIGER, objective)
    fused, gradients, metrics = loss_of(kernel, case, chunk)
    assert type(kernel) is not type(objective)
    torch.testing.assert_close(fused, plain, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradients, plain_gradients, rtol=2e-5, atol=2e-6)
    assert metrics == pytest.approx(plain_metrics, rel=1e-5, abs=1e-6)


@needs_kernel
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(beta: float) -> None:
    logits = torch.randn(5, 300, device=DEVICE).requires_grad_()
    loss = divergence(logits.log_softmax(-1), logits.detach().log_softmax(-1), beta)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert float(loss.detach().abs().max()) < 1e-6 and float(gradient.abs().max()) < 1e-6


def test_what_the_kernel_cannot_compute_is_refused() -> None:
    assert with_kernel(LossKernel.TORCH, SampledReverseKL()) == SampledReverseKL()
    with pytest.raises(ConfigurationError, match=r"FullReverseKL, .*got SampledReverseKL; set learner.loss_kernel"):
        with_kernel(LossKernel.LIGER, SampledReverseKL())


def test_it_is_still_the_same_objective() -> None:
    for objective in OBJECTIVES:
        kernel = with_kernel(LossKernel.LIGER, objective)
        assert kernel.promise == objective.promise
        assert (kernel.consumes, kernel.on_policy) == (objective.consumes, objective.on_policy)


def test_a_machine_without_the_kernel_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    check_kernel(LossKernel.TORCH, torch.device("cpu"))
    with pytest.raises(ConfigurationError, match=r"liger-kernel, which is not installed|needs a CUDA device"):
        check_kernel(LossKernel.LIGER, torch.device("cpu"))
