"""`opd methods`: every method has a line and a composition that is its file's."""

import io
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from launch.cli.main import _dispatch
from launch.cli.methods import list_methods, show_method
from launch.config.shipped_files import first_sentence, option_files
from opd.errors import ConfigurationError

METHODS = option_files()["method"]


def printed(show: str = "", own: str = "") -> str:
    console = Console(file=io.StringIO(), width=700)
    overrides = [f"conf={own}"] if own else []
    assert (show_method(show, overrides, console) if show else list_methods(overrides, console)) == 0
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_every_method_has_a_line_with_its_first_sentence() -> None:
    lines = {line.split()[0]: line for line in printed().splitlines() if line.strip()}
    for name, path in METHODS.items():
        assert first_sentence(path) and first_sentence(path) in lines[name]
        assert "2306.13649" in lines["gkd"]


@pytest.mark.parametrize("name", METHODS)
def test_a_composition_names_every_part_and_setting_of_the_file(name: str) -> None:
    text = printed(show=name)

    def check(node: dict) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                check(value)
            elif key == "_target_":
                module, _, part = value.rpartition(".")
                assert f"{part} ({module})" in text
            elif key != "name":
                assert f"{key}: {value}" in text

    check(yaml.safe_load(METHODS[name].read_text()))


def test_a_sentence_does_not_end_at_the_number_of_an_equation(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("# As published (arXiv 2402.03300 eq. 3), e.g. with two. More.\nname: m\n")
    assert first_sentence(tmp_path / "m.yaml") == "As published (arXiv 2402.03300 eq. 3), e.g. with two"


def test_no_sentence_of_an_option_ends_inside_parentheses() -> None:
    for group, options in option_files().items():
        for name, path in options.items():
            sentence = first_sentence(path)
            assert sentence.count("(") == sentence.count(")"), f"{group}={name}: {sentence}"


def test_what_became_of_a_claim_is_listed_where_a_file_says_it(tmp_path: Path) -> None:
    (tmp_path / "method").mkdir()
    for name, claim in (("a", " Claim shown on locks: 98 %."), ("b", " Claim not testable here."), ("c", "")):
        (tmp_path / "method" / f"{name}.yaml").write_text(f"# Ours.{claim}\nname: {name}\n")
    lines = [line.removesuffix("Ours").split(maxsplit=1) for line in printed(own=str(tmp_path)).splitlines()]
    own = {name: " ".join(rest).strip() for name, *rest in lines[1:] if name in {"a", "b", "c"}}
    assert own == {"a": "shown on locks", "b": "not testable here", "c": ""}


def test_a_method_takes_one_line_of_a_terminal_and_is_whole_in_a_file() -> None:
    for width in (80, 130):
        terminal = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
        list_methods([], terminal)
        lines = [line for line in terminal.file.getvalue().splitlines() if line.split()[0] in METHODS]  # type: ignore[attr-defined]
        assert len(lines) == len(METHODS) and max(map(len, lines)) == width
        assert all(line.startswith(f"{name} ") for name, line in zip(METHODS, lines, strict=True))
        assert any("not tried" in line for line in lines)
    file = Console(file=io.StringIO(), width=80)
    list_methods([], file)
    whole = file.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert whole[: len(METHODS) + 1] == printed().splitlines()[: len(METHODS) + 1]


def test_methods_of_a_users_own_folder_are_listed_and_shown(tmp_path: Path) -> None:
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text(
        "# Ours, [bold]not markup[/bold]. Really.\nrollout:\n  _target_: a.b.C\n"
    )
    assert "Ours, [bold]not markup[/bold]" in printed(own=str(tmp_path))
    assert "rollout: C (a.b)" in printed(show="mine", own=str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["show", "nope"], "there is no method 'nope'; opd methods lists all"),
        (["shw"], "opd methods show NAME one; write it so"),
        (["show"], "opd methods show NAME one; write it so"),
        (["steps=3"], "no setting but conf=DIR, got 'steps=3'; leave it out"),
        (["conf=/nowhere"], "conf=/nowhere is no folder"),
    ],
)
def test_what_it_does_not_take_is_refused(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        _dispatch(["methods", *arguments])
