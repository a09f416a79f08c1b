"""Tokens that an objective draws itself."""

from collections.abc import Iterator
from typing import Any

import torch

from opd.certify.gradients import SAME, Case, distance, draws, every_token, logits
from opd.certify.page import Finding, Row
from opd.loss.chunked import StudentLogits

ERRORS = 5.0  # standard errors that a count may be off


def of_draws(found: Case) -> Iterator[Finding]:
    """They come from the current student, one independent of the other, and the loss is that of what was drawn."""
    objective: Any = found.method.objective
    if not draws(objective):
        return
    batch = every_token(found.seen)
    student = StudentLogits(logits=logits(found.seen, batch).requires_grad_())
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
    slope, expected_slope = (torch.autograd.grad(x.sum(), student.logits, retain_graph=True)[0] for x in (own, other))
    yield Row(name="the loss is that of the draws", measured=distance(slope, expected_slope), tolerance=SAME)
