"""Distillation methods: a rollout, a sum of terms (scorer, token weights, objective), and an update.

Parts are frozen dataclasses whose fields are their whole configuration; engines come with the context of a call. Each
part declares which scores it consumes and produces, so a combination that would be meaningless is refused when it is
composed.
"""

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float, Float32

from opd.errors import ConfigurationError, DataError
from opd.loss.packing import Normalizer, TokenMean, WeighedTerm, pack, pack_terms
from opd.method.promises import ClippedCredit, ScoredSupport, Union, renormalized_supports
from opd.method.reward_promises import ignores_constants
from opd.method.schedules import Factor, Schedule, value, with_values
from opd.method.slots import Objective, Rollout, Scorer, TokenWeight, Update
from opd.method.terms import MAIN, SumOfTerms, Term
from opd.ports import Context, Layout, LossFunction, PromptSource, Reading, ScoreKinds
from opd.settings.ranges import Matches
from opd.settings.validation import settings
from opd.types import Batch, Scored, Scores, TopKScores, Trajectory
from opd.updates.optimizer import OptimizerStep

MethodName = Annotated[
    str,
    Matches(r"[A-Za-z0-9][A-Za-z0-9._=,+-]{0,99}", "of letters, digits and . _ = , + - (runs are named after it)"),
]
Values = Mapping[Reading, Float32[np.ndarray, " _T"]]
"""Values of readings at the tokens of a trajectory."""

_NO_READING: Mapping[str, Sequence[Values]] = {}
_TERM_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,49}")


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class Method:
    """A complete distillation method. See `conf/method/` for the shipped ones.

    Its loss is a sum of terms (`opd.method.terms`). The fields of a term stand in the method itself for the first,
    `MAIN`; `terms` are further ones by name, each with a scorer, weights, objective, normalizer and coefficient of its
    own. With one term of coefficient 1 the sum is that objective.
    """

    # what reports call the method
    name: MethodName
    rollout: Rollout
    scorer: Scorer
    objective: Objective
    # how a batch becomes an update
    update: Update = field(default_factory=OptimizerStep)
    # parts that weigh tokens, by name; their weights are multiplied
    weights: Mapping[str, TokenWeight] = field(default_factory=dict)
    # what a step's sum of losses is divided by
    normalizer: Normalizer = field(default_factory=TokenMean)
    # factor of the objective: a number, or a schedule over steps
    coefficient: Factor | Schedule = 1.0
    # further terms of the loss, by name
    terms: Mapping[str, Term] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if MAIN in self.terms:
            raise ConfigurationError(
                f"method.terms.{MAIN} is the term of method.scorer and method.objective themselves; name it otherwise"
            )
        wrong = [name for name in self.terms if not _TERM_NAME.fullmatch(name)]
        if wrong:
            raise ConfigurationError(
                f"method.terms.{wrong[0]} needs a name of letters, digits and _, after which its metrics are named; "
                "name it otherwise"
            )
        for name, term in {**self.every_term, **self.terms}.items():
            _check_term(self.rollout, term, "method" if name == MAIN else f"method.terms.{name}")

    @property
    def every_term(self) -> Mapping[str, Term]:
        """All terms of the loss, `MAIN` first; a further one whose coefficient is the number 0 is left out."""
        main = Term(
            scorer=self.scorer,
            objective=self.objective,
            weights=self.weights,
            normalizer=self.normalizer,
            coefficient=self.coefficient,
        )
        return {MAIN: main, **{name: term for name, term in self.terms.items() if term.coefficient != 0}}

    @property
    def is_sum(self) -> bool:
        """Whether the loss is more than one objective with coefficient 1."""
        return len(self.every_term) > 1 or callable(self.coefficient) or self.coefficient != 1

    @property
    def loss(self) -> LossFunction:
        """The whole loss as one objective, for batches that `packed` made; its schedules stand in it as they are."""
        if not self.is_sum:
            return self.objective
        return SumOfTerms(objectives={name: term.objective for name, term in self.every_term.items()})

    def loss_at(self, context: Context) -> LossFunction:
        """The whole loss as it is at a step, where numbers that follow a schedule are numbers."""
        return with_values(self.loss, context)

    @property
    def requires(self) -> ScoreKinds:
        """Score kinds that any term requests of teachers."""
        return frozenset(kind for term in self.every_term.values() for kind in term.scorer.requires)

    def one_term(self, name: str) -> "Method":
        """A method with the term `name` alone, at coefficient 1."""
        term = self.every_term[name]
        return replace(
            self,
            scorer=term.scorer,
            objective=term.objective,
            weights=term.weights,
            normalizer=term.normalizer,
            coefficient=1.0,
            terms={},
        )


