"""Text of two sources, answers as text, tokens left out, and credit for what a token leads to."""

import asyncio
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opd.certify.engines import RequestLog, engines
from opd.certify.enumeration import enumerated
from opd.certify.models import TinyModel
from opd.certify.worlds import make_world
from opd.errors import ConfigurationError, DataError
from opd.loss.chunked import StudentLogits
from opd.loss.packing import Constant, pack
from opd.method.method import Method
from opd.objectives.returns import MiniLLM
from opd.objectives.sampled import SampledReverseKL
from opd.objectives.vocabulary import JensenShannon
from opd.ports import Layout, Need, Role, needs_of
from opd.rollouts.mixed import AnswerRollout, Mixed
from opd.rollouts.student import StudentRollout, TeacherRollout
from opd.scorers.returns import WithReturns, returns
from opd.scorers.teacher import SampledTokens, TeacherHidden, Unscored
from opd.token_weights.length import SkipTruncated
from opd.token_weights.special_tokens import SkipFirst, look_up
from opd.token_weights.teachers import TeacherBalance
from opd.types import Prompt, Scored, StopReason, TokenScores, TopKReturnScores, Trajectory

STUDENT, TEACHER = StudentRollout(max_tokens=8), TeacherRollout(max_tokens=8)


BOX = engines(make_world(0, 6), RequestLog())


def mixed(fraction: float, seed: int = 0) -> Mixed:
    return Mixed(student=STUDENT, fixed=TEACHER, fraction=fraction, seed=seed)


def test_the_share_of_student_text_is_lambda_and_a_pure_function_of_prompt_and_seed() -> None:
    ids = [f"shop/{i}" for i in range(2000)]
    for fraction in (0.0, 0.3, 1.0):
        share = np.mean([mixed(fraction).student_generates(i) for i in ids])
        assert abs(share - fraction) <= 4 * np.sqrt(fraction * (1 - fraction) / len(ids))
    assert [mixed(0.5).student_generates(i) for i in ids] == [mixed(0.5).student_generates(i) for i in ids]
    other = [mixed(0.5, seed=1).student_generates(i) for i in ids]
    assert 0.4 < np.mean(np.equal(other, [mixed(0.5).student_generates(i) for i in ids])) < 0.6


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigurationError, match=r"Mixed\.fraction needs a number from 0 to 1, got"):
        mixed(fraction)


def test_a_mixture_is_on_policy_only_where_nothing_is_mixed_in() -> None:
    parts: Any = {"name": "m", "scorer": SampledTokens(), "objective": SampledReverseKL()}
    assert Method(**parts, rollout=mixed(1.0))
    with pytest.raises(ConfigurationError, match=r"SampledReverseKL estimates from .* but rollout Mixed has text of"):
        Method(**parts, rollout=mixed(0.9))
    assert Method(name="g", rollout=mixed(0.5), scorer=TeacherHidden(), objective=JensenShannon())
    topk = Mixed(student=StudentRollout(max_tokens=8, record_topk=4), fixed=TEACHER)
    assert topk.records is TokenScores and needs_of(topk) == {Need(Role.STUDENT), Need(Role.WRITER)}
    assert needs_of(Mixed(student=STUDENT, fixed=AnswerRollout(max_tokens=8))) == {Need(Role.STUDENT)}


@pytest.mark.parametrize("writer", [StudentRollout, TeacherRollout])
@given(top_p=st.floats(0.001, 1) | st.just(1.0), temperature=st.just(0.0) | st.floats(0.01, 100))
def test_text_is_cut_exactly_where_a_token_of_the_model_cannot_be_written(
    writer: Any, top_p: float, temperature: float
) -> None:
    whole = top_p == 1 and temperature > 0
    assert writer(max_tokens=1, top_p=top_p, temperature=temperature).truncated is not whole


@given(
    fraction=st.just(0.0) | st.floats(0, 1) | st.just(1.0),
    student=st.sampled_from([STUDENT, replace(STUDENT, top_p=0.9)]),
    fixed=st.sampled_from([TEACHER, replace(TEACHER, temperature=0.0), AnswerRollout(max_tokens=8)]),
)
def test_a_mixture_has_the_properties_of_whoever_may_write_in_it(fraction: float, student: Any, fixed: Any) -> None:
    """The fixed source writes nothing at lambda = 1, and only there; the student's settings hold at any lambda."""
    made = Mixed(student=student, fixed=fixed, fraction=fraction)
    assert made.truncated is (student.truncated or (fraction != 1 and fixed.truncated))
    assert made.on_policy is (fraction == 1)


