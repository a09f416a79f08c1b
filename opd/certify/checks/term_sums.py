"""Checks of a sum of terms: its gradient, in one pass over a packed step, is that of the sum of the promises."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from opd.certify.certificate import Finding, Row, at_least
from opd.certify.fitting import fitted, teacher_names
from opd.certify.gradients import (
    EXACT,
    NOTICED,
    SAME,
    UNLIMITED,
    Case,
    enumerable,
    make_case,
    microbatch_gradient,
    relative_difference,
)
from opd.certify.shown import with_one_context
from opd.certify.sources import with_both_sources
from opd.certify.worlds import VOCABULARY, make_world
from opd.loss.packing import WeighedTerm, pack_terms
from opd.method.method import Method
from opd.method.promises import Promise
from opd.method.schedules import value
from opd.method.terms import MAIN, SumOfTerms
from opd.ports import Context, Layout
from opd.types import Batch, Scored, Scores, TokenLoss

GRADIENT = "gradient of the sum of the promises"
FORWARD = "some term has a coefficient above 0 at every step, or none has any"
STEPS = (0, 3, 9)  # of ten: where schedules are looked at


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sum:
    """Method of several terms in a world, with a case of each term."""

    method: Method
    cases: Mapping[str, Case]

    @property
    def objective(self) -> SumOfTerms:
        return SumOfTerms(objectives={name: enumerable(one.method.objective) for name, one in self.cases.items()})

    def scored(self) -> list[Scored[Any]]:
        """All trajectories with the scores of all terms."""
        scored = {name: one.enumeration.scored for name, one in self.cases.items()}
        return [
            Scored(
                trajectory=item.trajectory,
                scores=item.scores,
                terms={name: scored[name][i].scores for name in self.cases if name != MAIN},
            )
            for i, item in enumerate(scored[MAIN])
        ]

    def weighed(self, context: Context) -> dict[str, WeighedTerm]:
        """Token weights and coefficients at a step."""
        return {
            name: WeighedTerm(
                weights=self.cases[name].weights(),
                normalizer=term.normalizer,
                coefficient=value(term.coefficient, context),
            )
            for name, term in self.method.every_term.items()
        }

    def training(
        self,
        context: Context,
        ranks: int = 1,
        tokens: int = UNLIMITED,
        chunk: int = UNLIMITED,
        order: np.ndarray | None = None,
    ) -> Float[Tensor, " D"]:
        """Gradient that a learner would compute."""
        scored, terms = self.scored(), self.weighed(context)
        order = np.arange(len(scored)) if order is None else order
        reordered = {name: replace(term, weights=[term.weights[i] for i in order]) for name, term in terms.items()}
        packed = pack_terms([scored[i] for i in order], reordered, Layout(ranks=ranks, tokens_per_microbatch=tokens))
        return microbatch_gradient(packed, self.objective, self.cases[MAIN].world, chunk)

    def exact(self, context: Context) -> Float[Tensor, " D"]:
        """Sum of the coefficients times the gradients of the promises."""
        parts = [
            value(term.coefficient, context) * self.cases[name].exact() for name, term in self.method.every_term.items()
        ]
        return torch.stack(parts).sum(0)


def check_terms(method: Method) -> Iterator[Finding]:
    """Gradient and invariances of the sum of all terms."""
    small = with_both_sources(with_one_context(fitted(method, VOCABULARY)))
    world = make_world(0, names=teacher_names(method))
    total = _Sum(method=small, cases={name: make_case(small.one_term(name), world) for name in small.every_term})
    context = replace(total.cases[MAIN].enumeration.context, steps=10)
    measured = [relative_difference(total.training(context.at(step)), total.exact(context.at(step))) for step in STEPS]
    yield Row(name=GRADIENT, measured=max(measured), tolerance=EXACT)
    forward = min(
        _greatest(value(term.coefficient, at) for term in small.every_term.values()) for at in _steps(context)
    )
    yield at_least(FORWARD, forward, 0.0)
    whole = total.training(context)
    for name, term in small.every_term.items():
        if value(term.coefficient, context):
            others = replace(total, cases=_silenced(total.cases, name))
            yield at_least(
                f"the sum has a part of {name}", relative_difference(whole, others.training(context)), NOTICED
            )
    longest = max(
        len(s.trajectory.prompt.student_ids) + len(s.trajectory) for s in total.cases[MAIN].enumeration.scored
    )
    again = {
        "micro-batch size": total.training(context, tokens=longest * 5),
        "number of ranks": total.training(context, ranks=3, tokens=longest * 3),
        "chunks of the loss": total.training(context, chunk=7),
        "order of the trajectories": total.training(
            context, order=np.random.default_rng(0).permutation(len(total.cases[MAIN].enumeration.scored))
        ),
    }
    for name, one in again.items():
        yield Row(name=f"sum, invariance: {name}", measured=relative_difference(one, whole), tolerance=SAME)


def _steps(context: Context) -> Iterator[Context]:
    return (context.at(step) for step in range(context.steps + 1))


def _greatest(coefficients: Iterator[float]) -> float:
    """Greatest coefficient that is not 0; 0 if all are."""
    return max((c for c in coefficients if c), default=0.0)


def _silenced(cases: Mapping[str, Case], name: str) -> dict[str, Case]:
    """The cases with an objective of the term `name` that is 0 everywhere."""
    one = cases[name]
    silent: Any = _Zero(of=one.method.objective)
    return {**cases, name: replace(one, method=replace(one.method, objective=silent))}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Zero:
    """Objective times 0, with the declarations of the original."""

    of: Any

    @property
    def consumes(self) -> type[Scores]:
        return self.of.consumes

    @property
    def on_policy(self) -> bool:
        return getattr(self.of, "on_policy", False)

    @property
    def promise(self) -> Promise:
        return self.of.promise

    def __call__(self, student: Any, batch: Batch[Any]) -> TokenLoss:
        result = enumerable(self.of)(student, batch)
        return replace(result, loss=result.loss * 0.0)
