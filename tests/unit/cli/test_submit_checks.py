"""What `opd submit` refuses before anything is sent, and what it says when it is left."""

import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch.cli import submit as submitting
from launch.cli.main import main
from launch.cli.submit import EXCLUDES, SubmitOptions, check_output, check_size, packed, submit
from opd.errors import ConfigurationError

OUT = "output_dir=/shared/runs"


@pytest.mark.parametrize(
    "given", [[], ["output_dir=runs"], ["output_dir=./x"], ["++output_dir=x"], [OUT, "output_dir=y"]]
)
def test_results_that_nobody_would_find_are_refused(given: list[str]) -> None:
    with pytest.raises(ConfigurationError, match=r"an absolute output_dir=, got '.*e\.g\. output_dir=/shared/runs"):
        check_output(["train", "experiment=shop", *given])


@pytest.mark.parametrize("given", [[OUT], ["output_dir=x", OUT], ["output_dir='/shared/my runs'"]])
def test_a_place_that_stays_is_accepted(given: list[str]) -> None:
    check_output(["train", *given])
    check_output(["eval", "student.path=x"])


def test_the_largest_folders_are_named_and_what_stays_here_does_not_count(tmp_path: Path) -> None:
    for name, size in {
        "models/a.bin": 3000,
        "data/b.bin": 900,
        "c.py": 50,
        "runs/old.bin": 9000,
        "skipped/d": 9000,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / ".gitignore").write_text("skipped/\n")
    with pytest.raises(ConfigurationError, match=r"\(largest: models/ 0 MiB, data/ 0 MiB, .*\).*exclude=models/"):
        check_size(tmp_path, EXCLUDES, most=3900)
    check_size(tmp_path, [*EXCLUDES, "models/"], most=2000)
    check_size(tmp_path, EXCLUDES, most=4500)


def test_a_file_that_vanishes_meanwhile_is_one_sentence(tmp_path: Path) -> None:
    said = pytest.raises(ConfigurationError, match=r"changed while it was read \(.*/theirs is gone\); try again")
    with said, packed(tmp_path):
        (tmp_path / "theirs").stat()
    with pytest.raises(FileNotFoundError), packed(tmp_path / "tree"):
        (tmp_path / "token").read_text()


class Jobs:
    """A cluster's jobs API, on which somebody waits."""

    def __init__(self, address: str) -> None:
        pass

    def submit_job(self, *, entrypoint: str, runtime_env: Any) -> str:
        assert "cluster=existing" in entrypoint and OUT in entrypoint
        assert "models/" in runtime_env["excludes"]
        return "raysubmit_1"

    async def tail_job_logs(self, job: str) -> Any:
        yield "step 1\n"
        raise KeyboardInterrupt


@pytest.mark.parametrize(("follow", "code", "said"), [(True, 130, "goes on"), (False, 0, "ray job logs --follow")])
def test_leaving_a_job_says_that_it_goes_on_and_how_to_end_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, follow: bool, code: int, said: str
) -> None:
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Jobs)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, os.environ.get(name, "x" * 32))
    console = Console(record=True, width=300, file=open(os.devnull, "w"))  # noqa: SIM115
    options = SubmitOptions(address="http://x", working_dir=str(tmp_path), exclude=["models/"], follow=follow)
    assert submit(["train", "experiment=shop", OUT], options, console) == code
    text = console.export_text()
    assert said in text and "ray job stop" in text and "raysubmit_1" in text


def test_the_command_line_reaches_every_option(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(submitting, "submit", lambda command, options, console: seen.append((command, options)) or 0)
    with pytest.raises(SystemExit) as ended:
        main(["submit", "address=http://x", "follow=false", "exclude=models/,data/", "train", "steps=3", OUT])
    assert ended.value.code == 0
    command, options = seen[0]
    assert command == ["train", "steps=3", OUT]
    assert options == SubmitOptions(address="http://x", exclude=["models/", "data/"], follow=False)
    with pytest.raises(SystemExit) as ended:
        main(["submit", "address=http://x", "follow=perhaps", "train"])
    assert ended.value.code == 2
