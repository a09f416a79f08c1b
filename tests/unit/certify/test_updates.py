"""The certificate's learner of four numbers: what it cannot do is no failure of an update."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from launch.config.run_config import run_config
from opd.certify.certificate import Row, Skipped
from opd.certify.checks.updates import check_updates
from opd.certify.gradients import make_case
from opd.certify.worlds import make_world
from opd.ports import Context, Learner, LossFunction
from opd.types import Batch, Scores, StepReport


@dataclass(frozen=True, slots=True, kw_only=True)
class LooksFirst:
    """A step after a look at what the learner has: its ranks, or with `reads` its readings, too."""

    reads: bool

    async def __call__(
        self, learner: Learner, batches: Sequence[Sequence[Batch[Scores]]], objective: LossFunction, context: Context
    ) -> StepReport:
        assert learner.layout.ranks == len(batches)
        if self.reads:
            await learner.read(batches, ())
        return await learner.step(batches, objective)


def findings(update: Any) -> list[Any]:
    method = replace(run_config(["experiment=shop", "method=sampled_reverse_kl"]).method, update=update)
    return list(check_updates(make_case(method, make_world(0))))


def test_an_update_of_your_own_may_use_what_the_learner_of_the_certificate_has() -> None:
    stepped, downhill, kept, weights = findings(LooksFirst(reads=False))
    assert all(isinstance(row, Row) and row.passed for row in (stepped, downhill, kept))
    assert isinstance(weights, Skipped) and "no definition" in weights.why


def test_a_verb_that_it_lacks_is_named_and_not_held_against_an_update() -> None:
    assert {one.why for one in findings(LooksFirst(reads=True)) if isinstance(one, Skipped)} == {
        "the update asks the learner for `read`, which the one of the certificate does not have"
    }