def _check_term(rollout: Rollout, term: Term, place: str) -> None:
    """Refuse a combination of parts that would be meaningless; `place` is where the settings of the term stand."""
    _check_rollout(rollout, term)
    _check_consumed(term, "objective", term.objective, in_learner=True)
    for name, weight in term.weights.items():
        _check_consumed(term, f"weight {name!r}", weight, in_learner=False)
        for reading in readings_of(weight):
            _check_consumed(term, f"reading of weight {name!r}", reading, in_learner=True)
    _check_constants(term)
    _check_weights(term)
    _check_supports(rollout, term, place)


def _check_consumed(term: Term, role: str, part: Any, *, in_learner: bool) -> None:
    """Refuse a part that reads other scores than its term's; the learner has hidden states as whole distributions."""
    produced = term.scorer.produces
    read = (produced, getattr(produced, "reads_as", Scores)) if in_learner else (produced,)
    if not any(issubclass(kind, part.consumes) for kind in read):
        raise ConfigurationError(
            f"{role} {_name(part)} needs {part.consumes.__name__}, but scorer {_name(term.scorer)} "
            f"produces {produced.__name__}; choose a scorer that produces it or another {role}"
        )


def _check_rollout(rollout: Rollout, term: Term) -> None:
    """Refuse a rollout whose text scorer or objective cannot use."""
    if not issubclass(rollout.records, term.scorer.needs):
        raise ConfigurationError(
            f"scorer {_name(term.scorer)} needs {term.scorer.needs.__name__} of the behavior policy, but rollout "
            f"{_name(rollout)} records {rollout.records.__name__}; set rollout.record_topk"
        )
    # Declared, not assumed: a rollout that does not say so is not on-policy.
    if getattr(term.objective, "on_policy", False) and not getattr(rollout, "on_policy", False):
        raise ConfigurationError(
            f"objective {_name(term.objective)} estimates from tokens that the student sampled, but rollout "
            f"{_name(rollout)} has text of another source; choose rollout StudentRollout, or an objective "
            "over distributions such as FullReverseKL"
        )
    if _estimates(term.objective) and getattr(rollout, "truncated", False):
        raise ConfigurationError(
            f"objective {_name(term.objective)} estimates from the sampled token and needs every token to have a "
            f"chance of being sampled, but rollout {_name(rollout)} has top_p < 1 or temperature 0; set "
            "rollout.top_p=1 and a temperature above 0, or choose an objective over distributions such as "
            "FullReverseKL"
        )


def _check_constants(term: Term) -> None:
    """Refuse scores that lack a constant per state for an objective that depends on it."""
    promise = getattr(term.objective, "promise", None)
    if getattr(term.scorer, "unnormalized", False) and not ignores_constants(promise):
        raise ConfigurationError(
            f"scorer {_name(term.scorer)} gives a product of distributions that is not normalized, but objective "
            f"{_name(term.objective)} needs probabilities: it promises {promise}; choose an objective that promises a "
            "reverse KL, such as SampledReverseKL"
        )


def _check_weights(term: Term) -> None:
    """Refuse weights that would bias an estimate from sampled tokens."""
    if not _estimates(term.objective):
        return
    for name, part in term.weights.items():
        if getattr(part, "reads_sampled_tokens", True):
            raise ConfigurationError(
                f"weight {name!r} {_name(part)} depends on what was sampled, but objective {_name(term.objective)} "
                "estimates from sampled tokens, whose expectation such a weight changes; choose an objective over "
                "distributions such as FullReverseKL, or leave the weight out (one that reads the state alone "
                "declares reads_sampled_tokens = False)"
            )


def _check_supports(rollout: Rollout, term: Term, place: str) -> None:
    """Refuse an objective that renormalizes over a single id, where all distributions are equal."""
    for support in renormalized_supports(getattr(term.objective, "promise", None)):
        scored = isinstance(support, ScoredSupport)
        setting, ids = _ids(rollout, term, place) if scored else _ids_of(term.objective, support, place)
        if ids == 1:
            raise ConfigurationError(
                f"objective {_name(term.objective)} renormalizes over its support and needs at least 2 ids there, "
                f"but {setting}=1, and of a single id nothing is left to learn; set {setting}=2 or more"
            )


def _estimates(objective: Any) -> bool:
    """Whether the expected gradient needs tokens sampled from all of the student's distribution.

    A clipped credit counts the sampled tokens and nothing else, as its promise states.
    """
    return getattr(objective, "on_policy", False) and not isinstance(getattr(objective, "promise", None), ClippedCredit)


def _ids(rollout: Any, term: Term, place: str) -> tuple[str, int]:
    """Name and value of the setting for the number of ids in the scores; 0 where that is not known."""
    if issubclass(term.scorer.needs, TopKScores):
        mixed = "student." if hasattr(rollout, "student") else ""
        generator = rollout.student if mixed else rollout
        return f"method.rollout.{mixed}record_topk", getattr(generator, "record_topk", 0)
    return f"{place}.scorer.k", getattr(term.scorer, "k", 0)


