"""A method is a sum of terms: one pass, one packed step, and the gradient of the sum of what each promises."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from launch.config.run_config import run_config
from opd.certify.certify import certify
from opd.certify.checks.term_sums import GRADIENT
from opd.certify.engines import RequestLog, engines
from opd.certify.gradients import gradient, make_case, microbatch_gradient, relative_difference
from opd.certify.worlds import make_world
from opd.errors import ConfigurationError, DataError
from opd.loop.train import _largest
from opd.loss.chunked import StudentLogits
from opd.loss.metric_sums import MetricSums
from opd.loss.packing import Constant, SequenceMean, TokenMean, WeighedTerm, halves, pack, pack_terms
from opd.method.method import Method, packed, scored, weighed
from opd.method.needs import asks_prompts_teacher, named
from opd.method.schedules import CosineSchedule, LinearSchedule, value
from opd.method.terms import MAIN, SumOfTerms, Term
from opd.objectives.sampled import Likelihood, SampledReverseKL
from opd.objectives.vocabulary import FullForwardKL, FullReverseKL
from opd.ports import Context, Layout, Role
from opd.rollouts.student import StudentRollout
from opd.scorers.ensemble import Ensemble
from opd.scorers.teacher import SampledTokens, TeacherHidden, Unscored
from opd.types import Batch, Scores, TokenLoss, TopKScores, Trajectory

TOY = Path(__file__).resolve().parents[3] / "examples/new_method/my_conf"
ROLLOUT = StudentRollout(max_tokens=8)
BOX = engines(make_world(0, 6), RequestLog())


def toy() -> Method:
    """The method of an example's YAML file, built as a run builds it."""
    return run_config([f"conf={TOY}", "method=anchored_reverse_kl"]).method


def two(**fields: Any) -> Method:
    """Reverse KL and likelihood."""
    second = Term(scorer=Unscored(), objective=Likelihood(), **fields)
    return Method(name="two", rollout=ROLLOUT, scorer=TeacherHidden(), objective=FullReverseKL(), terms={"nll": second})


