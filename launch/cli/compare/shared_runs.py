"""Runs that several processes may share: each takes what no other has, and waits for the rest."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import sleep, strftime
from typing import Any

import yaml
from rich.console import Console

from launch.artifacts.file_locks import hold
from launch.artifacts.redaction import redacted
from launch.artifacts.run_lock import is_over
from launch.artifacts.summary import Outcome
from launch.artifacts.untrusted_files import read_json, read_yaml
from launch.cli.train import train_once
from launch.plan.plan import Plan
from launch.report.comparison import Arm
from opd.errors import ConfigurationError

CLAIMS = ".claims"  # folder of a comparison or a sweep with a file for every run, locked by the process that is at it
PAUSE_S = 5.0  # between two looks at what other processes are at


Once = Callable[[Path, Plan, Console], Path | None]


def run_all(root: Path, plans: Mapping[str, Sequence[Plan]], console: Console, once: Once | None = None) -> list[Arm]:
    """Every run of `plans` (by arm, as many for one as for another), finished by this process or another.

    Arms alternate, so that other load on the machine affects all of them alike. What other processes are at is waited
    for; what one has left unfinished is run again. `once` is asked for one run, as `run_once`, which it is by default.
    """
    waited, one_run = False, once or run_once
    while True:
        rounds = [
            (arm, plan, one_run(root, plan, console))
            for round_ in zip(*plans.values(), strict=True)
            for arm, plan in zip(plans, round_, strict=True)
        ]
        others = [plan.config.run_name for _, plan, directory in rounds if directory is None]
        if not others:
            return [Arm(label=arm, seed=plan.config.seed, directory=path) for arm, plan, path in rounds if path]
        if not waited:
            console.print(f"waiting for what other processes are at: {', '.join(others)}", soft_wrap=True)
        waited = True
        sleep(PAUSE_S)


def run_once(root: Path, plan: Plan, console: Console) -> Path | None:
    """Directory of a finished run of `plan`, run now or before; None while another process is at it.

    What was left by a run that ended otherwise is moved aside.

    Raises:
        ConfigurationError: it was finished with other settings.
    """
    path = root / plan.config.run_name
    with claimed(root, path.name) as mine:
        if not mine or (path.exists() and not is_over(path)):
            return None
        if path.exists():
            if finished_with(path, plan.config.text):
                return path
            path.rename(path.with_name(f"{path.name}.ended-{strftime('%Y%m%d-%H%M%S')}"))
        return train_once(plan, console).path


@contextmanager
def claimed(root: Path, name: str) -> Iterator[bool]:
    """Context in which no other process runs the run `name`; False if one is at it. The system ends the claim of a
    process that was killed.
    """
    folder = root / CLAIMS
    folder.mkdir(parents=True, exist_ok=True)
    handle = hold(folder / name)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


def finished_with(path: Path, text: str) -> bool:
    """Whether the run in `path` has finished. Raises `ConfigurationError` if it finished with other settings than
    `text`.
    """
    advice = "choose another run_name=..."
    if not (path / "summary.json").exists():
        return False
    if read_json(path / "summary.json", advice).get("outcome") != Outcome.FINISHED.value:
        return False
    if _compared(read_yaml(path / "config.yaml", advice)) != _compared(redacted(yaml.safe_load(text))):
        raise ConfigurationError(
            f"{path} was finished with other settings; choose another run_name=... for this comparison"
        )
    return True


def _compared(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without `evaluation.on_start`: whatever it is, the run and the figures of its end are the same."""
    evaluation = settings.get("evaluation")
    if not isinstance(evaluation, dict):
        return settings
    return settings | {"evaluation": {key: value for key, value in evaluation.items() if key != "on_start"}}
