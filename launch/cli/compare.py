"""`experiment=compare`: several methods from the same start, one run per arm and seed, one page of curves.

With `comparison.tuning` every arm first chooses a setting for itself (`launch.cli.tuning`), all with as many runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import strftime
from typing import Annotated

import yaml
from omegaconf import OmegaConf
from rich.console import Console

from launch.artifacts import terminal
from launch.artifacts.redaction import redacted
from launch.artifacts.run_directory import check_name
from launch.artifacts.summary import Outcome
from launch.artifacts.untrusted_files import read_json, read_yaml
from launch.checkpoint.places import check_writable
from launch.cli.train import train_once
from launch.cli.tuning import Tuning
from launch.config.compose import compose
from launch.config.run_config import RunConfig, run_config
from launch.config.typed import construct
from launch.plan.checks.answers import NO_ANSWERS
from launch.plan.plan import Plan, make_plan
from launch.report.comparison import Arm, write_comparison
from opd.errors import ConfigurationError
from opd.settings.ranges import Length, RunName, Seed
from opd.settings.validation import fields_of, fit, settings


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class Comparison:
    """A comparison: arms as overrides of `base`; `reference` is the arm whose final accuracy the others must reach.

    `resume` goes on with a comparison that was stopped, or shares it with another process: finished runs are kept,
    runs that ended otherwise are moved aside and run again, and a run without a summary belongs to another process.
    """

    name: str
    output_dir: str
    base: Sequence[str]
    seeds: Annotated[Sequence[Seed], Length(1)]
    reference: str
    arms: Mapping[str, Sequence[str]]
    tuning: Tuning | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        for arm in self.arms:
            fit(RunName, arm, "the name of an arm of comparison.arms")  # a run is named after it
        if self.reference not in self.arms:
            raise ConfigurationError(
                f"comparison.reference is {self.reference!r}, but the arms are {', '.join(sorted(self.arms))}; set "
                "comparison.reference to one of them"
            )


def run_comparison(overrides: Sequence[str]) -> int:
    """Run every arm with every seed, one after another, then draw and print the results."""
    comparison, passed_on, dry_run = _read(overrides)
    check_name(comparison.name)
    check_writable(Path(comparison.output_dir))
    root = Path(comparison.output_dir) / comparison.name
    console = terminal.console()

    def plan(arm: str, seed: int, label: str, *more: str) -> Plan:
        names = [f"seed={seed}", f"run_name={label}-seed{seed}", f"output_dir={root}"]
        return make_plan(run_config([*comparison.base, *comparison.arms[arm], *passed_on, *more, *names]))

    def plans(values: Mapping[str, str]) -> dict[str, list[Plan]]:
        return {arm: [plan(arm, s, arm, *_setting(tuning, values, arm)) for s in comparison.seeds] for arm in arms}

    arms, tuning = list(comparison.arms), comparison.tuning
    trials: dict[str, list[Plan]] = {}
    if tuning is not None:
        tuning.check(arms, passed_on)
        trials = tuning.trials(plan)
    first = plans({arm: values[0] for arm, values in tuning.values.items()} if tuning else {})
    _check(comparison, first, trials)
    if dry_run:
        for planned in first.values():
            console.print(planned[0].table())
            planned[0].show_rate(console)
        return 0
    if root.exists() and not comparison.resume:
        raise ConfigurationError(
            f"comparison directory {root} exists and is never overwritten; choose another run_name=..., or go on with "
            "comparison.resume=true"
        )
    notes: list[str] = []
    if tuning is not None:
        tried = _run_all(root, trials, console)
        if _others_are_at(len(trials) - len(tried), console):
            return 0
        values, notes = tuning.chosen({run.label: run.directory for run in tried})
        first = plans(values)
    _run_all(root, first, console)
    runs = _run_all(root, first, console)  # what another process was at may be finished by now: the last one draws
    if _others_are_at(sum(map(len, first.values())) - len(runs), console):
        return 0
    write_comparison(root, runs, comparison.reference, console, notes)
    return 0


def _setting(tuning: Tuning | None, values: Mapping[str, str], arm: str) -> list[str]:
    return [f"{tuning.key}={values[arm]}"] if tuning else []


def _check(comparison: Comparison, plans: Mapping[str, Sequence[Plan]], trials: Mapping[str, Sequence[Plan]]) -> None:
    """Raise `ConfigurationError` if the arms cannot be compared by their accuracies, or not fairly."""
    reference = plans[comparison.reference][0]
    if reference.answers.get("evaluation.prompts") == NO_ANSWERS:
        raise ConfigurationError(
            "a comparison is one of accuracies, but the evaluation.prompts have no reference answers; set "
            "evaluation.prompts.answer_column"
        )
    if comparison.tuning is not None:
        for trial in trials.values():
            comparison.tuning.check_apart(trial[0], reference)


def _others_are_at(missing: int, console: Console) -> bool:
    if missing:
        console.print(f"{missing} runs belong to another process; call again with comparison.resume=true when it ends")
    return missing > 0


def _run_all(root: Path, plans: Mapping[str, Sequence[Plan]], console: Console) -> list[Arm]:
    """Runs all that have no result yet; returns every finished one. Arms alternate, so that other load on the machine
    affects all of them alike.
    """
    return [
        Arm(label=arm, seed=plan.config.seed, directory=directory)
        for round_ in zip(*plans.values(), strict=True)
        for arm, plan in zip(plans, round_, strict=True)
        if (directory := run_once(root, plan, console))
    ]


def run_once(root: Path, plan: Plan, console: Console) -> Path | None:
    """Directory of a finished run of `plan`, run now or before; None while another process runs it.

    Raises:
        ConfigurationError: it was finished with other settings.
    """
    path = root / plan.config.run_name
    if not path.exists():
        return train_once(plan, console).path
    if not (path / "summary.json").exists():
        return None
    if not finished_with(path, plan.config.text):
        path.rename(path.with_name(f"{path.name}.ended-{strftime('%Y%m%d-%H%M%S')}"))
        return train_once(plan, console).path
    return path


def finished_with(path: Path, text: str) -> bool:
    """Whether the run in `path` has finished. Raises `ConfigurationError` if it finished with other settings than
    `text`.
    """
    advice = "choose another run_name=..."
    if read_json(path / "summary.json", advice).get("outcome") != Outcome.FINISHED.value:
        return False
    if read_yaml(path / "config.yaml", advice) != redacted(yaml.safe_load(text)):
        raise ConfigurationError(
            f"{path} was finished with other settings; choose another run_name=... for this comparison"
        )
    return True


def _read(overrides: Sequence[str]) -> tuple[Comparison, list[str], bool]:
    node = compose(overrides)
    given = OmegaConf.to_container(node.comparison, resolve=True)
    assert isinstance(given, dict)
    if given.get("resume") and not node.run_name:
        begun = sorted(path.name for path in Path(str(node.output_dir)).glob("comparison-*"))
        raise ConfigurationError(
            "comparison.resume=true goes on with a comparison that has a name, and none was given; say which with "
            f"run_name=... (in {node.output_dir}: {', '.join(begun) or 'no comparison without a name of its own'})"
        )
    hints = fields_of(RunConfig)
    name = fit(hints["run_name"], node.run_name, "run_name")
    named = {
        "name": name or f"comparison-{strftime('%Y%m%d-%H%M%S')}",
        "output_dir": fit(hints["output_dir"], node.output_dir, "output_dir"),
    }
    comparison = construct(Comparison, {**{str(k): v for k, v in given.items()}, **named}, "comparison")
    own = ("experiment=", "comparison.", "run_name=", "output_dir=", "dry_run=")
    return comparison, [o for o in overrides if not o.lstrip("+").startswith(own)], bool(node.dry_run)
