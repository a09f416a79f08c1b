"""Checks of the tokens that an objective draws itself."""

from collections.abc import Iterator
from typing import Any

import torch

from opd.certify.certificate import Finding, Row
from opd.certify.gradients import SAME, Case, draws, every_token, logits, relative_difference
from opd.loss.chunked import StudentLogits

ERRORS = 5.0  # standard errors that a count may be off


def check_draws(case: Case) -> Iterator[Finding]:
    """Draws come from the current student, independent of each other, and the loss is that of the draws."""
    objective: Any = case.method.objective
    if not draws(objective):
        return
    batch = every_token(case.enumeration)
    student = StudentLogits(logits=logits(case.enumeration, batch).requires_grad_())
    ids, p = objective.draw(student, batch), student.logprobs.detach().exp()
    drawn = torch.zeros_like(p).scatter_add(-1, ids, torch.ones_like(ids, dtype=p.dtype)).sum(0)
    expected, spread = ids.shape[1] * p.sum(0), (ids.shape[1] * (p * (1 - p)).sum(0)).sqrt()
    off = float(((drawn - expected) / spread).abs().max())
    yield Row(name="draws follow the student (standard errors)", measured=off, tolerance=ERRORS)
    pairs = [(i, j) for i in range(ids.shape[1]) for j in range(i)]
    met = sum(float((ids[:, i] == ids[:, j]).sum()) for i, j in pairs)
    chance = p.square().sum(-1)
    spread = (len(pairs) * (chance * (1 - chance)).sum()).sqrt()
    off = float((met - len(pairs) * chance.sum()).abs() / spread) if pairs else 0.0
    yield Row(name="draws of a state are independent (standard errors)", measured=off, tolerance=ERRORS)
    own, other = objective(student, batch).loss, objective.given(ids, student, batch).loss
    measured, wanted = (torch.autograd.grad(x.sum(), student.logits, retain_graph=True)[0] for x in (own, other))
    yield Row(name="the loss is that of the draws", measured=relative_difference(measured, wanted), tolerance=SAME)
