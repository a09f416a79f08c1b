"""The matrix itself: a fault that did not fire is no pass, and the catalog says what the documentation says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fault_matrix import CATALOGUE, NAMES

ROOT = Path(__file__).parents[3]

CONFTEST = """
from tests.fault_matrix import (
    pytest_collection_modifyitems, pytest_runtest_logreport, pytest_runtest_makereport, pytest_runtest_protocol,
    pytest_sessionfinish, pytest_terminal_summary, witness,
)
"""
CASES = """
import pytest

@pytest.mark.faults("engine killed")
def test_fires(witness):
    witness("engine killed", 3)

@pytest.mark.faults("teacher killed", "engine killed")
def test_fires_by_half(witness):
    witness("engine killed")

@pytest.mark.faults("slow engine")
def test_breaks(witness):
    witness("slow engine")
    assert False
"""


def run(folder: Path, cases: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest on a folder of its own, with these hooks."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_cases.py").write_text(cases)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = faults: x\ntestpaths = .\npythonpath = " + str(ROOT))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("processes", ["0", "2"])
def test_what_did_not_fire_has_not_passed(processes: str, tmp_path: Path) -> None:
    """In one process, and in two that know a part each."""
    done = run(tmp_path, CASES, "-n", processes)
    assert "2 failed, 1 passed" in done.stdout, done.stdout
    assert "no witness of ['teacher killed']: the fault did not fire" in done.stdout
    rows = {
        m[1]: (int(m[2]), int(m[3]), m[4])
        for m in re.finditer(r"^(\w+ \w+) .* (\d+) +(\d+)  (\w+)$", done.stdout, re.M)
    }
    assert rows == {
        "engine killed": (2, 4, "BROKEN"),
        "teacher killed": (1, 0, "BROKEN"),
        "slow engine": (1, 1, "BROKEN"),
    }


def test_the_whole_matrix_needs_every_kind(tmp_path: Path) -> None:
    one = CASES.split("@pytest", 2)
    good = one[0] + "@pytest" + one[1]
    assert run(tmp_path, good).returncode == 0, "a part may be tried alone"
    whole = run(tmp_path, good, "-m", "faults")
    assert whole.returncode == 1 and "1 passed" in whole.stdout, whole.stdout
    assert whole.stdout.count("NOT RUN") == len(CATALOGUE) - 1
    assert f"1 of {len(CATALOGUE)} kinds held, 3 faults fired" in whole.stdout


def test_a_kind_that_is_in_no_catalog_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, CASES.replace("slow engine", "slow motor"))
    assert done.returncode == 4 and "declares ['slow motor']" in done.stderr + done.stdout


def test_the_documentation_has_every_kind() -> None:
    assert len(NAMES) == len(CATALOGUE) >= 25
    text = (ROOT / "docs" / "reliability.md").read_text()
    documented = [
        tuple(cell.strip() for cell in row.split("|")[1:5]) for row in text.splitlines() if row.count("|") == 6
    ]
    rows = [row for row in documented if row[0] in NAMES]
    assert rows == [(kind.name, kind.role, kind.how, kind.state) for kind in CATALOGUE]
