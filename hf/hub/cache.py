"""The library's cache of the hub: what it holds of a repository, and what is noted there for times offline."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, get_cached_repo_tree
from huggingface_hub.errors import CachedRepoTreeNotFoundError

from hf.hub.ids import HubId, Kind, is_commit
from opd.errors import OpdError


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A repository at an exact commit: its files with their sizes (-1 = not known).

    `offline`: it is what the cache holds, because there is no connection. `key` is the setting that asked.
    """

    name: HubId
    key: str
    commit: str
    files: Mapping[str, int]
    offline: bool = False

    @property
    def part(self) -> str:
        """The beginning of a sentence about it."""
        return f"{self.key} {str(self.name)!r}"

    @property
    def pinned(self) -> HubId:
        """Its name with the commit."""
        return self.name.at(self.commit)


@contextmanager
def storing(part: str) -> Iterator[None]:
    """Context in which a disk that is full or may not be written is one sentence, which begins with `part`."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OpdError(
            f"{part}: files of the hub cannot be kept in {constants.HF_HOME} ({error.strerror}); make room, or set "
            "HF_HOME to another folder"
        ) from error


def cache_folder(name: HubId) -> Path:
    """Folder of a repository in the library's cache."""
    return Path(constants.HF_HUB_CACHE) / f"{name.kind.value}s--{name.repo.replace('/', '--')}"


def cached(name: HubId, key: str) -> Snapshot | None:
    """Snapshot in the cache of a revision, at the commit that it was when it was fetched."""
    folder, commit = cache_folder(name), name.branch
    if not is_commit(commit):
        ref = folder / "refs" / commit
        commit = ref.read_text().strip() if ref.is_file() else ""
    files = _listing(name, commit) if commit and (folder / "snapshots" / commit).is_dir() else {}
    return Snapshot(name=name, key=key, commit=commit, files=files, offline=True) if files else None


def _listing(name: HubId, commit: str) -> Mapping[str, int]:
    """All files that a commit has, also those that were not fetched: what `fetch` noted, or what the library did.

    Without a note a model is judged by its files, since its index of weights says which must be there. A data set has
    no such index, and half of it would be taken for the whole.
    """
    if (note := _note(name, commit)).is_file():
        return {str(file): int(size) for file, size in json.loads(note.read_text()).items()}
    try:
        tree = get_cached_repo_tree(name.repo, repo_type=name.kind.value, revision=commit)
        return {file.path: file.size for file in tree}
    except CachedRepoTreeNotFoundError:
        inside = cache_folder(name) / "snapshots" / commit
        kept = [file for file in inside.rglob("*") if file.is_file() and name.kind is Kind.MODEL]
        return {str(file.relative_to(inside)): file.stat().st_size for file in kept}


def _note(name: HubId, commit: str) -> Path:
    return cache_folder(name) / ".opd" / f"{commit}.json"


def folder_of(known: Snapshot) -> Path:
    """Folder of the files of a snapshot, those that were fetched."""
    return cache_folder(known.name) / "snapshots" / known.commit


def is_here(known: Snapshot, file: str) -> bool:
    """Whether a file of a snapshot has been fetched whole."""
    return (folder_of(known) / file).is_file()


def keep_in_mind(known: Snapshot) -> None:
    """Note in the cache what a commit holds and which one the revision was, so that both are known offline."""
    if known.offline:
        return
    _replace(_note(known.name, known.commit), json.dumps(dict(known.files)))
    if not is_commit(known.name.branch):
        _replace(cache_folder(known.name) / "refs" / known.name.branch, known.commit)


def _replace(file: Path, text: str) -> None:
    if file.is_file() and file.read_text() == text:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(file)
