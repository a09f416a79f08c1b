"""`opd train -m`: all runs of a sweep planned before the first one starts, then trained one after another.

What is finished is not run again, what was stopped goes on, and several processes may share a sweep.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import strftime, time

from omegaconf import DictConfig
from rich.console import Console

from launch.artifacts import terminal
from launch.artifacts.run_directory import LATEST, RunDirectory, check_name, decided, taken
from launch.artifacts.run_lock import is_over
from launch.artifacts.spending import Unit
from launch.artifacts.summary import Outcome, RunSummary
from launch.artifacts.sweep_record import SweepRecord, is_sweep
from launch.checkpoint.places import check_writable
from launch.checkpoint.resume import move_aside_if_lost
from launch.cli.compare.budget_plan import at_most_per_step
from launch.cli.compare.shared_runs import claimed, run_all
from launch.cli.stages import override_key
from launch.cli.sweep.points import OF_THE_SWEEP, Point
from launch.cli.sweep.standing import Progress, Standing, check_goes_on, standing
from launch.cli.train import train_once
from launch.config.composition.compose import compose
from launch.config.run_config import RunConfig, run_config, single_settings
from launch.monitors.trackers import check_login
from launch.plan import hub
from launch.plan.plan import Plan, make_plan
from launch.plan.sizes import as_begun
from launch.report.figures import short_number
from launch.services.failure_causes import find_own
from launch.services.signals import Preempted
from opd.errors import ConfigurationError, DataError, OpdError


def run_sweep(points: Sequence[Point], overrides: Sequence[str]) -> int:
    """Train all runs of a sweep that are not finished yet; returns the exit code. Errors are raised as sentences.

    `overrides` are those of the command, as they were given.
    """
    console = terminal.console()
    sweep = _Sweep(_Asked.of(compose(points[0].overrides)), points)
    plans = sweep.plans()
    progress = sweep.progress(plans, console)
    for line in sweep.outline(plans, progress):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    if sweep.asked.dry_run:
        _show(plans, console)
        return 0
    sweep.begin(plans, overrides)
    _show_remarks(plans, console)
    sweep.train(plans, console)
    from launch.report.sweep_page import write_sweep  # matplotlib takes a second, which no run need wait for

    write_sweep(sweep.asked.root, console)
    sweep.raise_failures()
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """Settings of the whole sweep: its directory, whether it goes on, and whether it is only planned."""

    root: Path
    goes_on: bool
    dry_run: bool

    @classmethod
    def of(cls, node: DictConfig) -> "_Asked":
        values = single_settings(node, "run_name", "output_dir", "resume", "dry_run")
        resume, name = decided(values["resume"], values["output_dir"], values["run_name"]), values["run_name"]
        if "comparison" in node or node.get("stages"):
            raise ConfigurationError(
                "a comparison and a run with stages are several runs already, and cannot be swept; leave -m out"
            )
        if resume not in ("", LATEST):
            raise ConfigurationError(
                f"resume={resume} names a checkpoint of one run, and a sweep goes on where it stopped; write "
                "resume=latest"
            )
        if resume and not name:
            raise ConfigurationError(
                f"resume=latest needs run_name=... to say which sweep in {values['output_dir']} to go on with"
            )
        name = name or f"sweep-{strftime('%Y%m%d-%H%M%S')}"
        check_name(name)
        check_writable(Path(values["output_dir"]))
        asked = cls(root=Path(values["output_dir"]) / name, goes_on=bool(resume), dry_run=values["dry_run"])
        asked.check_place()
        return asked

    def check_place(self) -> None:
        """Refuse a directory that is a run's or another sweep's, and going on with what is none."""
        if (self.root / "config.yaml").exists():
            raise taken(self.root)
        if self.goes_on and not is_sweep(self.root):
            raise ConfigurationError(
                f"there is no sweep {self.root} to go on with; leave resume out, or correct run_name"
            )
        if self.root.exists() and not self.goes_on:
            raise ConfigurationError(
                f"sweep directory {self.root} exists and is never overwritten; go on with it, or share it with another "
                "process, by resume=latest, or choose another run_name=..."
            )


@dataclass(slots=True)
class _Sweep:
    """The runs of a sweep; `failed` has a sentence about each that failed in this process."""

    asked: _Asked
    points: Sequence[Point]
    failed: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time)

    # --- plans ------------------------------------------------------------------------------------------------------

    def plans(self) -> dict[str, Plan]:
        """A plan of every run, by its name; a wrong value in the last one is found before the first one is planned."""
        configs: dict[str, RunConfig] = {}
        for point in self.points:
            with _about(point.name):
                configs[point.name] = run_config([*self._kept(point), *self._names(point)])
                check_login(configs[point.name].tracker)
        plans: dict[str, Plan] = {}
        for name, config in configs.items():
            with _about(name):
                plans[name] = make_plan(as_begun(config) if self.asked.goes_on else config)
        return plans

    def _kept(self, point: Point) -> list[str]:
        own = [key for key in OF_THE_SWEEP if key not in ("conf", "resume_changes")]
        return [override for override in point.overrides if override_key(override) not in own]

    def _names(self, point: Point) -> list[str]:
        """Overrides that make it a run of its own, in its place."""
        grouped = any(override_key(override) == "tracker.group" for override in point.overrides)
        return [
            *([] if grouped else [f"tracker.group={self.asked.root.name}"]),
            f"run_name={point.name}",
            f"output_dir={self.asked.root}",
            "resume=",
            f"dry_run={str(self.asked.dry_run).lower()}",
        ]

    def progress(self, plans: Mapping[str, Plan], console: Console) -> dict[str, Progress]:
        """Standing of every run. Raises `ConfigurationError` about one that cannot go on with these settings."""
        for name, plan in plans.items():
            with _about(name):
                check_goes_on(self.asked.root / name, plan.config, console)
        return {name: standing(self.asked.root / name, plan.config) for name, plan in plans.items()}

    def outline(self, plans: Mapping[str, Plan], progress: Mapping[str, Progress]) -> list[str]:
        """A line for every run, and what they will spend at most."""
        lines = [f"sweep {self.asked.root}: {len(plans)} runs"]
        lines += [f"  {name}: {progress[name]}" for name in plans]
        left = {name: plan.config.steps - progress[name].step for name, plan in plans.items() if progress[name].open}
        most = {name: at_most_per_step(plans[name]) for name in left}
        tokens, flops = (sum(left[name] * most[name][unit] for name in left) for unit in (Unit.TOKENS, Unit.FLOPS))
        return [
            *lines,
            f"to do: {len(left)} runs, {sum(left.values())} steps; at most {short_number(tokens)} tokens "
            f"(generated and learned) and {short_number(flops)} FLOP, if every completion had max_tokens",
        ]

    # --- training ---------------------------------------------------------------------------------------------------

    def begin(self, plans: Mapping[str, Plan], overrides: Sequence[str]) -> None:
        """Make the sweep's directory, and record its runs."""
        root = self.asked.root
        root.mkdir(parents=True, exist_ok=self.asked.goes_on)
        SweepRecord(runs={point.name: point.values for point in self.points}).add_to(root)
        RunDirectory(root).write_command(["-m", *overrides])
        hub.record(root, [one for plan in plans.values() for one in plan.hub])

    def train(self, plans: Mapping[str, Plan], console: Console) -> None:
        """Train what is left, one run after another, beside other processes that do the same."""
        try:
            run_all(self.asked.root, {name: [plan] for name, plan in plans.items()}, console, self._once)
        except BaseException as error:
            if not getattr(error, "__notes__", ()):
                error.add_note(f"the same command with run_name={self.asked.root.name} resume=latest goes on")
            raise

    def _once(self, root: Path, plan: Plan, console: Console) -> Path | None:
        """Directory of the run when this process or another has ended it; None while another one is at it."""
        name = plan.config.run_name
        path = root / name
        with claimed(root, name) as mine:
            if not mine:
                return None
            if name in self.failed or self._failed_elsewhere(path):
                return path
            now = standing(path, plan.config)
            if now.standing is Standing.ELSEWHERE:
                return None
            if now.open:
                self._train(path, plan, console)
            return path

    def _failed_elsewhere(self, path: Path) -> bool:
        """Whether another process tried this run and failed since this one began; it would fail here as well."""
        summary = RunDirectory(path).summary
        if not is_over(path) or not summary.exists() or summary.stat().st_mtime < self.began:
            return False
        told = RunSummary.read(summary)
        if told.outcome is Outcome.FAILED:
            self.failed[path.name] = told.error
        return told.outcome is Outcome.FAILED

    def _train(self, path: Path, plan: Plan, console: Console) -> None:
        """Train one run to its end. One that fails leaves the others a chance."""
        begun = path.exists()
        if begun and (aside := move_aside_if_lost(path)) is not None:
            console.print(
                f"{path.name} begins anew; what there was is {aside.name} now", soft_wrap=True, highlight=False
            )
            begun = False
        number = 1 + [point.name for point in self.points].index(path.name)
        console.print(f"run {number} of {len(self.points)}: {path.name}", soft_wrap=True, highlight=False)
        config = replace(plan.config, resume=LATEST if begun else "")
        try:
            train_once(replace(plan, config=config), console, whole=self.asked.root.name)
        except Exception as error:
            own = find_own(error)
            if own is None or isinstance(own, Preempted):
                raise
            self.failed[path.name] = str(own)
            console.print(f"run {path.name} failed: {own}", soft_wrap=True, markup=False, highlight=False)

    def raise_failures(self) -> None:
        """Raise `OpdError` if a run failed."""
        if self.failed:
            name, sentence = next(iter(self.failed.items()))
            more = f" (and {len(self.failed) - 1} more)" if len(self.failed) > 1 else ""
            raise OpdError(
                f"{len(self.failed)} of {len(self.points)} runs of {self.asked.root} failed; {name}: {sentence}{more}; "
                f"the same command with run_name={self.asked.root.name} resume=latest tries again"
            )


@contextmanager
def _about(name: str) -> Iterator[None]:
    """Context in which a sentence about a wrong setting names the run."""
    try:
        yield
    except (ConfigurationError, DataError) as error:
        raise type(error)(f"run {name}: {error}") from error


def _show(plans: Mapping[str, Plan], console: Console) -> None:
    """Print the plan of the first run with its curve of the learning rate, and the remarks about all."""
    first = next(iter(plans.values()))
    console.print(first.table())
    first.show_rate(console)
    _show_remarks(plans, console)


def _show_remarks(plans: Mapping[str, Plan], console: Console) -> None:
    """Print the first run's prompts and remarks, and the remarks of others that differ."""
    first, *others = plans.values()
    first.show_prompts(console)
    seen = set(first.remarks)
    for plan in others:
        for remark in plan.remarks:
            if remark not in seen:
                console.print(f"{plan.config.run_name}: {remark}", soft_wrap=True, markup=False, highlight=False)
        seen |= set(plan.remarks)
