"""Commands in the pages are commands: every verb, option and setting that they name exists, and whatever can be planned
with what is shipped is planned.

Those of README's first steps, of examples, of the hub and of docs/python.md have tests of their own, runs among them.
"""

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml

from launch.cli.flags import without_methods
from launch.cli.help import USAGE, _page
from launch.config.composition.compose import _keys
from launch.config.shipped_files import groups
from tests.command import ROOT, opd

OF_OTHER_DAYS = ("docs/log.md", "CHANGELOG.md")
VERBS = {line.split()[1] for line in USAGE.splitlines() if line.startswith("  opd ")}
BLOCK = re.compile(r"^```(?:sh|bash|console)?\n(.*?)^```", re.S | re.M)
INLINE = re.compile(r"`(opd [^`]+)`")
FREE = ("graders.", "environments.", "teachers.", "comparison", "hydra", "validation.", "data")
# Words that stand for what a reader has; a value of these is not looked at.
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*\b|\.\.\.")


def pages() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "*.md"], cwd=ROOT, capture_output=True)
    return [page for page in listed.stdout.decode().split() if page not in OF_OTHER_DAYS and (ROOT / page).is_file()]


def commands(page: str) -> Iterator[list[str]]:
    """Words of every command of ours in a page, without what stands before or after it."""
    text = (ROOT / page).read_text()
    lines = [line for block in BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    found = [line.strip().removeprefix(".venv/bin/") for line in lines]
    for line in [
        *(one for one in found if one.startswith("opd ")),
        *(" ".join(i.split()) for i in INLINE.findall(text)),
    ]:
        words = shlex.split(line.replace("$'", "'"), comments=True)
        yield words[1 : words.index("|")] if "|" in words else words[1:]


def wrong(words: Sequence[str], page: str) -> str:
    """What of a command does not exist; "" if all of it does."""
    verb = words[0]
    if verb not in VERBS:
        return f"the verb {verb}"
    own = {"conf", *re.findall(r"\b([a-z_]+)=", _page(verb))} if verb != "train" else {"conf"}
    own |= {"student"} if verb == "export" else set()  # the tokenizer's folder, if the run's has gone
    if verb == "submit" and (inner := [i for i, word in enumerate(words) if word in VERBS - {"submit"}]):
        return wrong(words[inner[0] :], page)
    overrides = [word for word in words[1:] if "=" in word and not word.startswith(("-", "["))]
    overrides = [word for word in overrides if "/" not in word.partition("=")[0]]  # which is the name of a run
    overrides = without_methods(overrides) if verb == "compare" else overrides
    overrides = [re.sub(r"^stages\.\w+\.", "", word) for word in overrides if not word.startswith("stages=")]
    overrides = [word for word in overrides if word.partition("=")[0] not in own]
    return _unknown([word.lstrip("+~") for word in overrides], _folder(words, page))


def _folder(words: Sequence[str], page: str) -> str | None:
    """Folder of options that a command names; "" without one, None if it is a reader's."""
    given = next((word.removeprefix("conf=") for word in words if word.startswith("conf=")), "")
    places = [ROOT / given, (ROOT / page).parent / given]
    return next((str(place) for place in places if place.is_dir()), None) if given else ""


def _unknown(overrides: Sequence[str], own: str | None) -> str:
    known = groups(own or "")
    chosen, settings = list[str](), list[str]()
    for word in overrides:
        key, _, value = word.partition("=")
        if key not in known or value.startswith(("{", "[")) or PLACEHOLDER.match(value) or value == "null":
            settings.append(word)
        elif value in known[key]:
            chosen.append(word)
        elif own is not None:
            return word
    if own is None and any(word.partition("=")[0] in known for word in overrides):
        return ""  # an option of the reader's may bring settings of its own
    names = {key.name for key in _keys(own or "", tuple(chosen))}
    exchanged = [word.partition("._target_")[0] for word in settings if "._target_" in word]
    for word in settings:
        key = word.partition("=")[0]
        parents = {key.rsplit(".", n)[0] for n in range(1, key.count(".") + 1)}
        inside = bool(parents & names) or any(name.startswith(f"{key}.") for name in names)
        part = "_target_" in key or any(key.startswith(place) for place in exchanged)
        if not (key in names or inside or part or key.startswith(FREE) or PLACEHOLDER.search(key) or key in known):
            return key
    return ""


@pytest.mark.parametrize("page", pages())
def test_every_command_of_a_page_exists(page: str) -> None:
    found = {" ".join(words): wrong(words, page) for words in commands(page) if words}
    assert not {command: what for command, what in found.items() if what}


ELSEWHERE = ("published/", "one_gpu", "compare", "methods", "maths")
"""Experiments that other tests plan: with a hub's stand-in, or several runs of them."""
OF_READERS = (
    "resume=",
    "conf=",
    "student.path=/",
    "student.path=Q",
    "prompts.path=",
    "graders.",
    "student.path=FOLDER",
)
"""Beginnings of words that need what a reader has."""


def plannable() -> Iterator[tuple[str, ...]]:
    """Trainings of the pages that need nothing but what is shipped, each once."""
    found = {tuple(words[1:]) for page in pages() for words in commands(page) if words[:1] == ["train"] and words[1:]}
    for words in sorted(found):
        experiment = next((word.partition("=")[2] for word in words if word.startswith("experiment=")), "")
        flags = [word for word in words if word.startswith("-") or "=" not in word]
        open_ = [word for word in words if re.fullmatch(r"[A-Z]|NAME|LR|SEED|\.\.\.", word.partition("=")[2])]
        readers = [word for word in words if word.startswith(OF_READERS)]
        if not (experiment.startswith(ELSEWHERE) or flags or open_ or readers):
            yield words


@pytest.mark.parametrize("words", list(plannable()), ids=" ".join)
def test_a_command_that_needs_nothing_else_is_planned(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = opd("train", *words, "dry_run=true", "tracker=none")
    assert done.returncode == 0 and "first prompt" in done.stdout, done.stderr


def test_many_commands_are_planned() -> None:
    assert len(list(plannable())) >= 25


@pytest.mark.parametrize("page", pages())
def test_code_and_yaml_of_a_page_can_be_read(page: str) -> None:
    """Blocks that stand alone; those of docs/python.md and of the examples are run elsewhere, too."""
    for kind, block in re.findall(r"^```(python|yaml)[^\n]*\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M):
        if kind == "yaml":
            yaml.safe_load(block)
        else:
            ast.parse(block)


@pytest.mark.parametrize(
    ("words", "page", "heading"),
    [
        ("a reward", "docs/grading.md", "## A reward of your own"),
        ("what `max_staleness` does", "docs/pipeline.md", "| `max_staleness` |"),
        ("the KL does not fall", "docs/pitfalls.md", "## The KL does not fall"),
    ],
)
def test_the_first_page_leads_to_what_is_asked_first(words: str, page: str, heading: str) -> None:
    (line,) = [line for line in (ROOT / "README.md").read_text().splitlines() if words in line and line.startswith("|")]
    assert f"]({page}" in line and heading in (ROOT / page).read_text()


def test_the_check_tells_right_from_wrong() -> None:
    right = [
        "train experiment=shop learner.lr=1e-3",
        "compare methods=[a,b] gkd.steps=9",
        "submit address=A train steps=3",
    ]
    right += ["train prompts=dataset prompts.template_kwargs.enable_thinking=false", "runs delete A yes=true"]
    assert not [wrong(shlex.split(line), "README.md") for line in right if wrong(shlex.split(line), "README.md")]
    for line in ("trian steps=3", "train learner.lrr=1", "train method=no_such", "train prompts.path=x", "export nn=1"):
        assert wrong(shlex.split(line), "README.md"), line
    assert sum(len(list(commands(page))) for page in pages()) > 100
