"""A plugin of pytest: writes how much processor time each test that passed took, setting up and tearing down included.

It also bounds the examples of property tests: a fault that is noticed is noticed by one of the first, as a rule.

It imports nothing of the product, whose types are enforced only once `tests/conftest.py` is read.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from time import process_time
from typing import Any

import pytest

DURATIONS = "OPD_MUTANTS_DURATIONS"  # the variable that names the file
_began: dict[str, float] = {}
_seconds: dict[str, float] = {}
_failed: set[str] = set()


def bound_examples(items: Iterable[Any], most: int = 100) -> None:
    """Let Hypothesis try at most so many examples of each test, and make none that fails smaller."""
    from hypothesis import Phase, settings

    def fewer(old: settings) -> settings:
        return settings(old, max_examples=min(old.max_examples, most), phases=(Phase.explicit, Phase.generate))

    for item in items:
        function = getattr(item, "obj", None)
        function = getattr(function, "__func__", function)
        if hasattr(function, "_hypothesis_internal_use_settings"):
            function._hypothesis_internal_use_settings = fewer(function._hypothesis_internal_use_settings)
        case = getattr(item, "cls", None)  # of a state machine
        if isinstance(getattr(case, "settings", None), settings) and case.settings.max_examples > most:
            case.settings = fewer(case.settings)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests are known."""
    bound_examples(items)


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
