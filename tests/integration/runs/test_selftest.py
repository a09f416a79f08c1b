"""`opd selftest` as its user calls it, with runs over every transport that this machine has."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.ray
def test_this_machine_passes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch.cli", "selftest", f"output={tmp_path / 'found.json'}"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=550, check=False)
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert ran.returncode == 0, [row for row in rows if row["outcome"] == "FAIL"]
    outcomes = {(row["check"], row["name"].split(":")[0]): row["outcome"] for row in rows}
    assert outcomes["run", "as planned"] == outcomes["sleep and wake", "teacher"] == "pass"
    assert [outcome for (check, _), outcome in outcomes.items() if check == "sleep and wake"] == ["pass"] * 2
    runs = {row["name"]: row["outcome"] for row in rows if row["check"] == "run"}
    assert len(runs) == 4 and set(runs.values()) <= {"pass", "not here"}
    if not torch.cuda.is_available():
        assert list(runs.values()).count("pass") == 2
