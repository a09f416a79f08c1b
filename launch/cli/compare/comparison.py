"""Settings of a comparison: arms, seeds, budget, tuning; from `opd compare methods=[...]` or an experiment's YAML."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import strftime
from typing import Annotated, Any

import yaml
from omegaconf import DictConfig, OmegaConf

from launch.artifacts.spending import Unit
from launch.cli.compare.budget_plan import Budget
from launch.cli.compare.tuning import RATES, TRIAL_SEED, Tuning
from launch.config.composition.compose import compose, own_folder
from launch.config.run_config import RunConfig
from launch.config.shipped_files import groups
from launch.config.typed import construct
from launch.report.comparison import Goal
from opd.errors import ConfigurationError
from opd.settings.ranges import Fraction, In, Length, RunName, Seed
from opd.settings.validation import fields_of, fit, settings

Amount = Annotated[float, In(1e-3, 1e30, or_zero=True, because="0: every arm has its own steps")]
Rate = Annotated[float, In(1e-6, 1e6, because="it multiplies an arm's learning rate")]
Parts = Annotated[int, In(1, 10_000)]
LEAST_FACTOR = 0.05
"""Least factor of a learning rate that is not taken for a learning rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class Comparison:
    """A comparison: arms as overrides of `base`; `reference` is the arm whose final accuracy the others must reach.

    `target` is the accuracy to reach instead. `budget` and `amount`: see `launch.cli.compare.budget_plan`; of another
    unit than steps an amount of 0 is what the first arm spends in its steps. `resume` goes on with a comparison that
    was stopped, or shares it with another process: finished runs are kept, runs that ended otherwise are moved aside
    and run again.
    """

    name: str
    output_dir: str
    base: Sequence[str]
    seeds: Annotated[Sequence[Seed], Length(1)]
    reference: str
    arms: Mapping[str, Sequence[str]]
    tuning: Tuning | None = None
    target: Fraction | None = None
    budget: Unit = Unit.STEPS
    amount: Amount = 0.0
    resume: bool = False

    def __post_init__(self) -> None:
        for arm in self.arms:
            fit(RunName, arm, "the name of an arm of comparison.arms")  # a run is named after it
        if self.reference not in self.arms:
            raise ConfigurationError(
                f"comparison.reference is {self.reference!r}, but the arms are {', '.join(sorted(self.arms))}; set "
                "reference=... (in YAML comparison.reference) to one of them"
            )
        if self.tuning is not None and self.tuning.seed in self.seeds:
            raise ConfigurationError(
                f"seed {self.tuning.seed} is that of the trials, so its runs cannot be reported too; leave it out of "
                "the seeds"
            )

    @property
    def goal(self) -> Goal:
        """Goal of the report."""
        return Goal(reference=self.reference, target=self.target, unit=self.budget, amount=self.amount)

    @property
    def spending(self) -> Budget:
        """The budget of every run."""
        return Budget(unit=self.budget, amount=self.amount)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A comparison as a command asks for it; `passed_on` are overrides of all its runs that win over its own."""

    comparison: Comparison
    passed_on: Sequence[str] = ()
    dry_run: bool = False


# --- the long form: arms in the YAML of an experiment ---------------------------------------------------------------


def from_experiment(overrides: Sequence[str]) -> Request:
    """The comparison that an experiment's `comparison` describes. Raises `ConfigurationError` if it has none."""
    node = compose(overrides)
    if "comparison" not in node:
        raise ConfigurationError(
            "opd compare needs methods=[A,B,...] (names of conf/method), or an experiment that lists its arms, such as "
            "experiment=compare"
        )
    given = OmegaConf.to_container(node.comparison, resolve=True)
    assert isinstance(given, dict)
    named = _named(node, resume=bool(given.get("resume")))
    comparison = construct(Comparison, {**{str(k): v for k, v in given.items()}, **named}, "comparison")
    own = ("experiment=", "comparison.", "run_name=", "output_dir=", "dry_run=")
    passed_on = [o for o in overrides if not o.lstrip("+").startswith(own)]
    return Request(comparison=comparison, passed_on=passed_on, dry_run=bool(node.dry_run))


def _named(node: DictConfig, *, resume: bool) -> dict[str, str]:
    """Name and place. Raises `ConfigurationError` where one is to be gone on with and no name is given."""
    if resume and not node.run_name:
        begun = sorted(path.name for path in Path(str(node.output_dir)).glob("comparison-*"))
        raise ConfigurationError(
            "resume=true goes on with a comparison that has a name, and none was given; say which with "
            f"run_name=... (in {node.output_dir}: {', '.join(begun) or 'no comparison without a name of its own'})"
        )
    hints = fields_of(RunConfig)
    name = fit(hints["run_name"], node.run_name, "run_name")
    return {
        "name": name or f"comparison-{strftime('%Y%m%d-%H%M%S')}",
        "output_dir": fit(hints["output_dir"], node.output_dir, "output_dir"),
    }


