"""Resuming: finds the checkpoint that `resume=` means, and refuses settings that would not continue the same run."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import strftime

from rich.console import Console

from hf.digest import model_digest
from hf.tokenizer_check import tokenizer_digest
from launch.artifacts.checkpoint_state import (
    DriverState,
    at_defaults,
    described,
    in_todays_names,
    name_of,
    newest_first,
)
from launch.artifacts.checkpoint_store import CheckpointStore, verified_state
from launch.artifacts.file_locks import alone_in
from launch.artifacts.run_directory import AUTO, LATEST, RunDirectory, check_name, read_jsonl, run_of
from launch.artifacts.run_lock import check_not_running, is_over
from launch.artifacts.spending import spending
from launch.artifacts.summary import Outcome, RunSummary
from launch.checkpoint.changes import Change, changes, check_changes, check_inputs, check_steps
from launch.config.run_config import RunConfig
from launch.inputs.prompt_paths import content_digest
from launch.inputs.row_changes import FUNCTION, code_digest
from opd.errors import ConfigurationError
from opd.ports import Listed
from opd.prompts.conversations import conversations_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """A verified checkpoint; `same_run` if its run goes on, otherwise a new run starts from it.

    `changed` has a sentence for every setting that is another from here on, as `resume_changes` allows, and for what
    trains or measures otherwise without it (`consequences`). They are kept beside the run's figures.
    """

    checkpoint: Path
    state: DriverState
    same_run: bool
    changed: tuple[str, ...] = ()


def fingerprints(config: RunConfig) -> dict[str, str]:
    """Digests of a run's inputs: of each teacher's weights by its name, of everything else by the setting's.

    Of a teacher whose weights are elsewhere, what the settings say. Example: `{"default": "9a..", "student.path":
    "c1..", "prompts.path": "03.."}`.
    """
    teachers = {name: model_digest(t.path) or t.fingerprint for name, t in config.teachers.items()}
    student = f"{model_digest(config.student.path)}-{tokenizer_digest(config.student.path)}"
    files: dict[str, str] = {}
    sources = (("prompts", config.prompts), *config.evaluation.sources.items())
    for place, source in sources:
        files |= source.files(place) if isinstance(source, Listed) else {}
    code = {
        f"{place}.{name}": code_digest(value, f"{place}.{name}")
        for top in sources
        for place, source in conversations_of(*top)
        for name in ("map", "filter")
        if FUNCTION.fullmatch(value := getattr(source, name, ""))
    }
    digests = {key: content_digest(path, key) for key, path in files.items()}
    return teachers | {"student.path": student} | digests | code


def resumption(config: RunConfig, console: Console) -> ResumePoint | None:
    """The resume point of `resume=`, or None for a run from the start. Changes nothing but leftovers of a crash.

    Raises:
        ConfigurationError: there is no such checkpoint, the run is still running or finished, or the settings or the
            teacher would train something else.
        DataError: the checkpoint is foreign, cut off or damaged.
    """
    if not config.resume:
        return None
    found_there = _found(config, console)
    if found_there is None:
        return None
    place, state, same_run = found_there
    now = fingerprints(config)
    found = changes(in_todays_names(state.config), described(config), at_defaults(config))
    check_inputs(str(place), state.teachers, now, found)
    others = [change for change in found if change.name not in state.teachers.keys() & now.keys()]
    meant = check_changes(str(place), others, config.resume_changes)
    check_steps(str(place), state.step, config.steps)
    if same_run:
        _check_unfinished(RunDirectory(place.parent.parent), state, config)
    same = {name for name, digest in now.items() if state.teachers.get(name) == digest}
    changed = (
        *(f"after step {state.step}: {c.name} is {c.now}, and was {c.before} before" for c in meant),
        *consequences([change for change in found if change.name not in same], config, state.step),
    )
    for sentence in (*_remarks(config, found, state.step), *changed):
        console.print(sentence, soft_wrap=True)
    return ResumePoint(checkpoint=place, state=state, same_run=same_run, changed=changed)


def _found(config: RunConfig, console: Console) -> tuple[Path, DriverState, bool] | None:
    if config.resume != LATEST and not config.resume.isdecimal():
        path = Path(config.resume)
        if not newest_first([path.name]):
            raise ConfigurationError(
                f"resume={config.resume} is neither {LATEST!r} or {AUTO!r}, nor a step, nor the path of a checkpoint "
                f"such as runs/<run_name>/checkpoints/step_40; {_meant_by(path, Path(config.output_dir))}"
            )
        return path, verified_state(path), False
    if not config.run_name:
        raise ConfigurationError(f"resume={config.resume} needs run_name=... to say which run in {config.output_dir}")
    directory = RunDirectory.open(Path(config.output_dir) / config.run_name)
    check_not_running(directory.path)
    store = CheckpointStore(directory.checkpoints)
    if not config.dry_run:
        store.recover()
    if config.resume == LATEST and can_begin_again(directory.path):
        console.print(f"run {directory.path}: no step was finished, so there is nothing to go on from", soft_wrap=True)
        return None
    if config.resume == LATEST:
        place, state, skipped = store.newest_whole()
        for sentence in skipped:
            console.print(f"skipped: {sentence}", soft_wrap=True)
        return place, state, True
    step = int(config.resume)
    if step not in store.steps():
        have = ", ".join(map(str, store.steps())) or "none"
        raise ConfigurationError(f"{store.folder} has no checkpoint of step {step} (have: {have}); choose one of these")
    return store.path(step), verified_state(store.path(step)), True


def _meant_by(path: Path, root: Path) -> str:
    """Advice about a `resume` that is no checkpoint."""
    run = next((run for at in (path, root / path) if at.exists() and (run := run_of(at)) is not None), None)
    if run is None:
        return "give one of these"
    steps = newest_first([p.name for p in (run / "checkpoints").iterdir()])
    anew = f", or begin a new run there by resume={run / 'checkpoints' / name_of(steps[0])}" if steps else ""
    return f"go on with that run by run_name={run.name} output_dir={run.parent} resume={LATEST}{anew}"


def _check_unfinished(directory: RunDirectory, state: DriverState, config: RunConfig) -> None:
    at = {"step": float(state.step), **state.totals}
    spent = next((unit for unit, n in config.stop_after.amounts.items() if spending(at, unit) >= n), None)
    if (state.step < config.steps and spent is None) or not directory.summary.exists():
        return
    if RunSummary.read(directory.summary).outcome is Outcome.FINISHED:
        done = f"spent its stop_after.{spent.value}" if spent else f"finished its {config.steps} steps"
        raise ConfigurationError(
            f"the run {directory.path} has {done}; raise {f'stop_after.{spent.value}' if spent else 'steps'} to go on"
        )


def consequences(found: Sequence[Change], config: RunConfig, step: int) -> list[str]:
    """Sentences about allowed changes after which the curves of a run are not those of one run.

    Example: `after step 40: steps is 200, and was 100 before, so the learning rate's schedule (LINEAR) ends elsewhere`.
    """
    changed = {change.name: change for change in found}
    told: list[str] = []
    if (steps := changed.get("steps")) is not None and not config.learner.schedule.constant:
        told.append(
            f"after step {step}: steps is {steps.now}, and was {steps.before} before, so the learning rate's schedule "
            f"({config.learner.schedule.name}) ends elsewhere"
        )
    measured = [c for c in found if c.name.startswith("evaluation.") and c.name.rpartition(".")[2] not in _WHEN]
    if measured:
        first, more = measured[0], f" (and {len(measured) - 1} more)" if len(measured) > 1 else ""
        told.append(
            f"after step {step}: {first.name} is {first.now}, and was {first.before} before{more}, so figures of "
            "evaluations before and after are not of one measure"
        )
    return told


_MICROBATCH = "learner.tokens_per_microbatch"
_WHEN = ("every", "parts", "on_start", "teacher")  # say when, and whether the teacher as well; not what is measured


def _remarks(config: RunConfig, found: list[Change], step: int) -> list[str]:
    changed = {change.name: change for change in found}
    remarks: list[str] = []
    if moved := next((change for name, change in changed.items() if re.fullmatch(r"prompts\.(.+\.)?path", name)), None):
        remarks.append(
            f"note: {moved.name} was {moved.before} and is {moved.now} now, with the same content; prompts are named "
            "after their path, so from here on text is sampled with other seeds than it would have been"
        )
    if (size := changed.get(_MICROBATCH)) is not None:
        remarks.append(
            f"note: {_MICROBATCH} was {size.before} and is {size.now} now, so the sums of a step are cut elsewhere: "
            "what is trained is the same, but for rounding"
        )
    if "checkpoint_every" in changed and config.deterministic and config.max_staleness:
        remarks.append(
            f"note: checkpoint_every was {changed['checkpoint_every'].before} and is {config.checkpoint_every} now; no "
            "text is written across a checkpoint, so from here on other versions write than would have"
        )
    elif config.deterministic and not config.staleness_schedule.resumes_exactly(step):
        remarks.append(
            f"note: step {step} is no multiple of checkpoint_every, so text was on its way when it was saved; nothing "
            "is lost, but the run goes on with other text than an uninterrupted one would have"
        )
    return remarks


def open_directory(config: RunConfig, resumed: ResumePoint | None, console: Console) -> RunDirectory:
    """Directory of the run: a new one, or that of the resumed run with everything after the checkpoint cut off.

    One in which no step was ever finished does not use up its name: it is moved aside, and the run begins.
    """
    root = Path(config.output_dir)
    if resumed is not None and resumed.same_run:
        return RunDirectory.open(root / config.run_name)
    name = config.run_name or f"{config.method.name}-{strftime('%Y%m%d-%H%M%S')}"
    check_name(name)
    with alone_in(root):
        if can_begin_again(root / name):
            aside = root / f"{name}.begun-{strftime('%Y%m%d-%H%M%S')}"
            (root / name).rename(aside)
            console.print(
                f"run {root / name}: begins anew; no step was finished in the one before, which is {aside.name} now",
                soft_wrap=True,
            )
        return RunDirectory.create(root, name)


def can_begin_again(path: Path) -> bool:
    """Whether this is the directory of a run that is over and has finished no step."""
    if not (path / "config.yaml").is_file() or not is_over(path):
        return False
    return not RunDirectory(path).took_a_step


def move_aside_if_lost(path: Path) -> Path | None:
    """New place of what a killed run left from which nothing can go on; None where `resume=latest` has a way on."""
    directory, store = RunDirectory(path), CheckpointStore(path / "checkpoints")
    store.recover()
    if (path / "config.yaml").is_file() and (store.steps() or not directory.took_a_step):
        return None
    aside = path.with_name(f"{path.name}.begun-{strftime('%Y%m%d-%H%M%S')}")
    path.rename(aside)
    return aside


def way_on(directory: RunDirectory, rescued: Path | None = None, whole: str = "") -> str:
    """Advice on how to continue a run that did not finish, from what is there or was `rescued` elsewhere.

    `whole`: name of the run or sweep that it is a part of; what was rescued then goes on as a run of the part alone.
    """
    if rescued is not None:
        step = newest_first([rescued.name])[0]
        same = f"the command in {directory.command}" if whole else "the same command"
        return (
            f"step {step} is kept in {rescued}, since it could not be written in its place: {same} with "
            f"another run_name and resume={rescued} goes on, and opd export run={rescued} output=FOLDER makes a model "
            "of it"
        )
    steps = CheckpointStore(directory.checkpoints).steps()
    if steps:
        place = directory.checkpoints / name_of(steps[0])
        same = f"the same command with run_name={whole or directory.name} resume=latest goes on"
        return (
            f"step {steps[0]} is kept in {place}: {same}, and opd export run={directory.path} step={steps[0]} "
            "output=FOLDER makes a model of it"
        )
    if whole:
        return (
            f"{directory.name} has no checkpoint: the same command with run_name={whole} resume=latest begins it anew"
        )
    if directory.took_a_step:
        return (
            "no checkpoint was written, so there is nothing to go on from (set checkpoint_every or checkpoint_minutes)"
        )
    return "no step was finished, so there is nothing to go on from: the same command begins anew"


def rewind(directory: RunDirectory, resumed: ResumePoint, steps: int) -> None:
    """Remove what will be written again: lines after the checkpoint, newer checkpoints, and the run's outcome.

    Checkpoints go first: one whose lines are gone would leave a hole if a crash came between.
    """
    CheckpointStore(directory.checkpoints).forget_after(resumed.state.step)
    directory.rewind(resumed.state.step, steps)


def history(directory: RunDirectory) -> list[Mapping[str, float]]:
    """The kept lines of metrics, for alerts that look back; values that are no numbers are left out."""
    return [{k: v for k, v in line.items() if v is not None} for line in read_jsonl(directory.metrics)]
