"""`opd train` with stages: one run after another, each from the student of the one before, in one directory."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import strftime
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from hf.folder import has_config
from launch.artifacts import terminal
from launch.artifacts.checkpoint_state import at_defaults, described
from launch.artifacts.evaluation_point import NOT_MEASURED, EvaluationPoint
from launch.artifacts.run_directory import LATEST, RunDirectory, check_name, decided, taken, write_json
from launch.artifacts.run_lock import is_over, running
from launch.artifacts.summary import Outcome, RunSummary
from launch.artifacts.untrusted_files import read_json
from launch.checkpoint.changes import Change, changes
from launch.checkpoint.places import check_writable
from launch.checkpoint.resume import move_aside_if_lost, resumption
from launch.cli.stages import OF_THE_RUN, Stage, override_key
from launch.cli.train import train_once
from launch.config.run_config import RunConfig, run_config, single_settings
from launch.monitors.trackers import check_login
from launch.plan import hub
from launch.plan.plan import Plan, make_plan
from launch.report.figures import short_number
from launch.report.next_steps import next_steps_text
from opd.errors import ConfigurationError, DataError

RECORD = "stages.json"  # names and settings of all stages, by which a resumed run knows what was trained
_ELSEWHERE = ("student.path", "run_name", "output_dir")  # follow from the stages themselves
_ENDS = ("steps", "stop_after.")  # a run may be made longer; a stage whose student went on to the next may not


def run_stages(stages: Sequence[Stage], node: DictConfig, common: Sequence[str]) -> int:
    """Train all stages that are not finished yet; returns the exit code. Errors are raised as sentences.

    `node` is the composed configuration that all share, `common` the overrides that led to it.
    """
    console = terminal.console()
    run = _StagedRun(stages, node, common)
    plans = run.plans()
    if run.dry_run:
        run.show(plans, console)
        return 0
    run.root.mkdir(parents=True, exist_ok=True)
    with running(run.root):
        run.record(plans)
        last = run.train(console)
    console.print(stage_table(run.root, stages))
    console.print(next_steps_text(last), soft_wrap=True, markup=False, highlight=False)
    return 0


@dataclass(frozen=True, slots=True)
class _Named:
    """Settings of the whole run."""

    name: str
    output_dir: str
    resume: str
    dry_run: bool

    @classmethod
    def of(cls, node: DictConfig) -> "_Named":
        values = single_settings(node, "run_name", "output_dir", "resume", "dry_run")
        resume, name = decided(values["resume"], values["output_dir"], values["run_name"]), values["run_name"]
        if resume not in ("", LATEST):
            raise ConfigurationError(
                f"resume={resume} names a checkpoint, and a run with stages goes on where it stopped; write "
                "resume=latest, or train the stage alone, whose command is in its command.txt"
            )
        if resume and not name:
            raise ConfigurationError(
                f"resume=latest needs run_name=... to say which run in {values['output_dir']} to go on with"
            )
        name = name or f"staged-{strftime('%Y%m%d-%H%M%S')}"
        check_name(name)
        return cls(name=name, output_dir=values["output_dir"], resume=resume, dry_run=values["dry_run"])


class _StagedRun:
    """The stages of one run: what each is planned as, which are finished, and the rest trained in order."""

    def __init__(self, stages: Sequence[Stage], node: DictConfig, common: Sequence[str]) -> None:
        named = _Named.of(node)
        self._stages, self.dry_run, self._resume = stages, named.dry_run, bool(named.resume)
        self._common = [o for o in common if override_key(o) not in OF_THE_RUN]
        self.root = Path(named.output_dir) / named.name
        check_writable(Path(named.output_dir))
        self._check_place()
        self._finished = self._all_finished()

    def _check_place(self) -> None:
        """Refuse a directory that is another run's, or that has training in it which was not to be gone on with."""
        if (self.root / "config.yaml").exists():
            raise taken(self.root)
        begun = any(RunDirectory(self._path(stage)).took_a_step for stage in self._stages)
        if begun and not self._resume:
            raise ConfigurationError(
                f"run directory {self.root} exists and is never overwritten; go on with resume=latest, or choose "
                "another run_name=..."
            )
        if self._resume and not self.root.is_dir():
            raise ConfigurationError(
                f"there is no run {self.root} to go on with; leave resume out, or correct run_name"
            )

    def _path(self, stage: Stage) -> Path:
        return self.root / stage.folder

    def _all_finished(self) -> int:
        """Number of stages at the beginning that are finished. Raises `ConfigurationError` if that is all of them."""
        done = 0
        for stage in self._stages:
            summary = RunDirectory(self._path(stage)).summary
            if not summary.exists() or RunSummary.read(summary).outcome is not Outcome.FINISHED:
                break
            done += 1
        if done == len(self._stages):
            raise ConfigurationError(
                f"the run {self.root} has finished its {done} stages; add a stage to go on, or choose another run_name"
            )
        return done

    # --- plans ------------------------------------------------------------------------------------------------------

    def plans(self) -> list[Plan]:
        """A plan of every stage, checked before anything is started.

        A stage's student does not exist before the one before it is finished. It differs from the first stage's student
        in nothing but weights, so that stands in for it, and the stage is planned again when its own is there.
        """
        plans: list[Plan] = []
        for stage in self._stages:
            stands_in = plans[0].config.student.path if plans else ""
            plans.append(self._plan(stage, self._student(stage) or stands_in))
        before = self._recorded()
        for stage, plan in zip(self._stages[: self._finished], plans, strict=False):
            _check_unchanged(self.root, stage, plan.config, before)
        return plans

    def _student(self, stage: Stage) -> str:
        """Folder of the student that this stage starts from; "" for the first one, and while there is none."""
        if not 1 < stage.number <= self._finished + 1:
            return ""
        export = RunDirectory(self._path(self._stages[stage.number - 2])).export
        return str(export) if has_config(export) else ""

    def _plan(self, stage: Stage, student: str) -> Plan:
        """Plan of a stage that starts from `student`; the first one ("") from the student of its settings."""
        try:
            if stage.number > 1:
                _check_student(stage)
            settings = [*self._common, *stage.overrides, *self._names(stage)]
            config = run_config([*settings, *([f"student.path={student}"] if student else [])])
            check_login(config.tracker)
            return make_plan(config)
        except (ConfigurationError, DataError) as error:
            raise type(error)(f"stage {stage.name}: {error}") from error

    def _names(self, stage: Stage) -> list[str]:
        """Overrides that make it a run of its own, in its place."""
        on = LATEST if self._resume and (self._path(stage) / "config.yaml").is_file() else ""
        group = (
            []
            if any(override_key(o) == "tracker.group" for o in (*self._common, *stage.overrides))
            else [f"tracker.group={self.root.name}"]
        )
        return [
            *group,
            f"run_name={stage.folder}",
            f"output_dir={self.root}",
            f"resume={on}",
            f"dry_run={str(self.dry_run).lower()}",
            "stages=null",
        ]

    def show(self, plans: Sequence[Plan], console: Console) -> None:
        """Print every stage's plan, and where the run would go on."""
        for stage, plan in zip(self._stages, plans, strict=True):
            console.print(f"stage {stage.number} of {len(plans)}: {stage.name}", soft_wrap=True, highlight=False)
            if stage.number <= self._finished:
                console.print(f"finished: {self._path(stage)}", soft_wrap=True, highlight=False)
                continue
            console.print(plan.table())
            plan.show_rate(console)
            plan.show_prompts(console)
            resumed = resumption(plan.config, console)
            if resumed is not None:
                console.print(f"would go on from {resumed.checkpoint}", soft_wrap=True, markup=False, highlight=False)

    # --- what was trained -------------------------------------------------------------------------------------------

    def _recorded(self) -> Mapping[str, Any]:
        """Settings of all stages by their folders, as they were when the run was last started."""
        path = self.root / RECORD
        return read_json(path, "put it back, or start a new run") if path.exists() else {}

    def record(self, plans: Sequence[Plan]) -> None:
        """Store the settings of all stages; those of finished ones stay as they were."""
        before = self._recorded()
        now = {
            stage.folder: before[stage.folder] if stage.number <= self._finished else described(plan.config)
            for stage, plan in zip(self._stages, plans, strict=True)
        }
        write_json(self.root / RECORD, now)
        hub.record(self.root, [one for plan in reversed(plans) for one in plan.hub])

    def train(self, console: Console) -> RunDirectory:
        """Train what is left, stage by stage; returns the last stage's directory."""
        directory = RunDirectory(self._path(self._stages[-1]))
        for stage in self._stages:
            what = f"stage {stage.number} of {len(self._stages)}, {stage.name}"
            if stage.number <= self._finished:
                console.print(f"{what}: finished before, in {self._path(stage)}", soft_wrap=True, highlight=False)
                continue
            self._make_way(stage, console)
            student = self._student(stage)
            if stage.number > 1 and not student:
                before = self._path(self._stages[stage.number - 2])
                raise DataError(f"{before} has finished, but has no export to start {what} from; put it back")
            plan = self._plan(stage, student)
            console.print(f"{what}: from {plan.config.student.path}", soft_wrap=True, highlight=False)
            directory = train_once(plan, console, whole=self.root.name)
            self._finished = stage.number
        return directory

    def _make_way(self, stage: Stage, console: Console) -> None:
        """Move aside what a start left that was killed before there was anything to go on from."""
        path = self._path(stage)
        if not path.exists() or not is_over(path):
            return
        aside = move_aside_if_lost(path)
        if aside is not None:
            console.print(
                f"stage {stage.name} begins anew: it has no checkpoint; what there was is {aside.name} now",
                soft_wrap=True,
                highlight=False,
            )


