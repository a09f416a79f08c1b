"""A self-test tells right from wrong, and one check that fails or hangs is a row and not the end of the others."""

import json
import math
import os
from pathlib import Path
from time import monotonic

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launch.checkpoint.places import check_writable
from launch.cli.main import main
from launch.cli.selftest.arithmetic import LIMITS, error_of, loss_kernels
from launch.cli.selftest.machine import _unmet, _write, packages
from launch.cli.selftest.programs import in_process, rows_of
from launch.cli.selftest.rows import Outcome, Row, dumped, loaded, verdict
from opd.errors import DataError
from opd.loss.chunked import StudentLogits
from opd.objectives.vocabulary import FullForwardKL, FullReverseKL
from opd.types import Batch, TokenLoss, VocabularyScores

TEXT = st.text(max_size=12)
ROWS = st.builds(
    Row, check=TEXT, name=TEXT, outcome=st.sampled_from(Outcome), figure=TEXT, limit=TEXT, said=TEXT
)  # fmt: skip


@given(st.lists(ROWS, max_size=4))
def test_rows_come_back_as_they_were_written(rows: list[Row]) -> None:
    assert loaded(dumped(rows)) == rows


@pytest.mark.parametrize("text", ["", "[1]", '[{"check": "a"}]', '[{"check": "a", "name": "b", "outcome": "well"}]'])
def test_other_text_is_no_rows(text: str) -> None:
    with pytest.raises(DataError, match="run opd selftest again"):
        loaded(text)


@given(st.floats(), st.floats(allow_nan=False))
def test_a_figure_passes_if_it_is_a_number_within_its_limit(found: float, limit: float) -> None:
    passes = Row.at_most("a", "b", found, limit).outcome is Outcome.PASS
    assert passes == (not math.isnan(found) and found <= limit)


def test_the_verdict_counts_every_outcome() -> None:
    rows = [Row(check="a", name="b", outcome=o) for o in (Outcome.PASS, Outcome.PASS, Outcome.FAIL, Outcome.NOT_HERE)]
    assert verdict(rows) == "self-test: 2 pass, 1 FAIL, 1 not here"


def test_what_a_project_needs_and_has_not_is_named() -> None:
    asked = ["torch>=1", "torch<1", "no-such-package>=2", 'no-such-package; extra == "gpu"']
    assert list(_unmet(asked)) == [("torch", torch.__version__, "<1"), ("no-such-package", "missing", ">=2")]
    assert [row.outcome for row in packages()] == [Outcome.PASS]


def test_loss_kernels_pass_and_a_wrong_one_would_not() -> None:
    assert {row.outcome for row in loss_kernels()} <= {Outcome.PASS, Outcome.NOT_HERE}

    class Scaled(FullReverseKL):
        def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> TokenLoss:
            found = FullReverseKL.__call__(self, student, batch)
            return TokenLoss(loss=found.loss * 1.001, metrics={})

    for wrong in (Scaled(), FullForwardKL()):
        assert error_of(wrong, FullReverseKL(), torch.float32, "cpu") > 10 * LIMITS[torch.float32]


def test_a_process_that_hangs_is_ended_and_one_that_fails_says_why() -> None:
    began = monotonic()
    for seconds in (1.0, 60.0):  # the second one where a Python needs longer to say anything
        hung = in_process(["-c", "import time; print('here', flush=True); time.sleep(600)"], seconds)
        assert hung.code is None and monotonic() - began < 200
        if hung.why == "here":
            break
    else:
        pytest.fail(f"it said {hung.why!r}")
    failed = in_process(["-c", "print('error: a sentence'); print('more'); raise SystemExit(3)"], 120.0)
    assert (failed.code, failed.why) == (3, "error: a sentence")
    assert in_process(["-c", "pass"], 120.0).why == "it said nothing"


def test_a_program_that_is_none_is_a_failure_with_its_reason(tmp_path: Path) -> None:
    (row,) = rows_of("nothing", tmp_path, 60.0)
    assert row.outcome is Outcome.FAIL and "KeyError" in row.said


def test_arguments_that_mean_nothing_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for wrong, said in (
        ("only=speed,lost", "no check 'lost'; only=... takes packages, devices"),
        ("lost=1", "got 'lost=1'"),
        (f"output={tmp_path}", "is a folder; name another"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["selftest", wrong])
        assert ended.value.code == 2 and said in " ".join(capsys.readouterr().err.split())


def test_the_file_has_what_a_bug_report_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["selftest", "only=packages,learner_bfloat16", f"output={tmp_path / 'found.json'}"])
    assert ended.value.code == 0 and "self-test: " in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["packages"]["torch"] == torch.__version__ and found["verdict"].startswith("self-test: ")
    assert [row["check"] for row in found["rows"]] == [
        "packages",
        *(6 if torch.cuda.is_available() else 3) * ["learner"],
    ]


def test_disks_are_measured_without_a_file_that_others_could_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(os, "fsync", lambda number: seen.append(os.listdir(tmp_path)))
    _write(tmp_path)()
    check_writable(tmp_path / "runs")
    assert seen == [[]] and not os.listdir(tmp_path)