def test_a_two_term_method_is_one_file_and_is_certified() -> None:
    page = certify(toy())
    assert page.passed, page.failures
    names = [row.name for row in page.rows]
    assert GRADIENT in names and "the sum has a part of anchor" in names
    assert any(name.startswith("main: gradient") for name in names) and any(n.startswith("anchor: ") for n in names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Doubled(SumOfTerms):
    """A sum that forgets what the second term is divided by."""

    def __call__(self, student: Any, batch: Any) -> TokenLoss:
        wrong = {n: t if n == MAIN else replace(t, denominator=1.0) for n, t in batch.terms.items()}
        return SumOfTerms.__call__(self, student, replace(batch, terms=wrong))


def test_a_wrong_sum_is_not_certified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd.certify.checks.term_sums.SumOfTerms", Doubled)
    assert certify(toy()).failures == [GRADIENT]


@given(
    coefficient=st.sampled_from([-0.5, 0.0, 0.25, 3.0]),
    normalizers=st.tuples(*[st.sampled_from([TokenMean(), SequenceMean(), Constant(divisor=7.0)])] * 2),
    layout=st.builds(Layout, ranks=st.integers(1, 3), tokens_per_microbatch=st.sampled_from([40, 10_000])),
    seed=st.integers(0, 99),
)
def test_the_gradient_of_a_sum_is_the_sum_of_gradients(
    coefficient: float, normalizers: Any, layout: Layout, seed: int
) -> None:
    """Whatever the weights of each: a token may be trained by either term, by both, or by none."""
    found = make_case(
        Method(name="m", rollout=ROLLOUT, scorer=TeacherHidden(), objective=FullReverseKL()), make_world(1)
    )
    draw = np.random.default_rng(seed)
    weights = [[draw.integers(0, 3, len(s.trajectory)) * 1.0 for s in found.enumeration.scored] for _ in range(2)]
    objectives = {MAIN: FullReverseKL(), "other": FullForwardKL()}
    terms = {
        name: WeighedTerm(weights=w, normalizer=n, coefficient=c)
        for name, w, n, c in zip(objectives, weights, normalizers, (1.0, coefficient), strict=True)
    }
    batches = pack_terms(found.enumeration.scored, terms, layout)
    together = microbatch_gradient(batches, SumOfTerms(objectives=objectives), found.world)
    apart = [
        gradient(found.enumeration, w, o, n) for w, o, n in zip(weights, objectives.values(), normalizers, strict=True)
    ]
    assert relative_difference(together, apart[0] + coefficient * apart[1]) < 1e-6


def test_one_term_with_coefficient_one_is_packed_as_ever(make: Any) -> None:
    method = Method(name="m", rollout=ROLLOUT, scorer=Unscored(), objective=Likelihood())
    items = [make.scored([1, 2], [3, 4]), make.scored([1], [2])]
    layout = Layout(ranks=1, tokens_per_microbatch=99)
    ((batch,),) = packed(method, items, weighed(method, items, BOX), layout, "")
    ((plain,),) = pack(items, [np.ones(2), np.ones(1)], layout, TokenMean())
    assert method.loss is method.objective and not batch.terms
    assert (
        (batch.denominator, batch.weights.tolist()) == (plain.denominator, plain.weights.tolist()) == (3.0, [1.0] * 3)
    )


def test_a_scheduled_coefficient_scales_a_single_term_too() -> None:
    fading = LinearSchedule(first=1.0, last=0.0)
    method = Method(name="m", rollout=ROLLOUT, scorer=Unscored(), objective=Likelihood(), coefficient=fading)
    assert method.is_sum and weighed(method, [], replace(BOX, step=3, steps=4))[MAIN].coefficient == 0.25


class Counting(TeacherHidden):
    """Counts how often it is asked."""

    asked: ClassVar[list[int]] = []

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        self.asked.append(len(trajectories))
        return await TeacherHidden.__call__(self, trajectories, context)


def test_terms_with_equal_scorers_share_one_answer_down_to_the_loss() -> None:
    method = Method(
        name="m",
        rollout=ROLLOUT,
        scorer=Counting(),
        objective=FullReverseKL(),
        terms={"forward": Term(scorer=Counting(), objective=FullForwardKL())},
    )
    world = make_world(0, 6)
    box = engines(world, RequestLog())
    group = [p for p in world.prompts if p.id == world.prompts[0].id]
    Counting.asked.clear()
    items = asyncio.run(_collected(method, group, box))
    assert Counting.asked == [len(group)]
    ((batch,),) = packed(method, items, weighed(method, items, box), Layout(ranks=1, tokens_per_microbatch=9**9), "")
    assert batch.terms["forward"].scores is batch.scores
    part = batch.to("cpu", lambda rows: rows).rows(0, 3)
    assert part.terms["forward"].scores is part.scores and len(part.terms["forward"].weights) == 3


async def _collected(method: Method, group: Any, box: Context) -> Any:
    return await scored(method, await method.rollout(group, box), box)


@dataclass(frozen=True, slots=True, kw_only=True)
class Infinite:
    """A loss that is infinite at tokens of odd depth."""

    consumes: ClassVar[type[Scores]] = Scores
    on_policy: ClassVar[bool] = False

    def __call__(self, student: StudentLogits, batch: Batch[Any]) -> TokenLoss:
        loss = student.at(batch.target_ids)
        infinite = torch.where(batch.depth % 2 == 1, torch.inf, loss)
        return TokenLoss(loss=infinite, metrics={"depth": batch.depth.double()})


def test_a_token_that_a_term_does_not_train_has_none_of_its_loss_and_metrics(make: Any) -> None:
    items = [make.scored([1], [2, 3, 4, 5])]
    terms = {
        MAIN: WeighedTerm(weights=[np.array([0.0, 1.0, 0.0, 1.0])], normalizer=TokenMean()),
        "even": WeighedTerm(weights=[np.array([2.0, 0.0, 0.0, 0.0])], normalizer=TokenMean(), coefficient=0.5),
    }
    ((batch,),) = pack_terms(items, terms, Layout(ranks=1, tokens_per_microbatch=99))
    here = batch.to("cpu", lambda rows: rows)
    assert here.depth.tolist() == [0, 1, 3] and here.weights.tolist() == [1, 1, 1] and here.denominator == 2
    leaf = torch.zeros(3, 7, dtype=torch.float64, requires_grad=True)
    both = SumOfTerms(objectives={MAIN: Likelihood(), "even": Infinite()})
    result = both(StudentLogits(logits=leaf, overlap_k=0), here)
    nll = float(torch.tensor(7.0).log())
    assert (result.loss / 2).tolist() == pytest.approx([-nll * 2.0 * 0.5, nll / 2, nll / 2])
    means = MetricSums.of(result.metrics, here.weights > 0).means()
    assert means["even/depth"] == 0.0 and means["even/coefficient"] == 0.5 and means["even/loss"] == pytest.approx(-nll)
    (slope,) = torch.autograd.grad(result.loss.sum(), leaf)
    assert bool(slope.isfinite().all()) and _rows(slope) == [True, True, True]


@dataclass(frozen=True, slots=True, kw_only=True)
class Blind:
    """A loss that does not read the student."""

    def __call__(self, student: StudentLogits, batch: Batch[Any]) -> TokenLoss:
        return TokenLoss(loss=torch.zeros_like(batch.weights), metrics={})


def test_diagnostics_of_a_term_take_no_gradient_from_the_next(make: Any) -> None:
    """They are the first to read the student here, and have no gradient themselves."""
    ones = WeighedTerm(weights=[np.ones(2)], normalizer=TokenMean())
    layout = Layout(ranks=1, tokens_per_microbatch=9)
    one = np.array([[0], [1]])
    scores = TopKScores(logprobs=-np.ones(2), topk_ids=one, topk_logprobs=-np.ones((2, 1)))
    ((batch,),) = pack_terms([make.scored([1], [2, 3], scores)], {MAIN: ones, "b": ones}, layout)
    leaf = torch.zeros(2, 7, dtype=torch.float64, requires_grad=True)
    both: Any = {MAIN: Blind(), "b": Likelihood()}
    result = SumOfTerms(objectives=both)(StudentLogits(logits=leaf), batch.to("cpu", lambda rows: rows))
    assert {"student_mass", "b/student_mass", "b/loss"} <= result.metrics.keys()
    assert _rows(torch.autograd.grad(result.loss.sum(), leaf)[0]) == [True, True]


def _rows(slope: Tensor) -> list[bool]:
    return [bool(row.any()) for row in slope]


def test_a_batch_of_terms_is_halved_between_sequences_and_idle_ranks_train_nothing(make: Any) -> None:
    items = [make.scored([1], [2, 3]), make.scored([1], [4])]
    ones = WeighedTerm(weights=[np.ones(2), np.ones(1)], normalizer=TokenMean())
    ((first,), (second,)) = pack_terms(items, {MAIN: ones, "b": ones}, Layout(ranks=2, tokens_per_microbatch=99))
    assert {len(first.terms["b"].weights), len(second.terms["b"].weights)} == {2, 1}
    ((alone,), *others) = pack_terms(items, {MAIN: ones, "b": ones}, Layout(ranks=3, tokens_per_microbatch=99))
    assert alone.weights.any() and not others[-1][0].weights.any() and not others[-1][0].terms["b"].weights.any()
    ((both,),) = pack_terms(items, {MAIN: ones, "b": ones}, Layout(ranks=1, tokens_per_microbatch=99))
    cut = halves(both)
    assert cut is not None and [len(part.terms["b"].weights) for part in cut] == [2, 1]


def test_a_step_is_accounted_for_by_the_largest_weight_of_any_term() -> None:
    """So a trajectory that one term alone trains counts as trained."""
    first, second = ([np.array([0.0, 2.0]), np.array([0.0])], [np.array([1.0, 0.5]), np.array([0.0])])
    terms = {name: WeighedTerm(weights=w, normalizer=TokenMean()) for name, w in ((MAIN, first), ("other", second))}
    assert [w.tolist() for w in _largest(terms)] == [[1.0, 2.0], [0.0]]
    assert _largest({MAIN: terms[MAIN]}) is first


def test_a_step_in_which_no_term_trains_anything_is_refused(make: Any) -> None:
    nothing = WeighedTerm(weights=[np.zeros(2)], normalizer=TokenMean())
    with pytest.raises(DataError, match="no token to train"):
        pack_terms([make.scored([1], [2, 3])], {MAIN: nothing, "b": nothing}, Layout(ranks=1, tokens_per_microbatch=9))


def test_a_term_that_trains_nothing_in_a_step_leaves_the_others(make: Any) -> None:
    one, nothing = (WeighedTerm(weights=[np.full(2, w)], normalizer=TokenMean()) for w in (1.0, 0.0))
    layout = Layout(ranks=1, tokens_per_microbatch=9)
    ((batch,),) = pack_terms([make.scored([1], [2, 3])], {MAIN: one, "b": nothing}, layout)
    assert batch.terms["b"].denominator == 1.0 and not batch.terms["b"].weights.any() and len(batch) == 2


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        ({MAIN: Term(scorer=Unscored(), objective=Likelihood())}, "method.terms.main is the term of"),
        ({"a/b": Term(scorer=Unscored(), objective=Likelihood())}, "of letters, digits and _"),
        ({"x": Term(scorer=Unscored(), objective=FullReverseKL())}, "needs VocabularyScores, but scorer Unscored"),
    ],
)
def test_a_term_that_means_nothing_is_refused(terms: Any, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        replace(two(), terms=terms)


def test_an_estimate_from_drawn_tokens_is_refused_in_every_term() -> None:
    from opd.rollouts.student import TeacherRollout

    late = Term(scorer=SampledTokens(), objective=SampledReverseKL())
    with pytest.raises(ConfigurationError, match="SampledReverseKL estimates from tokens that the student sampled"):
        replace(two(), rollout=TeacherRollout(max_tokens=8), terms={"late": late})


def test_a_batch_that_was_packed_for_other_terms_is_refused(make: Any) -> None:
    ((batch,),) = pack([make.scored([1], [2])], [np.ones(1)], Layout(ranks=1, tokens_per_microbatch=9), TokenMean())
    with pytest.raises(ConfigurationError, match="packed for"):
        two().loss(StudentLogits(logits=torch.zeros(1, 4)), batch)


def test_teachers_that_a_term_names_are_known_to_the_plan() -> None:
    method = toy()
    assert named(method, Role.READER) == {"start"} and asks_prompts_teacher(method)
    alone = method.one_term("anchor")
    assert named(alone, Role.READER) == {"start"} and not asks_prompts_teacher(alone) and not alone.is_sum
    assert isinstance(alone.scorer, Ensemble) and isinstance(alone.normalizer, SequenceMean)


@given(
    first=st.floats(-9, 9),
    last=st.floats(-9, 9),
    length=st.integers(0, 20),
    steps=st.integers(1, 40),
    at=st.integers(0, 39),
)
def test_schedules_go_from_first_to_last_and_stay(first: float, last: float, length: int, steps: int, at: int) -> None:
    context = replace(BOX, steps=steps, step=min(at, steps - 1))
    for kind in (LinearSchedule, CosineSchedule):
        schedule = kind(first=first, last=last, steps=length)
        assert value(schedule, context.at(0)) == pytest.approx(first)
        assert value(schedule, context.at(length or steps)) == pytest.approx(last)
        here, later = (value(schedule, context.at(step)) for step in (context.step, context.step + 1))
        assert min(first, last) - 1e-9 <= here <= max(first, last) + 1e-9
        assert (later - here) * (last - first) >= -1e-9
    assert value(LinearSchedule(first=first, last=last, steps=4), context.at(1)) == pytest.approx(
        0.75 * first + 0.25 * last
    )
    assert value(0.3, context) == 0.3 and 0 <= context.progress < 1