def _check_student(stage: Stage) -> None:
    """Refuse a student of its own: only the first stage has one."""
    for override in stage.overrides:
        if override_key(override) in ("student", "student.path"):
            raise ConfigurationError(
                f"{override} was given, but every stage after the first starts from the student that the one before it "
                "left; leave it out"
            )


def _check_unchanged(root: Path, stage: Stage, config: RunConfig, recorded: Mapping[str, Any]) -> None:
    """Refuse other settings of a stage whose student has gone on to the next."""
    before = recorded.get(stage.folder)
    if not isinstance(before, Mapping):
        raise DataError(f"{root / RECORD} has no settings of stage {stage.name}, which is finished; put it back")
    found = changes(before, json.loads(json.dumps(described(config))), at_defaults(config))
    wrong = next((change for change in found if _matters(change)), None)
    if wrong is not None:
        raise ConfigurationError(
            f"stage {stage.name} of {root} is finished, with {wrong.name}={wrong.before}, but this command has "
            f"{wrong.name}={wrong.now}; set it back, or start a new run"
        )


def _matters(change: Change) -> bool:
    return change.name not in _ELSEWHERE and (not change.harmless or change.name.startswith(_ENDS))


def stage_table(root: Path, stages: Sequence[Stage]) -> Table:
    """Table of the stages of a finished run: what each spent, and what it changed."""
    table = Table(title=f"run {root}")
    for heading in ("stage", "method", "steps", "tokens", "T=1", "reverse KL", "student"):
        table.add_column(heading)
    for stage in stages:
        directory = RunDirectory(root / stage.folder)
        told = RunSummary.read(directory.summary)
        accuracy = f"{_share(told.student_start)} -> {_share(told.student_end)}"
        divergence = f"{_nats(told.student_start)} -> {_nats(told.student_end)}"
        spent = (str(told.steps), short_number(told.tokens))
        table.add_row(stage.folder, told.method, *spent, accuracy, divergence, str(directory.export))
    return table


def _share(point: EvaluationPoint | None) -> str:
    return NOT_MEASURED if point is None or point.mean_at_k is None else f"{point.mean_at_k:.1%}"


def _nats(point: EvaluationPoint | None) -> str:
    return NOT_MEASURED if point is None or point.reverse_kl is None else f"{point.reverse_kl:.3f}"
