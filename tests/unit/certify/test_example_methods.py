"""Methods of the examples, certified in a copy of their folder as their pages say; wrong ones are refused."""

import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from opd.ports.score_kinds import BUILT_IN
from teacher_service.known_kinds import known_kinds
from tests.command import ROOT, opd

EXAMPLES = ROOT / "examples"
METHOD = (EXAMPLES / "new_method" / "README.md").read_text()
KIND = (EXAMPLES / "new_score_kind" / "README.md").read_text()
RIGHT, WRONG = "loss=ratio * 0.5 * distance.detach()", "loss=distance"


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A copy of an example's folder, in which the commands that follow are given."""

    def enter(name: str) -> Path:
        folder = Path(shutil.copytree(EXAMPLES / name, tmp_path / name))
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry) != EXAMPLES / name])
        for module in folder.glob("*.py"):
            monkeypatch.delitem(sys.modules, module.stem, raising=False)
        return folder

    monkeypatch.setenv("COLUMNS", "160")
    return enter


def commands(page: str, verb: str) -> list[list[str]]:
    """Every `opd VERB ...` of a page."""
    return [shlex.split(line)[1:] for line in page.replace("\\\n", " ").splitlines() if line.startswith(f"opd {verb} ")]


def table_rows(text: str) -> set[str]:
    """The rows of tables in a text, whatever their width."""
    return {" ".join(line.split()) for line in text.splitlines() if line.startswith("│")}


def test_methods_of_the_examples_are_certified_by_the_commands_of_their_pages(copied: Callable[[str], Path]) -> None:
    copied("new_method")
    mine, anchored = (opd(*command) for command in commands(METHOD, "certify"))
    assert mine.returncode == 0 and "hellinger: certified" in mine.stdout, mine
    assert anchored.returncode == 0 and "anchored_reverse_kl: certified" in anchored.stdout, anchored
    assert (
        "gradient of the sum of the promises" in anchored.stdout and "the sum has a part of anchor" in anchored.stdout
    )
    copied("new_score_kind")
    (done,) = (opd(*command) for command in commands(KIND, "certify"))
    assert done.returncode == 0 and "margin: certified" in done.stdout, done


def test_the_wrong_method_of_the_page_is_refused_in_its_words(copied: Callable[[str], Path]) -> None:
    file, (command, *_) = copied("new_method") / "hellinger.py", commands(METHOD, "certify")
    right = file.read_text()
    assert f"`{WRONG}`" in METHOD and right.count(RIGHT) == 1
    file.write_text(right.replace(RIGHT, WRONG))
    done = opd(*command)
    assert done.returncode == 1 and "hellinger: REFUSED" in done.stdout
    assert len(table_rows(METHOD)) == 3 and table_rows(METHOD) <= table_rows(done.stdout)


def test_a_meaningless_combination_is_refused_in_the_words_of_the_page(copied: Callable[[str], Path]) -> None:
    copied("new_method")
    (setting,) = re.findall(r"`(method\.rollout\._target_=\S+)`", METHOD)
    (sentence,) = re.findall(r"^objective SampledHellinger .*$", METHOD, flags=re.MULTILINE)
    refused = opd(*commands(METHOD, "certify")[0], setting)
    assert refused.returncode == 2 and f"ConfigurationError: {sentence}\n" in refused.stderr


def test_a_kind_that_the_other_side_has_not_named_is_refused_in_the_words_of_the_page(
    copied: Callable[[str], Path],
) -> None:
    copied("new_score_kind")
    (sentence,) = re.findall(r"^method margin asks .*$", KIND, flags=re.MULTILINE)
    _, over_http = commands(KIND, "train")
    refused = opd(*[setting for setting in over_http if "score_kinds" not in setting], "dry_run=true")
    assert refused.returncode == 2 and f"ConfigurationError: {sentence}\n" in refused.stderr


def test_a_kind_is_found_in_the_folder_of_the_command(copied: Callable[[str], Path]) -> None:
    """As a server is started, which builds no other part of the user's."""
    folder = copied("new_score_kind")
    (kind,) = [kind for kind in known_kinds(["margin.Margin"]).values() if kind not in BUILT_IN]
    assert sys.modules[kind.__module__].__file__ == str(folder / "margin.py")


def test_the_page_about_methods_prints_the_example() -> None:
    page = (ROOT / "docs" / "adding_a_method.md").read_text()
    blocks = dict(re.findall(r"```\w+ file=(\S+)\n(.*?)```", page, flags=re.DOTALL))
    files = ("hellinger.py", "my_conf/method/hellinger.yaml")
    assert blocks == {name: (EXAMPLES / "new_method" / name).read_text() for name in files}
    for verb in ("certify", "train"):
        assert commands(page, verb)[0] == commands(METHOD, verb)[0]
