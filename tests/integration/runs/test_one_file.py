"""The loop in one file: with tables it reaches the teacher, and with the real parts the same lines train the demo."""

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[3] / "examples" / "one_file_opd.py"


def test_a_table_learns_its_teacher() -> None:
    spec = spec_from_file_location("one_file_opd", FILE)
    assert spec is not None and spec.loader is not None
    example = sys.modules["one_file_opd"] = module_from_spec(spec)  # where dataclasses look for the module of a class
    spec.loader.exec_module(example)
    before, after = example.with_fakes(30)
    assert after < before / 3


@pytest.mark.ray
def test_the_real_parts_train_by_the_same_lines() -> None:
    done = subprocess.run([sys.executable, str(FILE), "real"], cwd=FILE.parents[1], capture_output=True, text=True,
                          timeout=550, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 1", "step 2", "step 3"]
    assert all(float(line.rpartition(" ")[2]) > 0 for line in lines), "the reverse KL of a student that is no teacher"
