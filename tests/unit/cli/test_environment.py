"""`opd env` says in a line each what the machine has, and names what a run will lack."""

import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from launch.inputs.grading_process import GradingProcess
from launch.plan.environment import (
    OWN_PACKAGES,
    check_folder,
    check_interpreter,
    check_temporary_folder,
    compiler,
    driver,
    headers,
    shared_memory,
)
from opd.errors import ConfigurationError, OpdError
from tests.command import ROOT, opd

NEW = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:10:44 UTC 2025\nGCC version: 12.2.0"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.57.08  Release Build  (dvs-builder)"


def test_one_line_each() -> None:
    done = opd("env")
    assert done.returncode == 0, done.stderr
    for what in ("C compiler: ", "Python.h: ", "/dev/shm: ", "NVIDIA driver: ", " cores, "):
        assert sum(what in line for line in done.stdout.splitlines()) == 1, f"{what} in {done.stdout}"


@pytest.mark.parametrize(("size", "fits"), [(30, True), (39, True), (40, False), (71, False), (90, False)])
def test_a_temporary_folder_that_is_accepted_has_room_for_sockets(size: int, fits: bool) -> None:
    long = "/" + "\N{LATIN SMALL LETTER A WITH DIAERESIS}" * ((size - 1) // 2) + "t" * ((size - 1) % 2)
    session = datetime.now().strftime(f"session_%Y-%m-%d_%H-%M-%S_%f_{2**22}")  # as Ray names it; the greatest PID
    sockets = f"{long}/ray/{session}/sockets/plasma_store"
    assert fits == (len(os.fsencode(sockets)) <= 107)
    for given in ({"TMPDIR": long}, {"TMPDIR": "/tmp", "RAY_TMPDIR": long}):
        if fits:
            check_temporary_folder(given, local=True)
        else:
            with pytest.raises(ConfigurationError, match=rf"TMPDIR needs .* at most 39 bytes.* has {size}; set RAY_T"):
                check_temporary_folder(given, local=True)
    elsewhere = {"TMPDIR": long, "RAY_TMPDIR": "/tmp"}
    if size <= 70:
        check_temporary_folder(elsewhere, local=True)
        check_temporary_folder({"TMPDIR": long}, local=False)
    else:
        with pytest.raises(ConfigurationError, match=r"TMPDIR needs .* at most \d+ bytes.*; set TMPDIR to"):
            check_temporary_folder(elsewhere, local=True)


def test_an_interpreter_in_which_libraries_do_not_work_is_refused() -> None:
    check_interpreter({"PYTHONWARNINGS": "ignore,default::DeprecationWarning"}, 1)
    with pytest.raises(ConfigurationError, match=r"needs its docstrings.*PYTHONOPTIMIZE=2"):
        check_interpreter({}, 2)
    for value in ("error", "ignore,error", "error::FutureWarning"):
        with pytest.raises(ConfigurationError, match=f"PYTHONWARNINGS={value} makes errors of warnings"):
            check_interpreter({"PYTHONWARNINGS": value}, 0)


@pytest.mark.parametrize("encoding", ["utf-8", "UTF8", "utf_8", "ascii", "ANSI_X3.4-1968", "ISO-8859-1", "cp1252"])
def test_texts_are_read_as_utf_8_or_not_at_all(encoding: str) -> None:
    if "8859" in encoding or "utf" not in encoding.lower():
        with pytest.raises(ConfigurationError, match=f"as UTF-8, .* reads them as {encoding} by .*PYTHONUTF8=1"):
            check_interpreter({}, 0, encoding)
    else:
        check_interpreter({}, 0, encoding)


@pytest.mark.parametrize("name", OWN_PACKAGES)
@pytest.mark.parametrize("form", ["{}.py", "{}/__init__.py"])
def test_a_module_that_hides_one_of_ours_is_named(tmp_path: Path, name: str, form: str) -> None:
    file = tmp_path / form.format(name)
    file.parent.mkdir(exist_ok=True)
    file.touch()
    with pytest.raises(
        ConfigurationError, match=rf"has a (package|module) '{name}' of its own \({form.format(name)}\)"
    ):
        check_folder(tmp_path)


def test_folders_that_hide_nothing_are_no_obstacle(tmp_path: Path) -> None:
    for name in (*OWN_PACKAGES, "ours"):
        (tmp_path / name).mkdir()  # without __init__.py
    (tmp_path / "learners.py").touch()
    check_folder(tmp_path)
    check_folder(ROOT)
    for name in OWN_PACKAGES:
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "launch" / "cli").mkdir()
    (tmp_path / "launch" / "cli" / "main.py").touch()
    check_folder(tmp_path)  # another copy of the project


def test_ours_are_all_that_are_installed() -> None:
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks", "scripts"}
    assert found == set(OWN_PACKAGES)


@pytest.mark.parametrize("name", ["launch", "hf"])
def test_a_program_beside_a_module_of_our_name_says_so(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.py").touch()
    program = tmp_path / "mine.py"
    program.write_text("import opd\ntry:\n    opd.plan\nexcept opd.OpdError as error:\n    print(error)\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, program], env=environment, capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path
    )
    assert f"{tmp_path}/{name}.py hides opd's own package '{name}'; rename it" in done.stdout


def test_a_process_that_cannot_be_started_is_not_the_rewards_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refused(*_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("concurrent.futures.process.ProcessPoolExecutor._spawn_process", refused)
    with pytest.raises(OpdError, match=r"cannot be started \(Too many open files\); check the folder"):
        GradingProcess(print).call(print, deadline_s=1.0)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_compiler_and_headers_are_needed_on_gpus(on_gpu: bool, tmp_path: Path) -> None:
    for (line, lacks), what in ((compiler(None, on_gpu), "gcc"), (headers(tmp_path / "Python.h", on_gpu), "-dev")):
        assert "none" in line and bool(lacks) == on_gpu == (what in lacks)
    (tmp_path / "Python.h").touch()
    assert compiler("/usr/bin/cc", on_gpu) == ("C compiler: /usr/bin/cc", "")
    assert headers(tmp_path / "Python.h", on_gpu)[1] == ""


@pytest.mark.parametrize(
    ("gib", "said", "enough"), [(0.0625, "64 MiB", False), (1.5, "1.5", False), (24.0, "24", True)]
)
def test_shared_memory_of_a_container(gib: float, said: str, enough: bool) -> None:
    line, lacks = shared_memory(gib)
    assert said in line and enough == (not lacks) and ("--shm-size" in lacks) == (not enough)


@pytest.mark.parametrize(
    ("text", "device", "visible", "cuda", "line", "lacks"),
    [
        ("", False, 0, "", "none", ""),
        ("", False, 0, "13.0", "none", ""),
        (NEW, True, 1, "13.0", "580.65.06", ""),
        (OPEN, True, 0, "13.0", "575.57.08", "580 or newer"),
        (NEW, True, 0, "", "580.65.06", "pip install"),
        ("", True, 0, "13.0", "none", "CUDA 13.0"),
    ],
)
def test_the_driver(text: str, device: bool, visible: int, cuda: str, line: str, lacks: str) -> None:
    said, lacking = driver(text, device, visible, cuda)
    assert said == f"NVIDIA driver: {line}"
    assert lacks in lacking and bool(lacks) == bool(lacking)
