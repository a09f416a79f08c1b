"""Numbers of an objective that follow a schedule, of which the learner gets what they are: Veto, TAID, REOPOLD."""

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launch.config.run_config import run_config
from launch.plan.checks.methods.factors import check_factors
from opd.certify.gradients import relative_difference
from opd.errors import ConfigurationError
from opd.method.schedules import CosineSchedule, LinearSchedule, Schedule, SwitchSchedule, number, value, with_values
from opd.method.terms import MAIN, SumOfTerms
from opd.objectives.bridged import BridgeDivergence
from opd.objectives.reweighted import AtTemperature
from opd.objectives.sampled import LogprobSource, SampledReverseKL
from opd.objectives.vocabulary import FullForwardKL, FullReverseKL
from opd.ports import Context
from opd.scorers.teacher import SampledTokens
from opd.types import Batch, Scores, StepReport, TokenLoss, TokenScores
from opd.updates.optimizer import OptimizerStep
from tests.unit.loop.test_loop import Bench
from tests.unit.loop.test_loop import method as loop_method
from tests.unit.methods.test_hybrids import BOX, shipped, trained
from tests.unit.scorers.test_interpolated_labels import method as with_labels

NUMBERS = st.floats(0, 1)
SCHEDULES = st.one_of(
    NUMBERS,
    st.builds(LinearSchedule, first=NUMBERS, last=NUMBERS, steps=st.integers(0, 200)),
    st.builds(CosineSchedule, first=NUMBERS, last=NUMBERS, steps=st.integers(0, 200)),
    st.builds(SwitchSchedule, first=NUMBERS, last=NUMBERS, at=NUMBERS),
)
CONSTANT = BridgeDivergence(of=FullForwardKL(), student_power=0.5)


def bridge(teacher_power: Any, student_power: Any, of: Any = None) -> BridgeDivergence:
    return BridgeDivergence(of=of or FullForwardKL(), teacher_power=teacher_power, student_power=student_power)


@given(SCHEDULES, SCHEDULES, st.integers(0, 149))
def test_schedules_become_their_values_wherever_they_stand(first: Any, second: Any, step: int) -> None:
    now = BOX.at(step)
    expected = bridge(value(first, now), value(second, now))
    assert with_values(bridge(first, second), now) == expected
    assert with_values(AtTemperature(of=bridge(first, second)), now) == AtTemperature(of=expected)
    both = {"a": bridge(first, second), "b": CONSTANT}
    assert with_values(SumOfTerms(objectives=both), now) == SumOfTerms(objectives=both | {"a": expected})


def test_a_part_that_is_used_without_a_step_says_so() -> None:
    with pytest.raises(ConfigurationError, match=r"LinearSchedule.* is used without a step"):
        number(LinearSchedule(first=0.8, last=0.0))
    assert number(1) == 1.0


def test_a_part_in_which_nothing_follows_the_step_is_the_same_object() -> None:
    for part in (CONSTANT, AtTemperature(of=CONSTANT), SumOfTerms(objectives={"a": CONSTANT, "b": FullReverseKL()})):
        assert with_values(part, BOX) is part


@dataclass(frozen=True, kw_only=True)
class Noting:
    """The update of one optimizer step, which notes what it is to minimize."""

    objectives: list[Any] = field(default_factory=list)

    async def __call__(self, learner: Any, batches: Any, objective: Any, context: Context) -> StepReport:
        self.objectives.append(objective)
        return await OptimizerStep()(learner, batches, objective, context)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """An objective of one's own with a factor that may follow the step."""

    consumes: ClassVar[type[Scores]] = TokenScores
    on_policy: ClassVar[bool] = True
    factor: float | Schedule

    def __call__(self, student: Any, batch: Batch[TokenScores]) -> TokenLoss:
        plain = SampledReverseKL(signal=LogprobSource.STUDENT)(student, batch)
        return replace(plain, loss=number(self.factor) * plain.loss)


