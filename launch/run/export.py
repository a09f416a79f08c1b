"""The student of a run, finished or as a checkpoint has it, as a Hugging Face folder with a model card."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hf.folder import has_config, read_json
from hf.tokenizer import HuggingFaceTokenizer
from hf.tokenizer_check import check_checkpoint
from launch.artifacts.checkpoint_state import LEARNER, MANIFEST, newest_first
from launch.artifacts.checkpoint_store import CheckpointStore, verified_state
from launch.artifacts.evaluation_point import EvaluationPoint
from launch.artifacts.run_directory import RunDirectory, write_json, write_text
from launch.artifacts.tracker_runs import tracker_runs
from launch.checkpoint.best import BEST, best_step
from launch.plan.checks.ends import text_ends
from launch.plan.hub import local_model, recorded_in
from launch.run.model_card import card, facts_of
from launch.run.push import PushRequest, push
from launch.services.learner_restart import RestartingLearner
from learner.config import LoraConfig
from opd.errors import ConfigurationError, DataError, OpdError
from opd.settings.devices import Dtype

if TYPE_CHECKING:
    from learner.checkpoints.merge import Origin


async def export_student(
    learner: RestartingLearner, directory: RunDirectory, facts: Mapping[str, str], end: EvaluationPoint | None
) -> None:
    """Write `export/` of a run: weights, config, tokenizer, and the card."""
    await learner.export(directory.export)
    write_card(directory, facts, end)


def write_card(directory: RunDirectory, facts: Mapping[str, str], end: EvaluationPoint | None) -> None:
    """The card of the export; written again when the last evaluation is there."""
    address = tracker_runs(directory).get("wandb", {}).get("url", "")
    tracked = {"run in wandb": address} if address else {}
    write_text(directory.export / "README.md", _card(directory.name, {**facts, **tracked}, end))


def _card(name: str, facts: Mapping[str, str], end: EvaluationPoint | None) -> str:
    measured = (
        {} if end is None else {k: v for k, v in end.as_json().items() if v not in (None, {}) and k != "estimates"}
    )
    lines = ["---", "library_name: transformers", "tags:", "- on-policy-distillation", "---", "", f"# {name}", ""]
    lines += ["A student trained by on-policy distillation with `opd`.", "", "| fact | value |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in facts.items()]
    if measured:
        lines += ["", "Held-out results at the end of training:", "", "| measure | value |", "|---|---|"]
        lines += [f"| {key} | {value} |" for key, value in measured.items()]
    return "\n".join(lines) + "\n"


def export_run(run: str, output: str, step: str = "", student: str = "") -> str:
    """`opd export`: a run's student, finished or as a checkpoint has it, in a new folder, which must not exist.

    `run` is a run's name, its directory, or the folder of one of its checkpoints. `step` may be `best`, by the run's
    `checkpoint_best`. Without `step` it is the finished
    student, or else the newest checkpoint. `student` is where the folder that was trained stands by now.
    """
    return str(_export(run, output, step, student))


def export_and_push(run: str, output: str, step: str, student: str, request: PushRequest) -> str:
    """`opd export push=ORG/NAME`: as `export_run`, in a folder that is forgotten without `output`, and then pushed.

    Returns the address of the commit.
    """
    place = _place(run, step)
    directory = run_of(place)
    if directory is None:
        raise ConfigurationError(
            f"push={request.repo} needs a run's directory for the model card, and {place} lies in none; give run=NAME"
        )
    steps = newest_first([place.name])
    with TemporaryDirectory(prefix="opd-") as temporary:
        folder = _export(run, output or str(Path(temporary) / "student"), step, student)
        at = steps[0] if steps else facts_of(directory, None).step
        return push(request, folder, directory, at)


def run_of(place: Path) -> RunDirectory | None:
    """Run directory of an export or a checkpoint, or None."""
    above = place.resolve().parents[1 if newest_first([place.name]) else 0]
    return RunDirectory(above) if (above / "config.yaml").is_file() else None


def _export(run: str, output: str, step: str, student: str) -> Path:
    target = Path(output)
    if target.exists():
        raise ConfigurationError(f"output {output} exists and is never overwritten; choose another output=...")
    place = _place(run, step)
    if newest_first([place.name]):
        _write(place, target, student)
    else:
        _copy(run, place, target)
    directory = run_of(place)
    if directory is not None:
        at = newest_first([place.name])
        write_text(target / "README.md", card(facts_of(directory, at[0] if at else None)))
        _name_base(target / "adapter" / "adapter_config.json", directory)
    return target


def _name_base(file: Path, directory: RunDirectory) -> None:
    """Name the base model of adapters as on the hub, where it came from there: its folder is of this machine."""
    base = recorded_in(directory.path).get("student.path")
    if base is not None and file.is_file():
        repo, _, commit = base.pinned.partition("@")
        write_json(
            file, read_json(file, "the exported adapter") | {"base_model_name_or_path": repo, "revision": commit}
        )


def _copy(run: str, place: Path, target: Path) -> None:
    check_checkpoint(str(place), f"the export of run {run}")
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        shutil.copytree(place, part)
        part.rename(target)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise OpdError(f"{target} cannot be written ({error.strerror or error}); choose another output=...") from error


@contextmanager
def as_model(folder: str) -> Iterator[str]:
    """`folder`, or where it is a run, the name of one, or one of its checkpoints: the student in it, in a folder that
    lasts as long.
    """
    path = Path(folder)
    named = not path.exists() and (Path("runs") / folder / "config.yaml").is_file()
    if not named and not newest_first([path.name]) and not (path / "config.yaml").is_file():
        yield folder
        return
    place = _place(folder, "")
    if not newest_first([place.name]):
        yield str(place)
        return
    with TemporaryDirectory(prefix="opd-") as temporary:
        target = Path(temporary) / "student"
        _write(place, target, "")
        yield str(target)


def _place(run: str, step: str) -> Path:
    """The finished student of `run`, or a checkpoint of it."""
    if newest_first([Path(run).name]) and (Path(run) / MANIFEST).is_file():
        return Path(run)
    named = Path("runs") / run
    directory = RunDirectory.open(named if not (Path(run) / "config.yaml").is_file() and named.is_dir() else Path(run))
    store = CheckpointStore(directory.checkpoints)
    have = ", ".join(map(str, store.steps())) or "none"
    if step == BEST:
        return store.path(best_step(directory))
    if step:
        if not step.isdecimal() or int(step) not in store.steps():
            raise ConfigurationError(f"run {run} has no checkpoint of step {step} (have: {have}); choose one of these")
        return store.path(int(step))
    if has_config(directory.export):
        return directory.export
    return store.newest_whole()[0]


def _write(place: Path, target: Path, student: str) -> None:
    _keep_libraries_quiet()
    from learner.checkpoints.merge import (
        export_checkpoint,  # transformers takes seconds, which other commands need not wait for
    )

    state = verified_state(place)
    origin = origin_of(state.config, student, place)
    origin = replace(origin, student=_found(origin.student, run_of(place)))
    check_checkpoint(origin.student, "the student that was trained (student=... if it has moved)")
    ends = text_ends(origin.student, HuggingFaceTokenizer(origin.student), {}).ids
    export_checkpoint(place / LEARNER, replace(origin, ends=ends), target)
    known = {name: state.config.get(name) for name in ("method.name", "student.path", "learner.lr", "seed")}
    facts = {"run": state.run_name, "step": str(state.step)} | {name: str(value) for name, value in known.items()}
    write_text(target / "README.md", _card(f"{state.run_name} step {state.step}", facts, None))


def _found(student: str, directory: RunDirectory | None) -> str:
    """The folder that was trained; where it is gone and came from the hub, it is fetched again at the same commit."""
    base = recorded_in(directory.path).get("student.path") if directory is not None else None
    wanted = base.pinned if base is not None and not Path(student).is_dir() else student
    return local_model("student", wanted)[0]


def _keep_libraries_quiet() -> None:
    """No bars of transformers, and no warning of DeepSpeed that it has found no GPU: this works on a CPU anyway."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def origin_of(settings: Mapping[str, Any], student: str = "", place: Path | str = "the checkpoint") -> "Origin":
    """Origin of a checkpoint (in errors: `place`), from the settings that it carries.

    Raises:
        DataError: they are not there, or are none.
    """
    from learner.checkpoints.merge import Origin

    try:
        names = [
            settings[f"learner.lora.target_modules.{i}"] for i in range(settings["learner.lora.target_modules.length"])
        ]
        lora = LoraConfig(
            r=settings["learner.lora.r"], lora_alpha=settings["learner.lora.lora_alpha"], target_modules=tuple(names)
        )
        path, dtype = student or settings["student.path"], Dtype[settings["learner.dtype"]]
        return Origin(student=path, dtype=dtype, lora=lora, seed=settings["seed"])
    except KeyError as error:
        raise DataError(
            f"{place} does not say what it was trained from (it has no {error.args[0]}); take another"
        ) from error
    except (TypeError, ConfigurationError) as error:
        raise DataError(f"{place} does not say what it was trained from ({error}); take another") from error
