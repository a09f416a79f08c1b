"""DistiLLM-2: each source of texts has a divergence of its own, and their sum is the paper's."""

from dataclasses import replace

import pytest
import torch

from opd.certify.gradients import relative_difference
from opd.certify.sources import with_both_sources
from opd.loss.packing import SequenceMean
from opd.method.method import Method
from opd.method.schedules import value
from opd.ports import Layout
from opd.types import NO_VERSION
from tests.unit.methods.test_hybrids import BOX, ONE, WORLD, shipped, step, trained

ALPHA = 0.1


def published(method: Method) -> torch.Tensor:
    """Gradient of `1/2 (mean_i D_SKL(y_t) + mean_i D_SRKL(y_s))`, each text by its own length."""
    leaves = [t.clone().requires_grad_() for t in (WORLD.student.embedding, WORLD.student.head)]
    student = replace(WORLD.student, embedding=leaves[0], head=leaves[1])
    of_teacher, of_student = list[torch.Tensor](), list[torch.Tensor]()
    for item in step(method):
        t = item.trajectory
        p = student.logprobs([(t.prompt.student_ids, t.token_ids)])[0].exp()
        q = WORLD.teachers[t.prompt.teacher].logprobs([(t.prompt.teacher_ids, t.token_ids)])[0].exp().detach()
        if (t.versions == NO_VERSION).all():
            of_teacher.append((q * (q / (ALPHA * q + (1 - ALPHA) * p)).log()).sum(-1).mean())
        else:
            of_student.append((p * (p / ((1 - ALPHA) * q + ALPHA * p)).log()).sum(-1).mean())
    assert len(of_teacher) > 1 and len(of_student) > 1
    loss = 0.5 * (torch.stack(of_teacher).mean() + torch.stack(of_student).mean())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])


def test_the_gradient_of_a_step_is_that_of_the_published_loss() -> None:
    both = with_both_sources(shipped("distillm2"))
    expected = published(both)
    for layout in (ONE, Layout(ranks=3, tokens_per_microbatch=40)):
        assert relative_difference(trained(both, layout=layout), expected) < 1e-6  # weights are float32
    swapped = with_both_sources(
        shipped(
            "distillm2", "method.weights.own.source=FIXED", "method.terms.teacher_texts.weights.fixed.source=STUDENT"
        )
    )
    assert relative_difference(trained(swapped), expected) > 1e-3


def test_with_the_students_texts_alone_it_is_the_skewed_reverse_kl_bit_for_bit() -> None:
    alone = shipped(
        "distillm2", "method.rollout.fraction=1", "method.coefficient=1", "method.terms.teacher_texts.coefficient=0"
    )
    plain = replace(shipped("skewed_reverse_kl"), normalizer=SequenceMean())
    assert not alone.is_sum and torch.equal(trained(alone), trained(plain))
    assert not torch.equal(trained(shipped("distillm2")), trained(plain))


@pytest.mark.parametrize(("at", "beta"), [(0, 1.0), (30, 1.2), (75, 1.5), (149, 1.5)])
def test_the_papers_curriculum_is_a_pair_of_schedules(at: int, beta: float) -> None:
    """The factors are `beta / 2` and `(2 - beta) / 2`, `beta = 1 + min(1, 2 step / steps) / 2`."""
    linear = "{_target_: opd.method.schedules.LinearSchedule, first: 0.5, steps: 75, last: "
    method = shipped(
        "distillm2", f"method.coefficient={linear}0.75}}", f"method.terms.teacher_texts.coefficient={linear}0.25}}"
    )
    own, theirs = (value(term.coefficient, BOX.at(at)) for term in method.every_term.values())
    assert own == pytest.approx(beta / 2) and theirs == pytest.approx((2 - beta) / 2)
