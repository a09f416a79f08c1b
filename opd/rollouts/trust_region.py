"""Blended policies: the distribution nearest to the teacher within a KL trust region around the student."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

HALVINGS = 16  # of the interval that the exponent lies in, as published: KL/budget is then at least .999
FLOOR = -1e4  # log-probability of an impossible id: 0 as a probability in every precision, and no difference is NaN


@dataclass(frozen=True, slots=True, kw_only=True)
class Blended:
    """Blended policy at `n` states: its log-probabilities, the exponent of the teacher, and how far it is from p.

    `exponent` is beta in [0, 1]: 0 is the student p, 1 is the teacher q. `divergence` is KL(mu||p) in nats.
    """

    logprobs: Float[Tensor, "n V"]
    exponent: Float[Tensor, " n"]
    divergence: Float[Tensor, " n"]


def blended(student: Float[Tensor, "n V"], teacher: Float[Tensor, "n V"], budget: Float[Tensor, " n"]) -> Blended:
    """The distribution nearest to the teacher among those with KL(mu||student) <= budget (TRB, arXiv 2605.31159).

    It lies on the geometric path `mu_beta = p^(1-beta) q^beta / Z`, on which the divergence from p rises with beta, so
    beta is the largest that the budget allows: 1 where it allows the teacher itself, else found by `HALVINGS`
    bisections, of which the end within the budget is taken. `student` and `teacher` are logits of the same ids, of any
    floating type; `budget` is in nats, 0 or more. The paper computes in float32; this computes in float64, so that no
    row exceeds its budget by rounding. Where the budget is 0 it is the student's own softmax.
    """
    p, q = (x.double().log_softmax(-1).clamp(min=FLOOR) for x in (student, teacher))
    budget = budget.to(p)
    toward = torch.where(p > FLOOR, q - p, 0.0)  # what the student cannot write stays impossible
    feasible, beyond = torch.zeros_like(budget), torch.ones_like(budget)
    whole = _divergence(q, p) <= budget
    for _ in range(HALVINGS):
        middle = (feasible + beyond) / 2
        within = _divergence(_at(middle, p, toward), p) <= budget
        feasible, beyond = torch.where(within, middle, feasible), torch.where(within, beyond, middle)
    exponent = torch.where(budget > 0, torch.where(whole, 1.0, feasible), 0.0)
    logprobs = torch.where((exponent == 1)[:, None], q, _at(exponent, p, toward))
    return Blended(logprobs=logprobs, exponent=exponent, divergence=_divergence(logprobs, p))


def _at(exponent: Tensor, p: Tensor, toward: Tensor) -> Tensor:
    """Log-probabilities at a place of the geometric path."""
    return (p + exponent[:, None] * toward).log_softmax(-1)


def _divergence(logprobs: Tensor, p: Tensor) -> Tensor:
    return (logprobs.exp() * (logprobs - p)).sum(-1).clamp(min=0)


def with_one_end(logits: Float[Tensor, "n V"], ends: Sequence[int], end: int) -> Float[Tensor, "n V"]:
    """The probability of all `ends` moved to one of them; `end` is its id.

    Student and teacher may end a text with different ids. Left apart, each is improbable for the other model, and a
    blend of both would end too rarely.
    """
    others = [i for i in ends if i != end]
    if not others:
        return logits
    together = logits.clone()
    together[:, end] = logits[:, [end, *others]].logsumexp(-1)
    together[:, others] = -torch.inf
    return together
