"""Tuning of one setting per arm before arms are compared, on problems that no table reports."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from launch.artifacts.evaluation_point import MAIN
from launch.artifacts.run_data import RunData
from launch.artifacts.run_directory import RunDirectory
from launch.plan.plan import Plan
from opd.errors import ConfigurationError, DataError
from opd.settings.ranges import Length, Line, Names, Seed
from opd.settings.validation import settings

TRIAL_SEED = 100  # of the runs that choose; no seed that is reported
RATES = (0.5, 1.0, 2.0)  # times an arm's own learner.lr: the base grid


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class Tuning:
    """A setting whose value is chosen separately for every arm, all in the same way.

    One run per arm and value, with `seed` and the `overrides`, which name other evaluation problems than the ones
    that the comparison reports. The value whose run ends with the highest accuracy at temperature 1 is taken.
    """

    # the setting that is chosen
    key: Names
    # for every arm the values that are tried, as many for one as for another
    values: Mapping[str, Annotated[Sequence[Names], Length(2)]]
    seed: Seed
    # of these runs alone
    overrides: Sequence[Line]

    def __post_init__(self) -> None:
        counts = {arm: len(values) for arm, values in self.values.items()}
        if len(set(counts.values())) > 1:
            raise ConfigurationError(
                "comparison.tuning.values needs as many values for every arm, so that none is searched harder than "
                f"another, but has {', '.join(f'{count} for {arm}' for arm, count in counts.items())}"
            )

    def check(self, arms: Sequence[str], passed_on: Sequence[str]) -> None:
        """Raise `ConfigurationError` unless `arms` are those tuned here, and no override sets the tuned setting."""
        if set(arms) != set(self.values):
            raise ConfigurationError(
                f"comparison.tuning.values needs values for {', '.join(arms)}, but has them for "
                f"{', '.join(self.values)}; name the same arms, or compare untuned with comparison.tuning=null"
            )
        if given := [override for override in passed_on if override.lstrip("+").startswith(f"{self.key}=")]:
            raise ConfigurationError(
                f"comparison.tuning chooses {self.key} for every arm, but {given[0]} was given; leave it out, or "
                "compare untuned with comparison.tuning=null"
            )

    def trials(self, plan: Callable[..., Plan], more: Mapping[str, Sequence[str]]) -> dict[str, list[Plan]]:
        """Plans of the trial runs, named `ARM_VALUE`; `plan(arm, seed, label, *overrides)` plans one, `more` has the
        overrides of each arm.
        """
        return {
            f"{arm}_{value}": [
                plan(arm, self.seed, f"{arm}_{value}", *self.overrides, f"{self.key}={value}", *more[arm])
            ]
            for arm, values in self.values.items()
            for value in values
        }

    def check_apart(self, trial: Plan, reported: Plan) -> None:
        """Raise `ConfigurationError` if values would be chosen on problems that are reported."""
        mine, its = _problems(trial), _problems(reported)
        shared = len(mine & its)
        if trial.config.evaluation.prompts == reported.config.evaluation.prompts or 2 * shared > min(
            len(mine), len(its)
        ):
            raise ConfigurationError(
                f"comparison.tuning would choose {self.key} on the evaluation.prompts that the comparison reports "
                f"({shared} of {len(its)} problems are the same); set others in comparison.tuning.overrides or with "
                "opd compare validation.KEY=VALUE, e.g. another evaluation.prompts.seed or .path"
            )

    def chosen(self, finished: Mapping[str, Path]) -> tuple[dict[str, str], list[str]]:
        """The best value of every arm, and a sentence about each; `finished` has the directories by `ARM_VALUE`."""
        best: dict[str, str] = {}
        notes: list[str] = []
        for arm, values in self.values.items():
            scores = {value: _final(finished[f"{arm}_{value}"]) for value in values}
            best[arm] = max(scores, key=scores.__getitem__)
            tried = ", ".join(f"{value}: {score:.1%}" for value, score in scores.items())
            notes.append(
                f"{self.key} of {arm} is {best[arm]}, the best of as many values as every arm tried (sampled accuracy "
                f"at the end of a run with seed {self.seed}, on problems that are not reported here: {tried})."
                f"{_censored(best[arm], values)}"
            )
        return best, notes


def _censored(best: str, values: Sequence[str]) -> str:
    """A sentence about a value at the end of those that were tried."""
    ends = sorted(map(float, values)) if all(map(_is_number, values)) else []
    if not ends or ends[0] < float(best) < ends[-1]:
        return ""
    side, beyond = ("smallest", "smaller") if float(best) == ends[0] else ("largest", "larger")
    return f" It is the {side} that was tried, so the sweep is censored: a {beyond} one may be better."


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _problems(plan: Plan) -> frozenset[tuple[str, bytes]]:
    """Held-out problems as the student reads them, with their answers."""
    prompts = plan.config.evaluation.asked(MAIN, plan.sources)
    return frozenset((prompt.answer, prompt.student_ids.tobytes()) for prompt in prompts)


def _final(directory: Path) -> float:
    points = RunData.read(RunDirectory.open(directory)).student
    if not points or points[-1].mean_at_k is None:
        raise DataError(f"run {directory} ended without an accuracy, so nothing can be chosen by it; repeat that run")
    return points[-1].mean_at_k
