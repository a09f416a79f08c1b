"""The examples of parts of one's own, run as their pages say, in a folder outside the project."""

import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
SMALL = ["steps=2", "doctor=false", "tracker=none", "evaluation.teacher=false"]


def run(folder: Path, command: list[str], **environment: str) -> Path:
    """The directory of the run `opd <command>` given in `folder`, where (-P) Python does not look for modules."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "launch.cli", *command, *SMALL], cwd=folder, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, timeout=550, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / next(s.removeprefix("run_name=") for s in [*command, *SMALL] if s.startswith("run_name="))


def records(file: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def last_step(folder: Path, command: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The metrics of the last step and the samples, of `opd <command>` given in `folder`."""
    directory = run(folder, [*command, "run_name=mine"])
    summary = json.loads((directory / "summary.json").read_text())
    assert not [alert for alert in summary["alerts"] if alert.startswith(("graders", "environments"))]
    return records(directory / "metrics.jsonl")[-1], records(directory / "samples.jsonl")


def example(name: str, to: Path) -> tuple[Path, list[str]]:
    """A copy of the example's folder, and the first training of its page."""
    folder, (command, *_) = examples(name, to)
    return folder, command


def examples(name: str, to: Path) -> tuple[Path, list[list[str]]]:
    """A copy of the example's folder, and every training of its page."""
    folder = Path(shutil.copytree(ROOT / "examples" / name, to / name))
    lines = (folder / "README.md").read_text().replace("\\\n", " ").splitlines()
    return folder, [shlex.split(line)[1:] for line in lines if line.startswith("opd train ")]


@pytest.mark.ray
def test_the_example_of_a_reward_trains(tmp_path: Path) -> None:
    folder, command = example("new_reward", tmp_path)
    few = ["prompts.prompts_per_step=4", "evaluation.prompts.prompts_per_step=4", "evaluation.reverse_kl_prompts=4"]
    last, samples = last_step(folder, [*command, *few])
    assert last["step"] == 2 and last["actor/grad_norm"] > 0 and last["reward/mean"] < 1
    for sample in samples:  # what its function says, of cut completions too
        right = sample["text"] if "text" in sample else "".join(sample["tokens"])
        words = right.split()
        assert sample["reward"] == pytest.approx((words[-2:] == sample["answer"].split()) - 0.01 * len(words), abs=1e-6)


@pytest.mark.ray
def test_the_example_of_an_environment_trains(tmp_path: Path) -> None:
    folder, command = example("new_environment", tmp_path)
    last, samples = last_step(folder, command)
    assert last["step"] == 2 and last["ledger/trained"] == 2 * 64
    assert 0 < last["tokens/trained"] < last["tokens/completion"], "observations were trained, or there were none"
    assert {sample["reward"] for sample in samples} <= {-1.0, 0.0, 1.0}


FEW = ["prompts.prompts_per_step=4", "evaluation.prompts.prompts_per_step=4", "evaluation.reverse_kl_prompts=4"]


@pytest.mark.ray
def test_the_examples_of_methods_train(tmp_path: Path) -> None:
    """The one of two terms as a run; the one of an objective as a plan (its certificate: test_example_methods.py)."""
    folder, (mine, anchored) = examples("new_method", tmp_path)
    run(folder, [*mine, *FEW, "run_name=planned", "dry_run=true"])
    steps = records(run(folder, [*anchored, *FEW, "run_name=anchored", "learner.warmup_steps=0"]) / "metrics.jsonl")
    assert [step["distill/anchor/coefficient"] for step in steps] == [0.5, 0.25]
    assert steps[0]["distill/anchor/reverse_kl"] == pytest.approx(0, abs=1e-4)  # the student is the anchor
    assert 0 < steps[1]["distill/anchor/reverse_kl"] < steps[1]["distill/reverse_kl"]


@pytest.mark.ray
def test_the_example_of_a_score_kind_trains_over_http(tmp_path: Path) -> None:
    """And is planned with a teacher here. Both answer by its definition: unit/teacher_service/test_score_kinds.py."""
    folder, (here, over_http) = examples("new_score_kind", tmp_path)
    run(folder, [*here, *FEW, "run_name=near", "dry_run=true"])
    with teacher_server(folder) as (url, token):
        away = [f"teacher.url={url}" if setting.startswith("teacher.url=") else setting for setting in over_http]
        steps = records(run(folder, [*away, *FEW, "run_name=far"], OPD_TEACHER_TOKEN=token) / "metrics.jsonl")
    assert len(steps) == 2
    for step in steps:
        assert 0 < step["tokens/trained"] < step["tokens/completion"], "the teacher was sure everywhere, or nowhere"
        assert step["actor/grad_norm"] > 0 and step["tokens/scored"] > 0


@contextmanager
def teacher_server(folder: Path) -> Iterator[tuple[str, str]]:
    """The root and the token of the `opd serve-teacher` of the page, given in `folder`."""
    (line,) = re.findall(r"^opd (serve-teacher .*)$", (folder / "README.md").read_text(), flags=re.MULTILINE)
    command = [s for s in shlex.split(line) if not s.startswith("port=")] + ["port=0"]
    token = secrets.token_hex(16)
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "launch.cli", *command], cwd=folder, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OPD_TEACHER_TOKEN": token, "COLUMNS": "200"},
    ) as server:  # fmt: skip
        try:
            assert server.stdout is not None
            said = server.stdout.readline()
            (url,) = re.findall(r"http://127\.0\.0\.1:\d+", said)
            yield url, token
        finally:
            server.terminate()