def test_at_the_ends_of_lambda_a_mixture_writes_what_it_lists() -> None:
    world = make_world(0, 9)
    limits = mixed(0.5, seed=3).limits
    assert [limit.rollout.fraction for limit in limits] == [0, 1] and len({limit.name for limit in limits}) == 2
    for limit, writer in zip(limits, (TEACHER, STUDENT), strict=True):
        assert limit.equals is writer and limit.rollout == replace(mixed(0.5, seed=3), fraction=limit.rollout.fraction)
        pairs = zip(
            enumerated(limit.rollout, Unscored(), world).scored,
            enumerated(writer, Unscored(), world).scored,
            strict=True,
        )
        for one, other in pairs:
            assert np.array_equal(one.trajectory.token_ids, other.trajectory.token_ids)
            assert np.array_equal(one.trajectory.behavior.logprobs, other.trajectory.behavior.logprobs)


def test_a_group_has_one_source() -> None:
    world = make_world(0, 9)
    for fraction, model in ((0.0, world.teachers["default"]), (1.0, world.student)):
        for item in enumerated(mixed(fraction), Unscored(), world).scored:
            prompt = item.trajectory.prompt
            context = prompt.student_ids if fraction else prompt.teacher_ids
            (row,) = model.logprobs([(context, item.trajectory.token_ids)])
            expected = row.gather(-1, torch.as_tensor(item.trajectory.token_ids).long()[:, None])[:, 0]
            np.testing.assert_allclose(item.trajectory.behavior.logprobs, expected.numpy(), atol=1e-12)


def test_an_answer_is_read_to_its_end_or_cut(make: Any) -> None:
    box = engines(make_world(0, 6), RequestLog())
    prompts = [make.prompt([1], answer="4 5"), make.prompt([1], answer="4 5 3 2")]
    whole, cut = asyncio.run(AnswerRollout(max_tokens=3)(prompts, box))
    assert whole.token_ids.tolist() == [4, 5, 0] and whole.stop is StopReason.END
    assert cut.token_ids.tolist() == [4, 5, 3] and cut.stop is StopReason.LENGTH
    assert cut.sample == 1 and not cut.behavior.logprobs.any() and cut.loss_mask.all()
    with pytest.raises(DataError, match=r"AnswerRollout needs an answer for every prompt, but 'p' has none; set"):
        asyncio.run(AnswerRollout(max_tokens=3)([make.prompt([1])], box))


def test_the_first_occurrence_is_left_out_and_the_second_is_not(make: Any) -> None:
    step = [make.scored([7], [5, 7, 5, 7, 2]), make.scored([7], [1, 2])]
    assert [w.tolist() for w in SkipFirst(token_ids=[7, 5])(step, BOX)] == [[0, 0, 1, 1, 1], [1, 1]]
    assert [w.tolist() for w in SkipFirst()(step, BOX)] == [[1] * 5, [1, 1]]


def test_tokens_are_left_out_by_name_where_the_vocabulary_has_them(make: Any) -> None:
    named = SkipFirst(token_ids=[2], tokens=["<", "think"])
    known = look_up({"special": named, "whole": SkipTruncated()}, {"<": 7, "a": 5})
    assert known == {"special": SkipFirst(token_ids=(2, 7)), "whole": SkipTruncated()}
    step = [make.scored([7], [5, 7, 7, 2])]
    assert [w.tolist() for w in known["special"](step, BOX)] == [[1, 0, 1, 0]]
    inside = look_up({"balance": TeacherBalance(filters={"special": named})}, {"<": 7})
    assert inside == {"balance": TeacherBalance(filters={"special": SkipFirst(token_ids=(2, 7))})}


def test_a_token_whose_id_was_not_looked_up_is_never_trained_by_mistake(make: Any) -> None:
    step = [make.scored([7], [5, 7, 7, 2])]
    named = SkipFirst(tokens=["<"])
    for weight in (named, TeacherBalance(filters={"special": named})):
        with pytest.raises(ConfigurationError, match=r"SkipFirst names tokens \['<'\] and needs their ids .*; look"):
            weight(step, BOX)


def test_returns_are_what_comes_after() -> None:
    rewards = np.array([9.0, 1.0, 2.0, 4.0])
    assert returns(rewards, 1.0, False).tolist() == [7, 6, 4, 0]
    assert returns(rewards, 0.5, False).tolist() == [3, 4, 4, 0]
    assert returns(rewards, 1.0, True).tolist() == [7 / 3, 3, 4, 0]
    assert returns(rewards[:1], 1.0, True).tolist() == [0] and returns(rewards[:0], 1.0, True).tolist() == []
    for wrong in ({"discount": 1.5}, {"reward_scale": 0.0}):
        with pytest.raises(ConfigurationError, match=r"WithReturns\.(discount|reward_scale) needs a number from"):
            WithReturns(**wrong)


