"""The mass outside a support in float32: what the student's row and the teacher's wire keep of it, against float64."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opd.errors import DataError
from opd.loss.chunked import StudentLogits
from opd.method.promises import States
from opd.objectives.support import Outside
from opd.objectives.topk import TopKDivergence
from opd.objectives.vocabulary import FullForwardKL, FullReverseKL, JensenShannon, SkewedForwardKL, SkewedReverseKL
from opd.ports import AtIds, ScoreRequest, TopK
from opd.scorers.validation import validate_scores
from opd.types import Batch, TopKScores
from opd.types.log_mass import ABSENT, remainder
from teacher_service import scoring
from teacher_service.frames import FrameLimits, Reply, decode_reply, encode_reply

V, K, ROWS = 152, 16, 8
MASSES = (5e-2, 1e-2, 1e-7, 1e-8, 1e-10)  # outside the support
OBJECTIVES = tuple(
    TopKDivergence(of=of, outside=Outside.BUCKET)
    for of in (
        *(FullReverseKL(), FullForwardKL()),
        *(JensenShannon(beta=0.5), JensenShannon(beta=0.1), SkewedReverseKL(), SkewedForwardKL()),
    )
)


def logits(outside: float, seed: int) -> Tensor:
    """float32 logits of `ROWS` states whose mass beyond their first K ids is `outside`."""
    draw = torch.Generator().manual_seed(seed)
    head, tail = torch.randn(2, ROWS, V, generator=draw, dtype=torch.float64)
    inside = head[:, :K].log_softmax(-1) + np.log1p(-outside)
    return (torch.cat([inside, tail[:, K:].log_softmax(-1) + np.log(outside)], -1) + 3.0).float()


def told(z: Tensor, kind: Any) -> TopKScores:
    """What a backend with whole rows says of a teacher's logits, after its way over the wire."""
    written = np.zeros(ROWS, dtype=np.int32)
    request = ScoreRequest(context_ids=np.ones(1, np.int32), token_ids=written, kinds=(kind,))
    said = list(
        scoring.scores_from_hidden(
            [request], torch.arange(ROWS)[:, None].float(), lambda h: z[h[:, 0].long()], 3, lambda a: a
        )
    )
    frame = encode_reply(
        Reply(call=bytes(16), model=bytes(16), digests=(bytes(16),), kinds=((type(kind),),), answers=tuple(said))
    )
    ((answer,),) = decode_reply(frame, FrameLimits()).answers
    assert isinstance(answer, TopKScores)
    return answer


def trained(objective: Any, z: Tensor, teacher: TopKScores) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float32, as the learner has them."""
    leaf, rows = z.clone().requires_grad_(), torch.arange(ROWS)
    batch = Batch(
        input_ids=rows,
        position_ids=rows,
        cu_seqlens=torch.tensor([0, ROWS]),
        predict_at=rows,
        target_ids=torch.zeros(ROWS, dtype=torch.int64),
        behavior_logprobs=torch.zeros(ROWS),
        weights=torch.ones(ROWS),
        depth=rows,
        scores=teacher.to("cpu", lambda a: a),
        denominator=1.0,
    )
    loss = objective(StudentLogits(logits=leaf, overlap_k=0), batch).loss
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def exact(objective: Any, z: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """The promise in float64, of the same float32 logits."""
    leaf = z.double().requires_grad_()
    members = torch.arange(V)[None] < K
    states = States(
        student=leaf.log_softmax(-1),
        teacher=q.double().log_softmax(-1),
        behavior=leaf.detach(),
        support=members.expand(ROWS, -1),
        credit=torch.zeros_like(leaf),
        target=torch.zeros_like(leaf),
    )
    value = objective.promise(states)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def far(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_loss_and_gradient_in_float32_are_those_of_float64_however_little_lies_outside(objective: Any) -> None:
    """Within 1e-5, in the tail alone, too: there the signal was lost where a mass was below a rounding step of 1."""
    ids = np.tile(np.arange(K, dtype=np.int32), (ROWS, 1))
    for seed, (mine, its) in enumerate((a, b) for a in MASSES for b in MASSES if a != b):
        z, q = logits(mine, seed), logits(its, 100 + seed)
        ours, exactly = trained(objective, z, told(q, AtIds(ids=ids))), exact(objective, z, q)
        tails = [gradient[:, K:] for _, gradient in (ours, exactly)]
        errors = [far(a, b) for a, b in (*zip(ours, exactly, strict=True), tails)]
        assert max(errors) < 1e-5, (mine, its, errors)


def test_a_teachers_own_top_k_brings_the_same_mass_as_ids_that_are_asked() -> None:
    q = logits(1e-8, 0)
    own, asked = told(q, TopK(k=K)), told(q, AtIds(ids=np.tile(np.arange(K, dtype=np.int32), (ROWS, 1))))
    np.testing.assert_array_equal(own.rest, asked.rest)
    np.testing.assert_allclose(np.exp(own.rest.astype(np.float64)), 1e-8, rtol=1e-5)
    everything = told(q, TopK(k=V)).rest
    assert (everything == np.float32(ABSENT)).all() and 1e6 * np.exp(np.float64(ABSENT)) < 1e-25


def test_what_is_left_fits_what_is_named_also_if_an_id_is_named_twice() -> None:
    q, written = logits(0.3, 0), np.zeros(ROWS, dtype=np.int32)
    kind = AtIds(ids=np.tile(np.array([5, 3, 5, 20], dtype=np.int32), (ROWS, 1)))
    request, answer = ScoreRequest(context_ids=np.ones(1, np.int32), token_ids=written, kinds=(kind,)), told(q, kind)
    validate_scores([request], [(answer,)])
    with pytest.raises(DataError, match="do not sum to 1"):
        validate_scores([request], [(replace(answer, rest=answer.rest - 1),)])


def test_a_support_of_everything_has_no_bucket() -> None:
    """Then the coarsened divergence is the whole one, whatever is said of the rest."""
    z, q = logits(0.5, 1), logits(0.3, 2)
    loss, gradient = trained(TopKDivergence(of=FullReverseKL()), z, told(q, TopK(k=V)))
    p = z.double().requires_grad_()
    whole = FullReverseKL().between(p.log_softmax(-1), q.double().log_softmax(-1))
    (slope,) = torch.autograd.grad(whole.sum(), p)
    assert far(loss, whole.detach()) < 1e-5 and far(gradient, slope) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_a_support_alone_says_of_the_rest_is_bounded_by_one_rounding_step(dtype: torch.dtype) -> None:
    """For sources without whole rows (`prompt_logprobs`): below a rounding step of 1 they know nothing."""
    eps = torch.finfo(dtype).eps
    for mass in (0.9, 1e-2, 1e-5, 1e-14, 0.0):
        inside = (torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64) * (1 - mass)).log().to(dtype)[None]
        left = remainder(inside)
        assert isinstance(left, Tensor) and left.dtype == dtype
        assert abs(float(left.double().exp()) - mass) < 4 * eps and float(left) >= np.log(eps) * (1 + 1e-6)
        np.testing.assert_array_equal(remainder(inside.numpy()), left.numpy())
    said = TopKScores(logprobs=inside[:, 0], topk_ids=torch.tensor([[0, 1, 2]]), topk_logprobs=inside)
    torch.testing.assert_close(torch.as_tensor(said.rest), remainder(inside))
