"""No process is left behind after a failure (after Ctrl-C: test_faults.py)."""

import json
import os
from pathlib import Path

import pytest

from tests.command import ROOT
from tests.processes import nobody_is_left, start


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_failing_run_says_why_and_leaves_no_process(tmp_path: Path) -> None:
    """A loss that is no number: the learner's sentence reaches the user, and everything is closed."""
    mark = f"fail-{os.getpid()}"
    spoilt = ["method.objective._target_=tests.spoilt.NotFinite", "allow_targets=[tests]"]
    driver = start(mark, tmp_path, "evaluation.teacher=false", "doctor=false", *spoilt, PYTHONPATH=str(ROOT))
    output, _ = driver.communicate(timeout=400)
    assert driver.returncode == 1, output
    assert "error:" in output and "Traceback" not in output, output
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["outcome"] == "failed" and summary["error"]
    nobody_is_left(mark)
