"""liger-kernel's fused kernel in place of torch's own operations, for divergences over the whole vocabulary on a GPU.

The loss stays flat in memory as before (`opd.loss.chunked`): a chunk's log-probabilities go in, and the kernel gives
loss and gradient of every element in one pass, where torch keeps half a dozen arrays of that size. Value, gradient and
metrics are those of the objective it stands for. liger-kernel is imported when it is first used.
"""

import os
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor

from learner.config import LossKernel
from opd.errors import ConfigurationError
from opd.loss.chunked import StudentLogits
from opd.method.promises import Promise
from opd.objectives.vocabulary import FullForwardKL, FullReverseKL, JensenShannon
from opd.ports import LossFunction
from opd.types import Batch, Scores, TokenLoss, VocabularyScores

_IGNORE_INDEX = -100  # the kernel's own default; no labels are passed, so no row is ignored


class _PerToken(torch.autograd.Function):
    """Generalized JSD per row of `p`, the student's log-probabilities, against the teacher's `q`."""

    @staticmethod
    def forward(ctx, p, q, beta):
        import liger_kernel.functional  # noqa: F401 # pyright: ignore[reportMissingImports] (declares where the kernels are)
        from liger_kernel.backends import dispatch  # pyright: ignore[reportMissingImports]

        # The kernel writes the gradient over its first argument. The public function returns one sum over all rows,
        # and a token's weight and metrics need the loss of each. 1.0: the kernel's divisor.
        losses, gradient = dispatch("jsd_loss_and_grad", p.clone(), q.contiguous(), None, beta, _IGNORE_INDEX, 1.0)
        ctx.gradient = gradient
        return losses.sum(-1)

    @staticmethod
    def backward(ctx, *grads):
        gradient, ctx.gradient = ctx.gradient, None  # ours alone, so it is scaled in place
        return gradient.mul_(grads[0][:, None]), None, None


def divergence(p: Float[Tensor, "n V"], q: Float[Tensor, "n V"], beta: float) -> Float[Tensor, " n"]:
    """Per row of log-probabilities (float32): KL(q||p) at `beta` 0, KL(p||q) at 1, between them JSD(beta) of GKD.

    Differentiable in `p`, once.
    """
    loss = _PerToken.apply(p, q, beta)
    assert isinstance(loss, Tensor)
    return loss


@dataclass(frozen=True, slots=True, kw_only=True)
class LigerDivergence:
    """`of`, computed by liger-kernel; `reports` is the metric that has the loss itself, as `of` has it ("": none)."""

    of: JensenShannon | FullReverseKL | FullForwardKL
    beta: float
    reports: str = ""

    @property
    def consumes(self) -> type[Scores]:
        return self.of.consumes

    @property
    def on_policy(self) -> bool:
        return self.of.on_policy

    @property
    def promise(self) -> Promise:
        return self.of.promise

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> TokenLoss:
        loss = divergence(student.logprobs, batch.scores.vocabulary_logprobs, self.beta)
        return TokenLoss(loss=loss, metrics={self.reports: loss.detach()} if self.reports else {})


def with_kernel(kernel: LossKernel, objective: LossFunction) -> LossFunction:
    """`objective`, computed by the chosen kernel.

    Raises:
        ConfigurationError: the kernel cannot compute it.
    """
    if kernel is LossKernel.TORCH:
        return objective
    if isinstance(objective, JensenShannon):
        return LigerDivergence(of=objective, beta=objective.beta, reports="jsd")
    if isinstance(objective, FullReverseKL):
        return LigerDivergence(of=objective, beta=1.0)
    if isinstance(objective, FullForwardKL):
        return LigerDivergence(of=objective, beta=0.0)
    raise ConfigurationError(
        "learner.loss_kernel=LIGER needs objective FullReverseKL, FullForwardKL or JensenShannon, but got "
        f"{type(objective).__name__}; set learner.loss_kernel=TORCH"
    )


def check_kernel(kernel: LossKernel, device: torch.device) -> None:
    """Refuse a kernel that cannot run in this process on `device`.

    Raises:
        ConfigurationError: the package or the device is missing.
    """
    if kernel is LossKernel.TORCH:
        return
    if find_spec("liger_kernel") is None:
        raise ConfigurationError(
            "learner.loss_kernel=LIGER needs the package liger-kernel, which is not installed here; "
            "pip install '.[gpu]' on every machine of the learner, or set learner.loss_kernel=TORCH"
        )
    # Triton's interpreter runs the same kernel on a CPU, far too slowly for more than tests.
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigurationError(
            "learner.loss_kernel=LIGER needs a CUDA device, but the learner is on a CPU; set learner.loss_kernel=TORCH"
        )
