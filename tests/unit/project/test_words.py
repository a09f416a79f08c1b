"""Words of code and pages: first lines of docstrings are noun phrases, and private words have a standard term."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# Folders whose words are the field's: all of the product.
ROOMS = [
    *("actors", "benchmarks", "demos", "hf", "launch", "learner", "opd", "scripts", "teacher_service", "weight_sync"),
    "examples",
]
PAGES = ["docs", "README.md", "CONTRIBUTING.md", "docker/README.md", "Makefile"]
HISTORY = ["docs/log.md"]  # tells of other days, in their words

# A private word, and the field's term for it.
BANNED = {
    r"testimon(y|ies)": "scores, log-probabilities",
    r"(any|every|some|no)body": "a model, process or caller, by its name",
    r"whoever": "the caller, the receiver, ...",
    r"patients?": "subject",
    r"strikes?": "consecutive failures",
    r"journal": "replay log",
    r"alarms?": "alert",
    r"lied": "invalid answer",
    r"outlets?": "sender",
    r"shel(f|ves)": "sender",
    r"receipts?": "acknowledgement",
    r"strangers?": "other teachers, unrelated models",
    r"limit model": "roofline",
    r"written tokens?": "sampled token",
}
BRITISH = {
    r"utilis\w+": "utilization",
    r"optimis\w+": "optimizer",
    r"normalis\w+": "normalizer",
    r"behaviours?": "behavior",
    r"colour\w*": "color",
    r"learnt": "learned",
    r"spoilt": "broken",
}
# Old names that a program or a page must still know.
ALLOWED = {
    "launch/artifacts/old_names.py": {"strikes", "journal"},
}
# A first line that begins so is a riddle or a question, and no noun phrase.
OPENINGS = {
    *(
        "Who",
        "Whose",
        "What",
        "Whatever",
        "Where",
        "How",
        "When",
        "Which",
        "Why",
        "Is",
        "Are",
        "Was",
        "Does",
        "Do",
        "Did",
    ),
    *("May", "Can", "Has", "Have", "Must", "Should", "Will", "Whoever"),
}
PRIVATE = r"who|whom|nobody|anybody|somebody|everybody|whoever|testimony|said|says|told|tells|asked|lies|dies|lives"


def product() -> Iterator[tuple[str, str]]:
    """(path from the root, text) of every Python file whose words are the field's."""
    rooms = [ROOT / room for room in ROOMS]
    for path in sorted(path for room in rooms for path in (room.rglob("*.py") if room.is_dir() else [room])):
        yield str(path.relative_to(ROOT)), path.read_text()


def pages() -> Iterator[tuple[str, str]]:
    """The same of every page."""
    files = [f for page in PAGES for f in ((ROOT / page).rglob("*.md") if (ROOT / page).is_dir() else [ROOT / page])]
    for path in sorted(files):
        if (name := str(path.relative_to(ROOT))) not in HISTORY:
            yield name, path.read_text()


def first_lines(text: str) -> Iterator[tuple[int, str]]:
    """Line number and first line of every docstring."""
    for node in ast.walk(ast.parse(text)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and (docstring := ast.get_docstring(node)):
            yield node.body[0].lineno, docstring.splitlines()[0]


def riddle(line: str) -> bool:
    """Whether a first line asks instead of saying what the thing is, or says it in private words."""
    return line.split()[0].strip("`,.:") in OPENINGS or line.rstrip().endswith("?") or bool(_private(line))


def _private(line: str) -> re.Match[str] | None:
    return re.search(rf"\b(?:{PRIVATE})\b", re.sub(r"`[^`]*`", "", line), re.I)


def private_words(name: str, text: str) -> list[str]:
    """A sentence for every private word and British spelling in a file."""
    return [
        f"{name}:{text.count(chr(10), 0, found.start()) + 1}: {found.group()!r}; the field says {term}"
        for word, term in (BANNED | BRITISH).items()
        for found in re.finditer(rf"\b(?:{word})\b", text, re.I)
        if found.group().lower() not in ALLOWED.get(name, set())
    ]


def test_every_room_has_a_file_that_is_read() -> None:
    read = [name for name, _ in product()]
    assert [room for room in ROOMS if not any(f"{name}/".startswith(f"{room}/") for name in read)] == []


def test_first_lines_of_docstrings_say_what_the_thing_is() -> None:
    found = [
        f"{name}:{number}: {line}" for name, text in product() for number, line in first_lines(text) if riddle(line)
    ]
    assert not found, "\n".join(found)


def test_code_has_the_words_of_the_field() -> None:
    found = [sentence for name, text in product() for sentence in private_words(name, text)]
    assert not found, "\n".join(found)


def test_pages_have_the_words_of_the_field() -> None:
    found = [sentence for name, text in pages() for sentence in private_words(name, text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "Who is told of finished steps.",
        "Is one of them bfloat16?",
        "What a teacher said.",
        "Engines, and who asks them.",
    ],
)
def test_a_riddle_is_noticed(line: str) -> None:
    assert riddle(line)


@pytest.mark.parametrize(
    "line", ["Retry policy of a pool of replicas.", "Whether a bracket is closed.", "Write `said`."]
)
def test_a_noun_phrase_passes(line: str) -> None:
    assert not riddle(line)


@pytest.mark.parametrize(
    "text", ["# nobody waits", "the Testimony of a model", "behaviour", "colours", "a tail\nlimit model"]
)
def test_a_private_word_is_noticed(text: str) -> None:
    assert len(private_words("a.py", text)) == 1


def test_american_words_pass() -> None:
    assert not private_words("a.py", "behavior, color, normalizer, utilization, cancelled, an optimizer's patience")