# --- the short form: methods by their names -------------------------------------------------------------------------

_SHARED = ("seeds", "budget", "amount", "reference", "target", "resume")  # fields of `Comparison`
_SHORT = ("methods", "rates", "evaluations")  # which only the short form has
_LEAD = {
    "method": "methods are compared by methods=[A,B,...]",
    "seed": "a comparison has several; write seeds=3 or seeds=[0,1,2]",
    "evaluation.every": "runs are evaluated at equal shares of the budget; write evaluations=10",
    "evaluation.parts": "write evaluations=10",
}
AT_THE_END = ("evaluation.parts=0", "evaluation.every=0", "evaluation.on_start=false")  # of runs that are not shown
_QUIET = ("evaluation.every=0", "evaluation.teacher=false", "doctor=false", "tracker=none")


def from_arguments(arguments: Sequence[str]) -> Request:
    """The comparison that `opd compare` asks for, in either form."""
    own = {key: value for key, _, value in (a.partition("=") for a in arguments) if key in (*_SHARED, *_SHORT)}
    rest = [a for a in arguments if a.partition("=")[0] not in own]
    given = {key: _value(key, text) for key, text in own.items()}
    if words := [word for word in rest if word in groups(own_folder(rest))["method"]]:
        raise ConfigurationError(f"methods are compared by their list; write methods=[{','.join(words)}]")
    if "methods" not in given:
        if wrong := next((key for key in _SHORT if key in given), None):
            raise ConfigurationError(f"{wrong}=... needs methods=[A,B,...]; an experiment's YAML lists its own arms")
        return from_experiment([*rest, *(f"comparison.{key}={_written(value)}" for key, value in given.items())])
    return _of_methods(given, rest)


def _value(key: str, text: str) -> Any:
    """The value of one of the command's own keys, of its type."""
    hints: dict[str, Any] = {
        **fields_of(Comparison),
        "methods": Annotated[Sequence[str], Length(2, "one method alone is no comparison")],
        "rates": Annotated[Sequence[Rate], Length(1)],
        "evaluations": Parts,
    }
    if key in ("methods", "rates", "seeds"):
        items = [part.strip() for part in text.strip("[] ").split(",") if part.strip()]
        if key == "seeds" and not text.startswith("["):
            return list(range(fit(Parts, _scalar(text), "seeds")))
        return fit(hints[key], items if key == "methods" else [_scalar(item) for item in items], key)
    return fit(hints[key], text if key in ("reference", "budget") else _scalar(text), key)


def _scalar(text: str) -> Any:
    """A number, a truth value or a text, as YAML reads it (`1e12` is a number here, too)."""
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text


def _written(value: Any) -> str:
    """The value in the grammar of overrides."""
    return value.value if isinstance(value, Unit) else str(value).lower() if isinstance(value, bool) else str(value)


def _of_methods(given: Mapping[str, Any], rest: Sequence[str]) -> Request:
    methods, rates = _known(given["methods"], own_folder(rest)), given.get("rates", RATES)
    if max(rates) < LEAST_FACTOR:
        raise ConfigurationError(
            f"rates={list(rates)} are factors of learner.lr, and every one is below {LEAST_FACTOR:g}, as learning "
            "rates are; write e.g. learner.lr=1e-4 rates=[0.5,1,2]"
        )
    shared, own, validation = _sorted_out(rest, methods)
    base = [*_defaults(shared, given.get("evaluations", 10)), *shared]
    node = compose(base)
    if "comparison" in node:
        raise ConfigurationError(
            "methods=[...] names the arms, and so does the experiment given; leave one of the two out"
        )
    grids = _grids(base, own, rates)
    values = {
        "base": [o for o in base if o.partition("=")[0] not in ("run_name", "output_dir", "dry_run")],
        "seeds": given.get("seeds", [0, 1, 2]),
        "reference": given.get("reference", methods[-1]),
        "arms": {m: [f"method={m}", *own[m], *_untuned(grids[m])] for m in methods},
        "tuning": _tuning(grids, validation or _other_problems(node)) if len(rates) > 1 else None,
        "target": given.get("target"),
        "budget": given.get("budget", Unit.STEPS),
        "amount": _amount(given, node),
        "resume": given.get("resume", False),
        **_named(node, resume=given.get("resume", False)),
    }
    return Request(comparison=Comparison(**values), dry_run=bool(node.dry_run))


def _known(methods: Sequence[str], own: str) -> Sequence[str]:
    """The methods, which all exist and differ."""
    known = groups(own)["method"]
    for method in methods:
        if method not in known:
            close = difflib.get_close_matches(method, known, n=1, cutoff=0.5)
            meant = f"did you mean {close[0]!r}? " if close else ""
            raise ConfigurationError(f"methods: there is no method {method!r}; {meant}(have: {', '.join(known)})")
    if len(set(methods)) < len(methods):
        raise ConfigurationError(
            f"methods=[{','.join(methods)}] names a method twice; arms that differ in other settings are written in "
            "YAML (conf/experiment/compare.yaml shows how)"
        )
    return methods


