"""What is installed without a checkout works: a wheel is built, unpacked elsewhere and used."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.command import ROOT

RUN = "import sys; from launch.cli.main import main; main(sys.argv[1:])"
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the wheel, and nothing else of the project."""
    folder = tmp_path_factory.mktemp("wheel")
    kept = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, kept.stdout.split("\0")):
        if not name.startswith(("tests/", "docs/", "benchmarks/")) and (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / "source" / name)
    (folder / "wheel").mkdir()
    arguments = [sys.executable, "-c", BUILD, str(folder / "wheel")]
    built = subprocess.run(arguments, cwd=folder / "source", capture_output=True, text=True, timeout=120, check=False)
    assert built.returncode == 0, built.stderr[-2000:]
    (wheel,) = (folder / "wheel").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_every_file_of_conf_and_assets_is_in_it(installed: Path) -> None:
    kept = subprocess.run(
        ["git", "ls-files", "-z", "conf", "assets"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = {name for name in kept.stdout.split("\0") if name and (ROOT / name).is_file()}
    assert len(files) > 50
    assert not {name for name in files if not (installed / "launch" / name).is_file()}


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["train", "--help", "learner.lr"], 0, "learning rate at the end of the warm-up"),
        (["train", "stepz=3"], 2, "did you mean 'steps'"),
        (["train", "experiment=shop", "dry_run=true"], 0, "first prompt:"),
    ],
)
def test_an_installed_wheel_does_what_a_checkout_does(
    arguments: list[str], code: int, says: str, installed: Path, tmp_path: Path
) -> None:
    """In a folder of the user's own, where neither conf/ nor assets/ lies."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stderr[-2000:]
    assert says in " ".join((done.stdout + done.stderr).split()) and "Traceback" not in done.stderr


def test_an_installed_wheel_writes_a_report(installed: Path, tmp_path: Path) -> None:
    """The page needs its templates, which are files of the package and no Python."""
    write = (
        "from pathlib import Path\n"
        "from launch.artifacts.run_directory import RunDirectory\n"
        "from launch.report.report import write_report\n"
        "directory = RunDirectory.create(Path('runs'), 'first')\n"
        "directory.write_config('steps: 20')\n"
        "write_report(directory)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", write],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    page = (tmp_path / "runs" / "first" / "report.html").read_text()
    assert "not evaluated yet" in page and "--surface" in page