def test_the_loop_gives_the_learner_the_numbers_of_each_step(make: Any) -> None:
    noting, objective = Noting(), Scaled(factor=LinearSchedule(first=0.8, last=0.0))
    asyncio.run(Bench(make).run(loop_method(SampledTokens(), objective, update=noting), 4))
    assert [one.factor for one in noting.objectives] == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_a_schedule_that_leaves_the_range_is_refused_when_the_run_is_planned() -> None:
    check_factors(run_config(["experiment=shop", "method=veto", "steps=20"]))
    beyond = run_config(["experiment=shop", "method=veto", "steps=20", "method.objective.student_power.last=-0.1"])
    with pytest.raises(
        ConfigurationError, match=r"at step 18 of 20 .* method\.objective .*student_power .* from 0 to 1"
    ):
        check_factors(beyond)


@pytest.mark.parametrize(
    ("name", "powers"), [("veto", {"student_power": 0.0}), ("taid", {"teacher_power": 1.0, "student_power": 0.0})]
)
def test_without_the_student_in_its_target_it_is_the_forward_kl_bit_for_bit(name: str, powers: Any) -> None:
    plain, bridged = trained(shipped("full_forward_kl")), shipped(name)
    alone = replace(bridged, objective=replace(bridged.objective, **powers))
    assert torch.equal(trained(alone), plain)
    assert relative_difference(trained(bridged), plain) > 0.1
    assert relative_difference(trained(bridged, 149), plain) < 0.01  # of 150 steps the last


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_an_interpolated_target_is_taids_as_soft_labels_are(t: float) -> None:
    """Fresh text, on which the student that wrote is the student that learns."""
    taid = replace(shipped("taid"), objective=bridge(t, 1 - t))
    found, labeled = trained(taid), trained(with_labels(t))
    assert float((found - labeled).norm()) < 1e-5 * float(trained(with_labels(1.0)).norm())


def test_the_published_cost_of_a_sampled_id_is_that_of_the_bridge_with_the_reverse_kl() -> None:
    """Veto's theorem: the gradient is that of `sum p sg((1 - b) log p - log q)`."""
    z = torch.randn(6, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    q = torch.randn(6, generator=torch.Generator().manual_seed(2)).double().log_softmax(-1)
    p = z.log_softmax(-1)
    part = bridge(1.0, 0.8, FullReverseKL())
    (found,) = torch.autograd.grad(part.of.between(p, part.target(p, q)), z, retain_graph=True)
    (published,) = torch.autograd.grad((p.exp() * (0.2 * p - q).detach()).sum(), z)
    torch.testing.assert_close(found, published)


def test_an_id_that_the_student_hardly_knows_pulls_no_longer() -> None:
    """The claim in one state: the teacher gives half of its mass to an id of probability 1e-6."""
    q = torch.tensor([0.5, 0.25, 0.25]).double().log()
    z = torch.tensor([1e-6, 0.5, 0.5]).double().log().requires_grad_()
    pulls = []
    for part in (FullForwardKL(), bridge(1.0, 0.8)):
        p = z.log_softmax(-1)
        target = part.target(p, q) if isinstance(part, BridgeDivergence) else q
        (slope,) = torch.autograd.grad(FullForwardKL().between(p, target), z)
        pulls.append(-float(slope[0]))
    assert pulls[0] > 0.49 and pulls[1] < 1e-4


def test_a_relaxed_run_explores_and_then_refines() -> None:
    method = shipped("reopold")
    phases = [replace(method.one_term(name), name=name) for name in (MAIN, "refinement")]
    for at, alone in ((0, phases[0]), (74, phases[0]), (75, phases[1]), (149, phases[1])):
        assert relative_difference(trained(method, at), trained(alone, at)) < 1e-12


def test_without_a_floor_and_with_every_token_both_phases_are_the_reverse_kl() -> None:
    free = ("method.objective.shape.mixture=0", "method.terms.refinement.objective.shape.mixture=0")
    method, plain = (
        shipped("reopold", *free, "method.terms.refinement.weights.uncertain.fraction=1"),
        trained(shipped("full_reverse_kl")),
    )
    for name in (MAIN, "refinement"):
        assert relative_difference(trained(method.one_term(name)), plain) < 1e-12
