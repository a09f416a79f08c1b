"""Next steps with a run: commands to copy, from the contents of its directory."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from hf.folder import has_config
from launch.artifacts.checkpoint_store import CheckpointStore
from launch.artifacts.run_directory import RunDirectory
from launch.artifacts.spending import Unit
from launch.artifacts.summary import Outcome, RunSummary
from launch.artifacts.tracker_runs import tracker_runs

_OF_ONE_RUN = ("run_name", "resume", "resume_changes", "dry_run")  # keys that another command does not share
_OF_NO_COMPARISON = ("method", "evaluation.every", "evaluation.parts", *(f"stop_after.{u.value}" for u in Unit))
_OF_ANOTHER = (*_OF_ONE_RUN, "output_dir", "seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class NextStep:
    """An action on a run, and the command for it."""

    what: str
    command: str


def next_steps(directory: RunDirectory, summary: RunSummary | None) -> list[NextStep]:
    """Commands to measure, copy, repeat and compare a finished run or resume another, and where wandb's files are."""
    return list(_steps(directory, summary))


def next_steps_text(directory: RunDirectory) -> str:
    """Outputs of a finished run, and the commands that go on with it, as text."""
    steps = next_steps(directory, RunSummary.read(directory.summary))
    left = [f"report: {directory.report}", f"student: {directory.export}"]
    return "\n".join([*left, *(f"{step.what}: {step.command}" for step in steps)])


def _steps(directory: RunDirectory, summary: RunSummary | None) -> Iterator[NextStep]:
    given, run = _overrides(directory), f"run={directory.path}"
    finished = summary if summary is not None and summary.outcome is Outcome.FINISHED else None
    others = _without(given, _OF_ANOTHER)
    kept = CheckpointStore(directory.checkpoints).steps()
    if kept and not finished:
        again = [*_without(given, _OF_ONE_RUN), f"run_name={directory.name}", "resume=latest"]
        yield NextStep(what=f"go on after step {kept[0]}", command=_command("train", *again))
    if has_config(directory.export):
        measured = _command("eval", f"checkpoint={directory.export}", *_without(others, ("student.path",)))
        yield NextStep(what="measure the student", command=measured)
        yield NextStep(what="copy it for other tools", command=_command("export", run, "output=FOLDER"))
    elif kept:
        made = _command("export", run, f"step={kept[0]}", "output=FOLDER")
        yield NextStep(what=f"make a model of step {kept[0]}", command=made)
    if finished:
        repeated = _command("train", *others, f"seed={finished.seed + 1}")
        yield NextStep(what="the same with another seed", command=repeated)
        methods = [finished.method, "sft" if finished.method != "sft" else "full_reverse_kl"]
        shared = _without(others, _OF_NO_COMPARISON)
        yield NextStep(
            what="compare methods at one budget",
            command=_command("compare", f"methods=[{','.join(methods)}]", *shared, "dry_run=true"),
        )
    if offline := sorted((directory.path / "wandb").glob("offline-run-*")):
        yield NextStep(what="look at it in wandb's local viewer", command=f"wandb leet {shlex.quote(str(offline[-1]))}")
        yield NextStep(what="send it to wandb", command=f"wandb sync {shlex.quote(str(offline[-1]))}")
    kept_by = tracker_runs(directory)
    if "tensorboard" in kept_by:
        beside = shlex.quote(str(directory.path.parent))
        yield NextStep(what="look at it in TensorBoard, beside its siblings", command=f"tensorboard --logdir {beside}")
    there = kept_by.get("mlflow", {})
    if (uri := there.get("uri", "")).startswith("sqlite:"):
        shown = f"mlflow ui --backend-store-uri {shlex.quote(uri)}"
        yield NextStep(what="look at it in MLflow (the whole of it, in an environment of its own)", command=shown)
    elif uri.startswith(("http://", "https://")):
        scheme, _, rest = uri.partition("://")
        page = f"#/experiments/{there.get('experiment_id', '')}/runs/{there.get('run_id', '')}"
        host, slash, path = rest.partition("/")
        server = f"{scheme}://{host.rpartition('@')[2]}{slash}{path}".rstrip("/")  # a login is no part of a page
        yield NextStep(what="look at it in MLflow", command=f"{server}/{page}")


def _overrides(directory: RunDirectory) -> list[str]:
    """Overrides of the run's own command; none where it was not recorded."""
    return shlex.split(directory.command.read_text())[2:] if directory.command.exists() else []


def _without(overrides: list[str], keys: tuple[str, ...]) -> list[str]:
    return [override for override in overrides if override.partition("=")[0].lstrip("+") not in keys]


def _command(name: str, *overrides: str) -> str:
    return shlex.join(["opd", name, *overrides])