def _sorted_out(rest: Sequence[str], methods: Sequence[str]) -> tuple[list[str], dict[str, list[str]], list[str]]:
    """Overrides of all runs, of each method (`METHOD.KEY=VALUE`), and of the trials (`validation.KEY=VALUE`)."""
    shared: list[str] = []
    validation: list[str] = []
    own: dict[str, list[str]] = {method: [] for method in methods}
    for override in rest:
        key, _, _ = override.lstrip("+").partition("=")
        first, _, inner = key.partition(".")
        if first in own and inner:
            _refuse(inner, override, steps=True)
            own[first].append(override.lstrip("+").removeprefix(f"{first}."))
        elif first == "validation" and inner:
            validation.append(override.lstrip("+").removeprefix("validation."))
        else:
            _refuse(key, override)
            shared.append(override)
    return shared, own, validation


def _refuse(key: str, override: str, *, steps: bool = False) -> None:
    if key == "learner.lr" and "," in override:
        raise ConfigurationError(
            f"{override} names several rates, and opd compare tries its own for every method: rates=[0.5,1,2], which "
            "multiply learner.lr; set learner.lr to the middle one"
        )
    if lead := _LEAD.get(key):
        raise ConfigurationError(f"opd compare sets {key} itself, but {override} was given: {lead}")
    if (steps and key == "steps") or key.startswith("stop_after"):
        raise ConfigurationError(
            f"{override} would give a run a budget of its own, but all arms have the same: write budget=... amount=..."
        )


def _defaults(shared: Sequence[str], evaluations: int) -> Iterator[str]:
    """Settings of a comparison that its command does not name itself."""
    yield f"evaluation.parts={evaluations}"
    named = {override.lstrip("+").partition("=")[0] for override in shared}
    yield from (default for default in _QUIET if default.partition("=")[0] not in named)


def _grids(base: Sequence[str], own: Mapping[str, Sequence[str]], rates: Sequence[float]) -> dict[str, list[str]]:
    """The learning rates of every method: its own `learner.lr` (or that of all) times each of `rates`."""
    grids: dict[str, list[str]] = {}
    for method, overrides in own.items():
        middle = compose([*base, f"method={method}", *overrides]).learner.lr
        fitted = fit(Annotated[float, In(0, 1e6, low_open=True)], middle, "learner.lr")
        grids[method] = [f"{fitted * rate:.4g}" for rate in sorted(rates)]
        if len(set(grids[method])) < len(rates):
            raise ConfigurationError(
                f"rates={list(rates)} gives {method} the same learning rate twice; take them apart"
            )
    return grids


def _untuned(grid: Sequence[str]) -> list[str]:
    return [f"learner.lr={grid[0]}"] if len(grid) == 1 else []


def _tuning(grids: Mapping[str, Sequence[str]], problems: Sequence[str]) -> Tuning:
    return Tuning(
        key="learner.lr",
        values=grids,
        seed=TRIAL_SEED,
        overrides=[*AT_THE_END, *problems],
    )


NO_MAIN_SET = (
    "a comparison reports the accuracy on evaluation.prompts, which are null (evaluation.sets are measured beside them)"
    "; choose an evaluation that has them, e.g. evaluation=dataset evaluation.prompts.path=FILE"
)


def _other_problems(node: DictConfig) -> list[str]:
    """Overrides by which generated held-out problems become others; nothing does that to a file."""
    if node.evaluation.prompts is None:
        raise ConfigurationError(NO_MAIN_SET)
    found = list(_seeds(OmegaConf.to_container(node.evaluation.prompts, resolve=True), "evaluation.prompts"))
    if not found:
        raise ConfigurationError(
            "learning rates are chosen on other problems than those that are reported, and the evaluation.prompts come "
            "from a file; name another one with validation.evaluation.prompts.path=FILE, or do not choose: rates=[1]"
        )
    return found


def _seeds(prompts: Any, where: str) -> Iterator[str]:
    if not isinstance(prompts, dict):
        return
    if "seed" in prompts and "path" not in prompts:
        yield f"{where}.seed={int(prompts['seed']) + 1_000_000}"
    for name, inner in prompts.items():
        yield from _seeds(inner, f"{where}.{name}")


def _amount(given: Mapping[str, Any], node: DictConfig) -> float:
    """The budget's amount: of steps, if none was given, those of the experiment."""
    amount = float(given.get("amount", 0.0))
    if given.get("budget", Unit.STEPS) is not Unit.STEPS:
        return amount
    if amount != int(amount):
        raise ConfigurationError(f"amount={amount:g} is no number of steps; give a whole one, or another budget=...")
    return amount or float(node.steps)