def _ids_of(objective: Any, support: Any, place: str) -> tuple[str, int]:
    """Name and value of the setting for an objective's own support; 0 for a union, where two ids may come of k = 1."""
    inside = "support." if hasattr(objective, "support") else ""
    return f"{place}.objective.{inside}k", 0 if isinstance(support, Union) else getattr(support, "k", 0)


def check_prompts(method: Method, prompts: PromptSource) -> None:
    """Refuse a prompt source whose groups are too small for a scorer of the method, or for its rollout."""
    parts: list[tuple[str, Any]] = [("scorer", term.scorer) for term in method.every_term.values()]
    for role, part in [*parts, ("rollout", method.rollout)]:
        least = getattr(part, "min_group", 1)
        if prompts.group_size < least:
            raise ConfigurationError(
                f"{role} {_name(part)} compares the trajectories of a group and needs "
                f"prompts.group_size >= {least}, but got {prompts.group_size}; raise prompts.group_size"
            )


async def scored(method: Method, trajectories: Sequence[Trajectory], context: Context) -> list[Scored[Any]]:
    """Trajectories of one group with the scores of all terms; equal scorers are called once."""
    if not trajectories:
        return []
    scorers = {name: term.scorer for name, term in method.every_term.items()}
    first = {name: next(n for n, other in scorers.items() if other == scorer) for name, scorer in scorers.items()}
    called = list(dict.fromkeys(first.values()))
    answers = await asyncio.gather(*[scorers[name](trajectories, context) for name in called])
    by_name = dict(zip(called, answers, strict=True))
    further = {name: by_name[first[name]] for name in scorers if name != MAIN}
    return [
        Scored(trajectory=t, scores=s, terms={name: scores[i] for name, scores in further.items()})
        for i, (t, s) in enumerate(zip(trajectories, by_name[MAIN], strict=True))
    ]


def weighed(
    method: Method,
    items: Sequence[Scored[Any]],
    context: Context,
    readings: Mapping[str, Sequence[Values]] = _NO_READING,
) -> dict[str, WeighedTerm]:
    """Token weights and coefficient of every term at a step.

    `readings` has for every term whose weights declare readings their values, per trajectory (`opd.method.readings`).
    """
    return {
        name: WeighedTerm(
            weights=weigh(term.weights, _of_term(items, name, readings.get(name)), context),
            normalizer=term.normalizer,
            coefficient=value(term.coefficient, context),
        )
        for name, term in method.every_term.items()
    }


def _of_term(items: Sequence[Scored[Any]], name: str, readings: Sequence[Values] | None) -> Sequence[Scored[Any]]:
    """Trajectories as the weights of a term see them: with its own scores and readings."""
    if name != MAIN:
        items = [Scored(trajectory=item.trajectory, scores=item.terms[name]) for item in items]
    return with_readings(items, readings) if readings else items


def with_readings(items: Sequence[Scored[Any]], readings: Sequence[Values]) -> list[Scored[Any]]:
    """Trajectories with the values of readings at their tokens."""
    return [replace(item, readings=values) for item, values in zip(items, readings, strict=True)]


def readings_of(*weights: TokenWeight) -> tuple[Reading, ...]:
    """Readings that token weights declare, each once."""
    return tuple(dict.fromkeys(reading for weight in weights for reading in getattr(weight, "readings", ())))


def packed(
    method: Method, items: Sequence[Scored[Any]], terms: Mapping[str, WeighedTerm], layout: Layout, turn: str
) -> list[list[Batch[Any]]]:
    """Micro-batches for `method.loss`."""
    if method.is_sum:
        return pack_terms(items, terms, layout, turn=turn)
    return pack(items, terms[MAIN].weights, layout, method.normalizer, turn=turn)


def weigh(
    weights: Mapping[str, TokenWeight], items: Sequence[Scored[Any]], context: Context
) -> list[Float[np.ndarray, " _T"]]:
    """Product of all token weights and the loss mask, per trajectory."""
    total = loss_masks(items)
    for name, part in weights.items():
        factors = part(items, context)
        lengths, got = [len(item.trajectory) for item in items], [len(factor) for factor in factors]
        if got != lengths:
            raise DataError(
                f"weight {name!r} {_name(part)} must give one number per token, {lengths} for the step's "
                f"trajectories, but gave {got}; correct the weight part"
            )
        total = [a * b for a, b in zip(total, factors, strict=True)]
    return total


def loss_masks(items: Sequence[Scored[Any]]) -> list[Float[np.ndarray, " _T"]]:
    """Loss mask per trajectory: 1.0 at sampled tokens, 0.0 at context."""
    return [item.trajectory.loss_mask.astype(np.float64) for item in items]


def _name(part: object) -> str:
    return type(part).__name__
