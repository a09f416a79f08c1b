"""Configurations and splits as `datasets` finds them, and sentences that list what there is."""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath

import pytest
import yaml
from datasets.data_files import _get_data_files_patterns, _is_inside_unrequested_special_dir
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from hf.hub.ids import HubId, Kind, hub_id
from hf.hub.layout import choose, configurations
from opd.errors import ConfigurationError, DataError

READ = (".jsonl", ".parquet", ".json", ".csv", ".gz")
GSM8K = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: socratic
  data_files:
  - split: train
    path: socratic/train-*
---
# GSM8K
"""
GSM8K_FILES = [
    "README.md",
    "main/train-00000-of-00001.parquet",
    "main/test-00000-of-00001.parquet",
    "socratic/train-00000-of-00001.parquet",
]


def name(text: str) -> HubId:
    found = hub_id(Kind.DATA, text)
    assert found is not None
    return found


def refusal(text: str, files: list[str], readme: str = "") -> str:
    with pytest.raises(ConfigurationError) as caught:
        choose(name(text), configurations(files, readme, "the data set"), "prompts.path", READ)
    return str(caught.value)


def test_the_readme_says_which_files_are_which() -> None:
    found = configurations(GSM8K_FILES, GSM8K, "the data set")
    assert found == {
        "main": {"train": (GSM8K_FILES[1],), "test": (GSM8K_FILES[2],)},
        "socratic": {"train": (GSM8K_FILES[3],)},
    }
    chosen = choose(name("openai/gsm8k:main:train"), found, "prompts.path", READ)
    assert chosen.files == (GSM8K_FILES[1],) and str(chosen.name) == "openai/gsm8k:main:train"
    assert str(choose(name("openai/gsm8k:socratic"), found, "k", READ).name) == "openai/gsm8k:socratic:train"


def test_one_of_several_is_never_chosen_silently() -> None:
    for text, wanted in (
        (
            "openai/gsm8k",
            "has several configurations (configurations: main, socratic); write prompts.path=openai/gsm8k:main:train",
        ),
        ("openai/gsm8k:main", "has several splits (splits: train, test); write prompts.path=openai/gsm8k:main:train"),
        ("openai/gsm8k:mian:train", "has no configuration 'mian' (configurations: main, socratic)"),
        (
            "openai/gsm8k:main:dev@main",
            "has no split 'dev' (splits: train, test); write prompts.path=openai/gsm8k:main:train@main",
        ),
    ):
        assert wanted in refusal(text, GSM8K_FILES, GSM8K)


def test_a_single_word_may_be_the_split_of_the_only_configuration() -> None:
    files = [
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "data/test-00000-of-00001.parquet",
    ]
    found = configurations(files, "", "the data set")
    assert choose(name("a/b:train"), found, "k", READ).files == tuple(files[:2])
    assert "splits: train, test" in refusal("a/b", files) and "has no configuration 'dev'" in refusal("a/b:dev", files)
    assert "has no data files" in refusal("a/b", ["README.md", ".gitattributes", "loader.py"])
    assert "'train.zip', which is of no format" in refusal("a/b", ["train.zip"])
    assert "@refs/convert/parquet" in refusal("a/b", ["train.zip"])


def test_the_hubs_own_copy_has_a_folder_for_each_configuration_and_split() -> None:
    files = ["main/train/0000.parquet", "main/train/0001.parquet", "main/test/0000.parquet", "other/train/0000.parquet"]
    found = configurations(files, "", "the data set")
    assert choose(name("a/b:main:train@refs/convert/parquet"), found, "k", READ).files == tuple(files[:2])
    assert list(found) == ["main", "other"]


@pytest.mark.parametrize(
    "head", ["configs: 3", "configs: [1]", "configs:\n- data_files: {}\n  x: [", "configs:\n- data_files: 3"]
)
def test_a_readme_that_makes_no_sense_is_refused(head: str) -> None:
    with pytest.raises(DataError, match=r"README\.md"):
        configurations(["a.jsonl"], f"---\n{head}\n---\n", "the data set")


WORDS = [
    "train",
    "training",
    "test",
    "eval",
    "dev",
    "validation",
    "val",
    "data",
    "x",
    "my-test",
    "train_1",
    "trainer",
    "main",
]
STEM = st.sampled_from([*WORDS, "train-00000-of-00002", "train-00001-of-00002", "odd-00000-of-00001"])
PATH = st.tuples(st.lists(st.sampled_from(WORDS), max_size=2), STEM, st.sampled_from([".jsonl", ".parquet"])).map(
    lambda parts: "/".join([*parts[0], parts[1]]) + parts[2]
)


def as_datasets_finds_them(files: list[str]) -> Mapping[str, set[str]]:
    """Splits of the library, by its own patterns and the globs of its file systems."""
    system = MemoryFileSystem()
    system.store.clear()
    for file in files:
        system.pipe(f"/repo/{file}", b"x")

    def resolve(pattern: str) -> list[str]:
        found = [
            str(PurePosixPath(p).relative_to("/repo")) for p in system.glob(f"/repo/{pattern}") if system.isfile(p)
        ]
        found = [p for p in found if not _is_inside_unrequested_special_dir(p, pattern)]
        if not found:
            raise FileNotFoundError
        return found

    splits: dict[str, set[str]] = {}
    for split, patterns in _get_data_files_patterns(resolve).items():
        for pattern in patterns:
            try:
                splits.setdefault(str(split), set()).update(resolve(pattern))
            except FileNotFoundError:
                continue
    return splits


@given(st.lists(PATH, min_size=1, max_size=6, unique=True))
def test_splits_by_name_are_those_of_datasets(files: list[str]) -> None:
    if all(re.fullmatch(r"[^/]+/[^/]+/\d{4}\.parquet", file) for file in files):
        return
    ours = configurations(files, "", "the data set").get("default", {})
    assert {split: set(found) for split, found in ours.items()} == as_datasets_finds_them(files)


@given(
    st.lists(PATH, min_size=1, max_size=6, unique=True),
    st.sampled_from(["**", "*.jsonl", "train*", "**/*.parquet", "data/*"]),
)
def test_patterns_of_a_readme_are_globs(files: list[str], pattern: str) -> None:
    system = MemoryFileSystem()
    system.store.clear()
    for file in files:
        system.pipe(f"/repo/{file}", b"x")
    wanted = {str(PurePosixPath(p).relative_to("/repo")) for p in system.glob(f"/repo/{pattern}") if system.isfile(p)}
    head = yaml.safe_dump({"configs": [{"config_name": "c", "data_files": pattern}]})
    found = configurations(files, f"---\n{head}---\n", "the data set")
    assert set(found.get("c", {}).get("train", ())) == wanted
