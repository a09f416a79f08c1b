"""Wrong things where a user names one: each ends in a sentence that repeats it and says what to do."""

import json

import pytest

from launch.cli.certify import certify_methods
from opd.errors import ConfigurationError
from tests.command import opd
from tests.fuzz.first_contact import World, fault_of, pairs

STRIDE = 97  # of the pairs; coprime to the number of things, so that every place and every thing has its turn


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """One of each kind of thing."""
    return World.made(tmp_path_factory.mktemp("world"))


def test_a_slice_of_the_fuzz(world: World) -> None:
    """`python -m tests.fuzz.first_contact` is the whole."""
    faults = {name: fault for _, name, attempt in list(pairs(world))[::STRIDE] if (fault := attempt())}
    assert not faults, json.dumps(faults, indent=1)


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        ("teacher.path='nope' is no folder; give one", ""),
        ("teacher.path='nope' is no folder", "does not say what to do"),
        ("that is no folder; give one", "does not repeat what was given"),
        ("'no... (70 characters) is no folder; give one", ""),
        ("'yes... (70 characters) is no folder; give one", "does not repeat what was given"),
        ("'nope' fails ([Errno 2]); give one", "repeats a program's error (Errno)"),
        ("nope: needs a list, got NoneType; give one", "repeats a program's error (NoneType)"),
        ("", "says nothing"),
    ],
)
def test_the_fuzz_sees_what_a_sentence_lacks(said: str, fault: str) -> None:
    assert fault_of(said, "nope") == fault


def test_a_folder_that_has_nothing_for_the_command_is_refused(world: World) -> None:
    """`conf=/` was read to its last file, and `opd certify` of no method passed."""
    assert "has no folder of options" in opd("methods", "conf=/").stderr
    own = world.root / "own"
    (own / "experiment").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match=r"has no method to certify; add one"):
        certify_methods([f"conf={own}"], "", None)  # type: ignore[arg-type]
