"""Checks of the factors of terms, over all steps of a run."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
from jaxtyping import Float, Int

from launch.config.run_config import RunConfig
from launch.plan.checks.settings import terms_by_place
from opd.errors import ConfigurationError
from opd.method.schedules import CosineSchedule, LinearSchedule, SwitchSchedule, value
from opd.method.terms import Term
from opd.ports import Context
from opd.settings.validation import walk

MOST = 2_000  # steps at which factors are looked at, the first and the last among them


def check_factors(config: RunConfig) -> list[str]:
    """Notes on factors that may be unintended; refuses a run in which no term counts at any step."""
    steps = np.unique(np.linspace(0, config.steps - 1, min(config.steps, MOST)).round().astype(np.int64))
    terms = dict(terms_by_place(config))
    factors = {place: _values(term, steps, config.steps) for place, term in terms.items()}
    counted = np.any([f != 0 for f in factors.values()], axis=0)
    if not counted.any():
        raise ConfigurationError(
            f"method {config.method.name} trains nothing: the factors of all its terms ({_named(factors)}) are 0 at "
            "every step; set one of them to another number"
        )
    return [*_idle(factors, steps, counted), *_odd(terms, factors, steps), *_schedules(config)]


def _values(term: Term, steps: Int[np.ndarray, " s"], total: int) -> Float[np.ndarray, " s"]:
    """Factors of a term at `steps`."""
    if not callable(term.coefficient):
        return np.full(len(steps), float(term.coefficient))
    return np.asarray([value(term.coefficient, _at(step, total)) for step in steps.tolist()])


def _at(step: int, steps: int) -> Context:
    """Context of a schedule: the step of a run whose engines are not started."""
    none = cast(Any, None)
    return Context(student=none, teachers={}, writers={}, graders={}, tokenizer=none, step=step, steps=steps)


def _named(factors: Mapping[str, object]) -> str:
    return ", ".join(f"{place}.coefficient" for place in factors)


def _idle(
    factors: Mapping[str, Float[np.ndarray, " s"]], steps: Int[np.ndarray, " s"], counted: np.ndarray
) -> Iterator[str]:
    if not counted.all():
        first = int(steps[~counted][0])
        yield (
            f"note: nothing is trained at {1 - counted.mean():.0%} of the steps (the first is {first}), where the "
            f"factors of all terms are 0 ({_named(factors)})"
        )


def _odd(
    terms: Mapping[str, Term], factors: Mapping[str, Float[np.ndarray, " s"]], steps: Int[np.ndarray, " s"]
) -> Iterator[str]:
    for place, found in factors.items():
        what = f"{type(terms[place].scorer).__name__} and {type(terms[place].objective).__name__}"
        if not found.any():
            yield (
                f"note: {place}.coefficient is 0 at every step, so the term of {what} is scored all the same and "
                "trains nothing"
            )
        if (found < 0).any():
            first = int(steps[found < 0][0])
            yield (
                f"note: {place}.coefficient is {found[found < 0][0]:g} at step {first}; below 0 the term of {what} is "
                "trained away from its own objective"
            )


def _schedules(config: RunConfig) -> Iterator[str]:
    """Notes on schedules that a run of so few steps does not go through."""
    for name, _, part in walk(config.method, "method"):
        match part:
            case LinearSchedule(steps=steps) | CosineSchedule(steps=steps) if steps > config.steps:
                last = part(_at(config.steps - 1, config.steps))
                yield (
                    f"note: {name} goes from {part.first:g} to {part.last:g} in {steps} steps, but the run has "
                    f"{config.steps} and ends at {last:.3g}; {name}.steps={config.steps} goes all the way"
                )
            case SwitchSchedule():
                ends = {part(_at(step, config.steps)) for step in (0, config.steps - 1)}
                if len(ends) == 1 and part.first != part.last and 0 not in ends:  # which is said of the term
                    yield (
                        f"note: {name} is {ends.pop():g} at every step: its switch at the share {part.at:g} of a run "
                        f"of {config.steps} steps is none"
                    )
            case _:
                pass
