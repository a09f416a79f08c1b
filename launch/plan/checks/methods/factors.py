"""Checks of the factors of terms, over all steps of a run."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int, Int32

from launch.config.run_config import RunConfig
from launch.plan.checks.settings import terms_by_place
from opd.errors import ConfigurationError
from opd.method.schedules import CosineSchedule, LinearSchedule, SwitchSchedule, value, with_values
from opd.method.terms import Term
from opd.ports import Completion, Context, GenerateRequest, PublishedWeights, WeightAck
from opd.settings.validation import walk
from opd.types.prompt_rows import PromptText

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
    _check_objectives(terms, steps.tolist(), config.steps)
    return [*_idle(factors, steps, counted), *_odd(terms, factors, steps), *_schedules(config)]


def _check_objectives(terms: Mapping[str, Term], steps: Sequence[int], total: int) -> None:
    """Refuse an objective whose schedules leave the range of its field at any of `steps`."""
    for place, term in terms.items():
        for step in steps:
            context = at_step(step, total)
            try:
                if with_values(term.objective, context) is term.objective:  # nothing in it follows the step
                    break
            except ConfigurationError as error:
                raise ConfigurationError(
                    f"at step {step} of {total} a schedule in {place}.objective leaves its range: {error}"
                ) from error


def _values(term: Term, steps: Int[np.ndarray, " s"], total: int) -> Float[np.ndarray, " s"]:
    """Factors of a term at `steps`."""
    if not callable(term.coefficient):
        return np.full(len(steps), float(term.coefficient))
    return np.asarray([value(term.coefficient, at_step(step, total)) for step in steps.tolist()])


class _NotStarted:
    """Engine and tokenizer of a run that is only planned; a schedule follows the step and calls neither."""

    eos_id = 0

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        raise _asked()

    async def receive(self, weights: PublishedWeights) -> WeightAck:
        raise _asked()

    def encode(self, text: str) -> Int32[np.ndarray, " P"]:
        raise _asked()

    def encode_all(self, prompts: Sequence[PromptText]) -> list[Int32[np.ndarray, " P"]]:
        raise _asked()

    def decode(self, ids: np.ndarray) -> str:
        raise _asked()


def _asked() -> ConfigurationError:
    return ConfigurationError(
        "a schedule of the method calls an engine, but a schedule is a function of the step alone, by which a run is "
        "planned; let it read context.step and context.steps"
    )


def at_step(step: int, steps: int) -> Context:
    """Context of a schedule at a step of a planned run."""
    none = _NotStarted()
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
                last = part(at_step(config.steps - 1, config.steps))
                yield (
                    f"note: {name} goes from {part.first:g} to {part.last:g} in {steps} steps, but the run has "
                    f"{config.steps} and ends at {last:.3g}; {name}.steps={config.steps} goes all the way"
                )
            case SwitchSchedule():
                ends = {part(at_step(step, config.steps)) for step in (0, config.steps - 1)}
                if len(ends) == 1 and part.first != part.last and 0 not in ends:  # which is said of the term
                    yield (
                        f"note: {name} is {ends.pop():g} at every step: its switch at the share {part.at:g} of a run "
                        f"of {config.steps} steps is none"
                    )
            case _:
                pass
