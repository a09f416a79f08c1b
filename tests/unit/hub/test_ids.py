"""Names on the hub: what is one, what is a path, and that writing and reading agree."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf.hub.ids import HubId, Kind, hub_id, is_commit

PART = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.]{0,10}[A-Za-z0-9]", fullmatch=True).filter(lambda t: ".." not in t)
REPO = st.tuples(PART, PART).map("/".join).filter(lambda t: not t.endswith(".git"))
REVISION = st.just("") | st.from_regex(r"[0-9a-f]{40}", fullmatch=True) | st.sampled_from(["main", "refs/pr/3", "v1.0"])
WORD = st.from_regex(r"[A-Za-z0-9_.-]{1,12}", fullmatch=True)


@given(REPO, REVISION)
def test_a_model_is_read_as_it_is_written(repo: str, revision: str) -> None:
    name = HubId(kind=Kind.MODEL, repo=repo, revision=revision)
    assert hub_id(Kind.MODEL, str(name)) == name


@given(REPO, WORD, WORD, REVISION)
def test_a_data_set_is_read_as_it_is_written(repo: str, config: str, split: str, revision: str) -> None:
    if any(".." in text for text in (config, split)):
        return
    for name in (
        HubId(kind=Kind.DATA, repo=repo, revision=revision),
        HubId(kind=Kind.DATA, repo=repo, config=config, revision=revision),
        HubId(kind=Kind.DATA, repo=repo, config=config, split=split, revision=revision),
    ):
        assert hub_id(Kind.DATA, str(name)) == name


@given(st.text(max_size=40))
def test_any_text_is_a_name_or_none_and_never_an_error(text: str) -> None:
    for kind in Kind:
        name = hub_id(kind, text)
        assert name is None or str(name) == text


@pytest.mark.parametrize(
    "text",
    [
        "gpt2",
        "/models/x",
        "./models/x",
        "../models/x",
        "a/b/c",
        "a/b.git",
        "a--b/c",
        "~/x",
        "a/b@",
        "a/b:",
        "a /b",
        "runs/x/",
    ],
)
def test_what_cannot_be_a_name_is_a_path(text: str) -> None:
    assert hub_id(Kind.MODEL, text) is None


def test_what_exists_here_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_id(Kind.MODEL, "models/small") is not None
    (tmp_path / "models" / "small").mkdir(parents=True)
    assert hub_id(Kind.MODEL, "models/small") is None
    (tmp_path / "models" / "link").symlink_to("nothing")
    assert hub_id(Kind.MODEL, "models/link") is None, "a broken link is a mistake here, and no question for the hub"


def test_only_a_whole_hash_is_a_commit() -> None:
    assert is_commit("0123456789abcdef" * 2 + "01234567")
    assert not is_commit("main") and not is_commit("0123456") and not is_commit("g" * 40)
