"""`opd compare` on real parts: runs end by their budget, are evaluated at its parts, and are compared only once."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.artifacts.run_directory import RunDirectory, append_json
from launch.artifacts.spending import Unit, spending
from launch.cli.compare import shared_runs
from tests.command import opd
from tests.integration.runs.test_train import lines
from tests.unit.monitors.test_report import step_line

pytestmark = pytest.mark.timeout(600)
AMOUNT = 3000  # tokens; a step of 8 prompts generates some 400 and learns some 600


def with_pilots_of_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pilots are stand-ins, whose steps cost so little that too many steps are planned; all else is real."""
    real = shared_runs.run_once

    def once(root: Path, plan: Any, console: Any) -> Path | None:
        name = plan.config.run_name
        if "_pilot" not in name:
            return real(root, plan, console)
        if not (root / name).exists():
            directory = RunDirectory.create(root, name)
            directory.write_config(plan.config.text)
            for step in (1, 2):
                append_json(
                    directory.metrics, step_line(step, **{"tokens/generated": 50.0, "tokens/learned": 250.0 * step})
                )
        return root / name

    monkeypatch.setattr(shared_runs, "run_once", once)


@pytest.mark.ray
def test_two_methods_at_one_budget_of_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_pilots_of_paper(monkeypatch)
    command = [
        "methods=[full_reverse_kl,sft]", "experiment=shop", "rates=[1]", "seeds=1", "budget=tokens", f"amount={AMOUNT}",
        "evaluations=2", "prompts.prompts_per_step=8", "evaluation.prompts.prompts_per_step=16",
        "evaluation.reverse_kl_prompts=8", "evaluation.samples=1", f"output_dir={tmp_path}", "run_name=x",
    ]  # fmt: skip
    done = opd("compare", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    root = tmp_path / "x"
    for arm in ("full_reverse_kl", "sft"):
        run = root / f"{arm}-seed0"
        spent = [spending(line, Unit.TOKENS) for line in lines(run / "metrics.jsonl")]
        assert spent[-1] >= AMOUNT > spent[-2], "the first step that reaches it is the last"
        summary = json.loads((run / "summary.json").read_text())
        assert (summary["outcome"], summary["steps"]) == ("finished", len(spent)) and len(spent) < 14
        half = next(step for step, tokens in enumerate(spent, 1) if tokens >= AMOUNT / 2)
        assert [point["step"] for point in lines(run / "evaluations.jsonl")] == [0, half, len(spent)]
        assert (run / "checkpoints" / f"step_{len(spent)}").is_dir() and (run / "export" / "config.json").exists()
    said = json.loads((root / "comparison.json").read_text())
    assert said["budget"] == {"unit": "tokens", "amount": AMOUNT} and len(said["runs"]) == 2
    assert "planned with 14 steps" in (root / "comparison.md").read_text()

    written = {path: path.stat().st_mtime_ns for path in root.glob("*-seed0/summary.json")}
    again = opd("compare", *command, "resume=true")
    assert again.returncode == 0 and written == {path: path.stat().st_mtime_ns for path in written}
    assert "Cost of reaching" in again.stdout