def test_a_token_s_own_reward_is_in_its_return_where_that_is_asked_for() -> None:
    rewards = np.array([9.0, 1.0, 2.0, 4.0])
    assert returns(rewards, 1.0, False, True).tolist() == [16, 7, 6, 4]
    assert returns(rewards, 0.5, False, True).tolist() == [9 + 0.5 * 3, 3, 4, 4]
    assert returns(rewards, 1.0, True, True).tolist() == [16 / 4, 7 / 3, 6 / 2, 4 / 1]


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("discount", "scale"), [(1.0, 1.0), (0.5, 2.0)])
def test_a_scorer_s_returns_are_of_what_the_teacher_and_the_writer_said(
    make: Any, normalized: bool, own: bool, discount: float, scale: float
) -> None:
    world = make_world(3, 6)
    behavior = TokenScores(logprobs=np.array([-0.5, -1.0, -2.0, -0.25]))
    text = make.trajectory([1], [2, 5, 3, 2], behavior=behavior)
    scorer = WithReturns(k=2, discount=discount, length_normalized=normalized, own_reward=own, reward_scale=scale)
    (said,) = asyncio.run(scorer([text], engines(world, RequestLog())))
    rewards = scale * (np.asarray(said.logprobs) - behavior.logprobs)
    for t in range(4):
        later = [discount ** (u - t - (not own)) * rewards[u] for u in range(t if own else t + 1, 4)]
        expected = sum(later) / (max(len(later), 1) if normalized else 1)
        assert said.returns[t] == pytest.approx(expected, rel=1e-5)
    assert said.topk_ids.shape == (4, 2) and said.rest.shape == (4,)


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.booleans(), st.booleans())
def test_words_of_an_environment_take_no_place_in_a_return(own: list[bool], normalized: bool, first: bool) -> None:
    mask, draw = np.array(own), np.random.default_rng(len(own))
    text = Trajectory(
        prompt=Prompt(id="p", student_ids=np.array([1], np.int32), teacher_ids=np.array([1], np.int32)),
        sample=0,
        token_ids=draw.integers(0, 6, len(own)).astype(np.int32),
        behavior=TokenScores(logprobs=np.where(mask, draw.uniform(-3, 0, len(own)), 1e9)),
        loss_mask=mask,
        versions=np.zeros(len(own), np.int32),
        stop=StopReason.END,
    )
    scorer = WithReturns(k=2, discount=0.5, length_normalized=normalized, own_reward=first)
    (said,) = asyncio.run(scorer([text], engines(make_world(3, 6), RequestLog())))
    rewards = (np.asarray(said.logprobs) - text.behavior.logprobs)[mask]
    assert np.array_equal(said.returns[mask], returns(rewards, 0.5, normalized, first))
    assert not said.returns[~mask].any()


def test_without_normalization_minillm_is_the_gradient_of_the_sequence_kl(make: Any) -> None:
    """All sequences of two tokens, enumerated: both parts together see how a token moves the next state."""
    world, context = make_world(3, 6), np.array([1], dtype=np.int32)
    texts = [np.array(pair, dtype=np.int32) for pair in product(range(6), repeat=2)]

    def logprob(model: TinyModel, text: np.ndarray) -> Tensor:
        (rows,) = model.logprobs([(context, text)])
        return rows.gather(-1, torch.as_tensor(text).long()[:, None])[:, 0]

    student = TinyModel(
        embedding=world.student.embedding.clone().requires_grad_(), head=world.student.head.clone().requires_grad_()
    )
    own = torch.stack([logprob(student, t).sum() for t in texts])
    other = torch.stack([logprob(world.teachers["default"], t).sum() for t in texts])
    parameters = (student.embedding, student.head)
    exact = torch.autograd.grad((own.exp() * (own - other.detach())).sum(), parameters)

    written = []
    for text in texts:
        behavior = TokenScores(logprobs=logprob(world.student, text).numpy())
        written.append(make.trajectory(context, text, prompt=make.prompt(context), behavior=behavior))
    scorer = WithReturns(k=2, length_normalized=False)
    said = asyncio.run(scorer(written, engines(world, RequestLog())))
    assert all(type(s) is TopKReturnScores for s in said)
    scored: Any = [Scored(trajectory=t, scores=s) for t, s in zip(written, said, strict=True)]
    chances = [np.full(2, chance) for chance in own.detach().exp().numpy()]
    ((batch,),) = pack(scored, chances, Layout(ranks=1, tokens_per_microbatch=100), Constant(divisor=1.0))
    here = batch.to("cpu", lambda handle: handle)
    logits = student.hidden(here.input_ids, here.position_ids)[here.predict_at] @ student.head.T
    losses = {part: part(StudentLogits(logits=logits), here).loss for part in (MiniLLM(), MiniLLM(long_weight=0.0))}
    got = {
        part: torch.autograd.grad((here.weights * loss).sum(), parameters, retain_graph=True)
        for part, loss in losses.items()
    }
    for mine, single, right in zip(got[MiniLLM()], got[MiniLLM(long_weight=0.0)], exact, strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-6)
        assert float((single - right).abs().max()) > 1e-3
