"""`opd compare`: several methods from the same start with one budget, one run per arm and seed, one table and picture.

Every arm first chooses a setting for itself (`launch.cli.compare.tuning`), all with as many runs. An experiment whose
YAML has a `comparison` is the long form of the same (`opd train experiment=compare`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from launch.artifacts import terminal
from launch.artifacts.run_directory import check_name
from launch.artifacts.spending import Unit
from launch.checkpoint.places import check_writable
from launch.cli.compare.budget_plan import PILOT_STEPS, Budget, at_most_per_step, cost_per_step
from launch.cli.compare.comparison import AT_THE_END, NO_MAIN_SET, Comparison, Request, from_arguments, from_experiment
from launch.cli.compare.shared_runs import run_all
from launch.config.run_config import run_config
from launch.plan import hub
from launch.plan.checks.answers import NO_ANSWERS
from launch.plan.plan import Plan, make_plan
from launch.report.comparison import Arm
from launch.report.comparison_page import write_comparison
from launch.report.figures import short_number
from opd.errors import ConfigurationError

Costs = Mapping[str, float]  # of a step of each arm, in the budget's unit


def compare_methods(arguments: Sequence[str]) -> int:
    """`opd compare`: returns the exit code; errors are raised as sentences."""
    return _compare(from_arguments(arguments))


def run_comparison(overrides: Sequence[str]) -> int:
    """`opd train` with an experiment that is a comparison."""
    return _compare(from_experiment(overrides))


def _compare(request: Request) -> int:
    comparison, console = request.comparison, terminal.console()
    check_name(comparison.name)
    check_writable(Path(comparison.output_dir))
    stages = _Stages(request, console)
    first = stages.first()
    _check(comparison, first, stages.first_trials())
    if request.dry_run:
        for planned in first.values():
            console.print(planned.table())
            planned.show_rate(console)
        for sentence in _outline(comparison, first):
            console.print(sentence, soft_wrap=True, markup=False, highlight=False)
        return 0
    if stages.root.exists() and not comparison.resume:
        raise ConfigurationError(
            f"comparison directory {stages.root} exists and is never overwritten; choose another run_name=..., or go "
            "on with resume=true (opd train: comparison.resume=true)"
        )
    stages.root.mkdir(parents=True, exist_ok=True)
    hub.record(stages.root, [one for plan in first.values() for one in plan.hub])
    costs, budget = stages.pilots(first)
    values, notes, costs = stages.trials(costs, budget)
    runs = stages.reported(values, costs, budget)
    if budget.needs_pilots:
        notes += [budget.note(arm, cost) for arm, cost in costs.items()]
    if comparison.tuning is None:
        notes.append("No setting was tuned: every arm has the values that its command or YAML names.")
    goal = replace(comparison.goal, amount=budget.amount)
    write_comparison(stages.root, runs, goal, console, notes)
    return 0


class _Stages:
    """The runs of a comparison, stage by stage: pilots, trials, and what is reported."""

    def __init__(self, request: Request, console: Console) -> None:
        self._comparison, self._passed_on, self._console = request.comparison, request.passed_on, console
        self._dry_run = request.dry_run
        self.root = Path(request.comparison.output_dir) / request.comparison.name
        if request.comparison.tuning is not None:
            request.comparison.tuning.check(list(request.comparison.arms), request.passed_on)

    def _plan(self, arm: str, seed: int, label: str, *more: str) -> Plan:
        comparison = self._comparison
        names = [f"seed={seed}", f"run_name={label}-seed{seed}", f"output_dir={self.root}"]
        names += ["dry_run=true"] if self._dry_run else []  # of a model on the hub it reads headers alone
        try:
            return make_plan(run_config([*comparison.base, *comparison.arms[arm], *self._passed_on, *more, *names]))
        except ConfigurationError as error:
            raise ConfigurationError(f"arm {arm}: {error}") from error

    def _setting(self, values: Mapping[str, str], arm: str) -> list[str]:
        tuning = self._comparison.tuning
        return [f"{tuning.key}={values[arm]}"] if tuning else []

    def first(self) -> dict[str, Plan]:
        """The first reported run of every arm, as far as it is known before anything has run."""
        comparison = self._comparison
        values = {arm: tried[0] for arm, tried in comparison.tuning.values.items()} if comparison.tuning else {}
        budget = [] if comparison.spending.needs_pilots else comparison.spending.overrides(1.0)
        seed = comparison.seeds[0]
        return {arm: self._plan(arm, seed, arm, *self._setting(values, arm), *budget) for arm in comparison.arms}

    def first_trials(self) -> list[Plan]:
        """A trial of every arm."""
        tuning = self._comparison.tuning
        if tuning is None:
            return []
        return [self._plan(arm, tuning.seed, arm, *tuning.overrides) for arm in self._comparison.arms]

    def pilots(self, first: Mapping[str, Plan]) -> tuple[Costs, Budget]:
        """Costs per step from a short run of every arm, where the budget needs them, and the budget with its amount."""
        budget, tuning = self._comparison.spending, self._comparison.tuning
        if not budget.needs_pilots:
            return dict.fromkeys(self._comparison.arms, 1.0), budget
        seed = tuning.seed if tuning else self._comparison.seeds[0]
        more = [
            *(tuning.overrides if tuning else []),
            *AT_THE_END,
            "evaluation.samples=1",
        ]
        plans = {
            f"{arm}_pilot": [self._plan(arm, seed, f"{arm}_pilot", *more, f"steps={PILOT_STEPS}")]
            for arm in self._comparison.arms
        }
        costs = {
            run.label.removesuffix("_pilot"): cost_per_step(run.directory, budget.unit)
            for run in run_all(self.root, plans, self._console)
        }
        arm, plan = next(iter(first.items()))
        return costs, replace(budget, amount=budget.amount or costs[arm] * plan.config.steps)

    def trials(self, costs: Costs, budget: Budget) -> tuple[dict[str, str], list[str], Costs]:
        """The value chosen for every arm, a sentence about each, and the costs per step of the runs that won."""
        tuning = self._comparison.tuning
        if tuning is None:
            return {}, [], costs
        more = {arm: budget.overrides(cost) for arm, cost in costs.items()}
        tried = {run.label: run.directory for run in self._all(tuning.trials(self._plan, more))}
        values, notes = tuning.chosen(tried)
        if budget.needs_pilots:
            costs = {arm: cost_per_step(tried[f"{arm}_{value}"], budget.unit) for arm, value in values.items()}
        return values, notes, costs

    def reported(self, values: Mapping[str, str], costs: Costs, budget: Budget) -> list[Arm]:
        """The runs that are compared."""
        return self._all(
            {
                arm: [
                    self._plan(arm, seed, arm, *self._setting(values, arm), *budget.overrides(costs[arm]))
                    for seed in self._comparison.seeds
                ]
                for arm in self._comparison.arms
            }
        )

    def _all(self, plans: Mapping[str, Sequence[Plan]]) -> list[Arm]:
        return run_all(self.root, plans, self._console)


def _check(comparison: Comparison, plans: Mapping[str, Plan], trials: Sequence[Plan]) -> None:
    """Raise `ConfigurationError` if the arms cannot be compared by their accuracies, or not fairly."""
    reference = plans[comparison.reference]
    if reference.config.evaluation.prompts is None:
        raise ConfigurationError(NO_MAIN_SET)
    if reference.answers.get("evaluation.prompts") == NO_ANSWERS:
        raise ConfigurationError(
            "a comparison is one of accuracies, but the evaluation.prompts have no reference answers; set "
            "evaluation.prompts.answer_column"
        )
    for trial in trials:
        if comparison.tuning is not None:
            comparison.tuning.check_apart(trial, reference)


def _outline(comparison: Comparison, plans: Mapping[str, Plan]) -> list[str]:
    """Runs of a comparison, their steps, and what they will spend at most."""
    arms, seeds, tuning = list(comparison.arms), comparison.seeds, comparison.tuning
    lines = [f"comparison {comparison.name}: {len(arms)} arms ({', '.join(arms)})"]
    each = {arm: len(seeds) + (len(tuning.values[arm]) if tuning else 0) for arm in arms}
    if comparison.spending.needs_pilots:
        lines.append(f"pilots: {len(arms)} runs of {PILOT_STEPS} steps, which measure what a step costs")
    if tuning is not None:
        lines += [
            f"trials of {arm}: {tuning.key} {', '.join(values)}, with seed {tuning.seed}"
            for arm, values in tuning.values.items()
        ]
    lines.append(f"reported: {len(arms) * len(seeds)} runs, seeds {', '.join(map(str, seeds))}")
    return [*lines, *_estimate(comparison, plans, each)]


def _estimate(comparison: Comparison, plans: Mapping[str, Plan], runs: Mapping[str, int]) -> list[str]:
    """Steps in all, and what they cost at most; `runs` counts them for every arm."""
    most = {arm: at_most_per_step(plan) for arm, plan in plans.items()}
    unit, amount = comparison.budget, comparison.amount
    if unit is Unit.STEPS:
        steps = {arm: runs[arm] * plan.config.steps for arm, plan in plans.items()}
        spent = {u: sum(steps[arm] * most[arm][u] for arm in steps) for u in (Unit.TOKENS, Unit.FLOPS)}
        return [
            f"in all: {sum(runs.values())} runs, {sum(steps.values())} steps",
            f"estimate: at most {short_number(spent[Unit.TOKENS])} tokens (generated and learned) and "
            f"{short_number(spent[Unit.FLOPS])} FLOP, if every completion had max_tokens",
        ]
    count = sum(runs.values())
    if not amount:
        arm, plan = next(iter(plans.items()))
        return [
            f"budget: what {arm} spends in {plan.config.steps} steps, in {unit.value}, as its pilot will measure; "
            f"in all: {count} runs beside the pilots"
        ]
    lines = [f"in all: {count} runs beside the pilots, {short_number(count * amount)} {unit.value}"]
    if unit is Unit.CPU_S:
        return [*lines, "estimate: the pilots will say how many steps that is"]
    least = {arm: max(1, round(amount / bound[unit])) for arm, bound in most.items()}
    return [*lines, f"estimate: at least {', '.join(f'{n} steps of {arm}' for arm, n in least.items())} in each run"]
