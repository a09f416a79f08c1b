"""Imports without garbage collection, which goes on after them as it was."""

import gc
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from opd.heavy_imports import uncollected


def _fails_to_import() -> None:
    with uncollected():
        assert not gc.isenabled()
        raise ImportError


@pytest.mark.parametrize("on", [True, False])
def test_nothing_is_collected_inside_and_all_is_as_before_afterwards(on: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if on else gc.disable)()
        with pytest.raises(ImportError):
            _fails_to_import()
        assert gc.isenabled() == on
    finally:
        (gc.enable if before else gc.disable)()


def test_what_was_imported_is_not_looked_through_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "opd_new_module.py").write_text("MADE = [[]]\n")
    gc.unfreeze()
    try:
        with uncollected():
            importlib.import_module("opd_new_module")
        made = sys.modules["opd_new_module"].MADE
        assert gc.get_freeze_count() > 0 and not any(one is made for one in gc.get_objects())
        gc.unfreeze()
        with uncollected():
            importlib.import_module("opd_new_module")
        assert gc.get_freeze_count() == 0, "nothing was imported"
    finally:
        gc.unfreeze()
        sys.modules.pop("opd_new_module", None)


def test_a_command_ends_without_looking_through_what_it_imported() -> None:
    """Handlers of Python's end that were there before it run after it, and see that everything is frozen."""
    script = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 0, len(gc.get_objects()) < 100))"
    script += "; from launch.cli.main import main; main(['--version'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "True True"
