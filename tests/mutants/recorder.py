"""A plugin of pytest: writes how much processor time each test that passed took, setting up and tearing down included.

It imports nothing of the product, whose types are enforced only once `tests/conftest.py` is read.
"""

import json
import os
from pathlib import Path
from time import process_time

import pytest

DURATIONS = "OPD_MUTANTS_DURATIONS"  # the variable that names the file
_began: dict[str, float] = {}
_seconds: dict[str, float] = {}
_failed: set[str] = set()


def pytest_runtest_logstart(nodeid: str) -> None:
    """A test begins."""
    _began[nodeid] = process_time()


def pytest_runtest_logfinish(nodeid: str) -> None:
    """A test is over."""
    _seconds[nodeid] = process_time() - _began[nodeid]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A part of a test has ended."""
    if not report.passed:
        _failed.add(report.nodeid)


def pytest_sessionfinish() -> None:
    """All have ended."""
    passed = {name: seconds for name, seconds in _seconds.items() if name not in _failed}
    Path(os.environ[DURATIONS]).write_text(json.dumps(passed))
