"""`python -m benchmarks.NAME ...`, in this process or in one of its own."""

import io
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stdout

import pytest

from learner.config import environment
from opd.settings.devices import Device
from tests.command import ROOT


def here(module: str, *arguments: str) -> str:
    """What the command prints, run in this process, which saves the seconds that a new one needs to import torch."""
    with redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *arguments])
        runpy.run_module(module, run_name="__main__")
    return printed.getvalue()


def apart(module: str, *arguments: str, learners: bool = True) -> str:
    """What the command prints, run in a process of its own, for commands that change theirs.

    It has a learner's environment from the start, without which most of these commands start themselves again; those
    that start actors go without (`learners=False`).
    """
    own = environment(Device.GPU) | environment(Device.CPU) if learners else {}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ | own | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    return done.stdout
