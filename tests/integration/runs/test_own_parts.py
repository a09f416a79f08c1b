"""The examples of a reward and an environment of one's own, run as their pages say, in a folder outside the project."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
SMALL = ["steps=2", "run_name=mine", "doctor=false", "tracker=none", "evaluation.teacher=false"]


def last_step(folder: Path, command: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The metrics of the last step and the samples, of `opd <command>` given in `folder`."""
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *command, *SMALL], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    metrics, samples = ((folder / "runs" / "mine" / f"{name}.jsonl").read_text() for name in ("metrics", "samples"))
    summary = json.loads((folder / "runs" / "mine" / "summary.json").read_text())
    assert not [alert for alert in summary["alerts"] if alert.startswith(("graders", "environments"))]
    return json.loads(metrics.splitlines()[-1]), [json.loads(line) for line in samples.splitlines()]


def example(name: str, to: Path) -> tuple[Path, list[str]]:
    """A copy of the example's folder, and the first command of its page."""
    folder = Path(shutil.copytree(ROOT / "examples" / name, to / name))
    (command, *_) = re.findall(r"```\nopd (.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    return folder, command.replace("\\\n", " ").split()


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
