"""What a part leaves unsaid is taken for the careful side where it could bend a gradient, and for nothing elsewhere."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

from opd.errors import ConfigurationError
from opd.method.method import Method
from opd.method.promises import Promise, Renormalized, ReverseKL, ScoredSupport, States, StudentTop, Union
from opd.objectives.sampled import SampledReverseKL
from opd.ports import ScoreKinds
from opd.token_weights.teachers import TeacherBalance
from opd.types import Scores, TokenLoss, TokenScores, TopKScores, Trajectory


@dataclass(frozen=True)
class BareObjective:
    """It says what it reads and nothing else."""

    consumes: ClassVar[type[Scores]] = TokenScores

    def __call__(self, student: Any, batch: Any) -> TokenLoss:
        raise NotImplementedError


@dataclass(frozen=True)
class Promising(BareObjective):
    """It promises something as well."""

    promise: Promise = ReverseKL()  # noqa: RUF009 (frozen)


@dataclass(frozen=True)
class WithSupport(Promising):
    """Its support is a field of its own, as that of `SupportDivergence`."""

    support: Any = None


@dataclass(frozen=True)
class BareRollout:
    """A writer that leaves out what a protocol asks for."""

    records: type[TokenScores] = TokenScores
    needs_writer: ClassVar[bool] = False

    async def __call__(self, group: Any, context: Any) -> list[Trajectory]:
        raise NotImplementedError


@dataclass(frozen=True)
class OnPolicy(BareRollout):
    """It says that the student writes, and not whether all of its distribution."""

    on_policy: ClassVar[bool] = True


@dataclass(frozen=True)
class Recording(OnPolicy):
    """It records so many of the likeliest tokens."""

    record_topk: int = 1


@dataclass(frozen=True)
class Around(OnPolicy):
    """A mixture around a writer."""

    student: Any = None


@dataclass(frozen=True)
class BareScorer:
    """A scorer without a number of ids."""

    needs: type[Scores] = TokenScores
    produces: ClassVar[type[Scores]] = TopKScores
    requires: ClassVar[ScoreKinds] = frozenset()
    min_group: ClassVar[int] = 1

    async def __call__(self, trajectories: Any, context: Any) -> Sequence[Scores]:
        raise NotImplementedError


@dataclass(frozen=True)
class Counting(BareScorer):
    """It names `k` ids."""

    k: int = 1


@dataclass(frozen=True)
class BareWeight:
    """A weight that does not say whether it reads what was written."""

    consumes: ClassVar[type[Scores]] = Scores

    def __call__(self, scored: Any, context: Any) -> list[np.ndarray]:
        raise NotImplementedError


@dataclass(frozen=True)
class OfState(BareWeight):
    """It reads the state alone."""

    reads_sampled_tokens: ClassVar[bool] = False


@dataclass(frozen=True)
class Few:
    """A support of `k` ids; the class below does not say how many."""

    k: int

    def __call__(self, states: States) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class Unknown:
    """A support of who knows how many ids."""

    def __call__(self, states: States) -> Any:
        raise NotImplementedError


def made(objective: Any, rollout: Any = None, scorer: Any = None, **weights: Any) -> Method:
    return Method(
        name="m", objective=objective, rollout=rollout or OnPolicy(), scorer=scorer or BareScorer(), weights=weights
    )


ESTIMATE = SampledReverseKL()


def test_a_rollout_that_does_not_say_so_is_not_on_policy() -> None:
    assert made(BareObjective(), BareRollout()) and made(ESTIMATE, OnPolicy())
    with pytest.raises(
        ConfigurationError, match=r"tokens that the student sampled, but rollout BareRollout has text of"
    ):
        made(ESTIMATE, BareRollout())


def test_a_weight_that_does_not_say_so_reads_what_was_written() -> None:
    assert made(BareObjective(), mine=BareWeight()) and made(ESTIMATE, mine=OfState())
    with pytest.raises(ConfigurationError, match=r"weight 'mine' BareWeight depends on what was sampled"):
        made(ESTIMATE, mine=BareWeight())


@dataclass(frozen=True)
class OfTopK(OfState):
    """A weight that reads a support."""

    consumes: ClassVar[type[Scores]] = TopKScores


FILTERS: list[tuple[list[Any], bool, type[Scores]]] = [
    ([], False, Scores),
    ([OfState()], False, Scores),
    ([BareWeight()], True, Scores),
    ([OfState(), BareWeight()], True, Scores),
    ([OfState(), OfTopK()], False, TopKScores),
    ([OfState(), OfTopK(), BareWeight()], True, TopKScores),
]


@pytest.mark.parametrize(("filters", "reads", "consumes"), FILTERS, ids=str)
def test_a_balance_reads_whatever_one_of_its_filters_reads(
    filters: list[Any], reads: bool, consumes: type[Scores]
) -> None:
    for order in (filters, filters[::-1]):
        balance = TeacherBalance(filters={str(i): one for i, one in enumerate(order)})
        assert (balance.reads_sampled_tokens, balance.consumes) == (reads, consumes)
        if reads:
            with pytest.raises(ConfigurationError, match=r"weight 'mine' TeacherBalance depends on what was sampled"):
                made(ESTIMATE, mine=balance)
        else:
            assert made(ESTIMATE, mine=balance)


def over(support: Any) -> Promise:
    return Renormalized(of=ReverseKL(), support=support)


TWO_OR_UNKNOWN: dict[str, Callable[[], Method]] = {
    "no promise": lambda: made(BareObjective()),
    "a promise over everything": lambda: made(Promising()),
    "a scorer without a number": lambda: made(Promising(over(ScoredSupport()))),
    "a scorer of two": lambda: made(Promising(over(ScoredSupport())), scorer=Counting(k=2)),
    "a writer without a number": lambda: made(
        Promising(over(ScoredSupport())), OnPolicy(TopKScores), BareScorer(TopKScores)
    ),
    "a writer without a number within another": lambda: made(
        Promising(over(ScoredSupport())), Around(TopKScores, student=OnPolicy(TopKScores)), BareScorer(TopKScores)
    ),
    "a writer of two": lambda: made(
        Promising(over(ScoredSupport())), Recording(TopKScores, record_topk=2), Counting(TopKScores)
    ),
    "a support without a number": lambda: made(Promising(over(Unknown()))),
    "a support without a number within": lambda: made(WithSupport(over(Unknown()), support=Unknown())),
    "a union of two single ids": lambda: made(WithSupport(over(Union(k=1)), support=Union(k=1))),
    "a support of two": lambda: made(Promising(over(StudentTop(k=2)))),
}
ONE: dict[str, tuple[Callable[[], Method], str]] = {
    "a scorer of one": (lambda: made(Promising(over(ScoredSupport())), scorer=Counting()), "method.scorer.k"),
    "a writer of one": (
        lambda: made(Promising(over(ScoredSupport())), Recording(TopKScores), Counting(TopKScores, k=9)),
        "method.rollout.record_topk",
    ),
    "a writer of one within another": (
        lambda: made(
            Promising(over(ScoredSupport())),
            Around(TopKScores, student=Recording(TopKScores)),
            Counting(TopKScores, k=9),
        ),
        "method.rollout.student.record_topk",
    ),
    "a support of one": (lambda: made(Promising(over(Few(1)))), "method.objective.k"),
    "a support of one within": (
        lambda: made(WithSupport(over(Few(1)), support=Few(1))),
        "method.objective.support.k",
    ),
}


@pytest.mark.parametrize("case", TWO_OR_UNKNOWN)
def test_a_support_of_several_ids_or_of_an_unknown_number_is_accepted(case: str) -> None:
    assert TWO_OR_UNKNOWN[case]().name == "m"


@pytest.mark.parametrize("case", ONE)
def test_a_renormalized_support_of_one_id_is_refused_by_the_name_of_its_setting(case: str) -> None:
    make, setting = ONE[case]
    with pytest.raises(
        ConfigurationError, match=rf"needs at least 2 ids there, but {setting}=1, and .*; set {setting}=2"
    ):
        make()
