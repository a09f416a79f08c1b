"""Models of the hub as folders here: whole in the library's cache, or their headers alone for a plan."""

import atexit
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from hf.folder import INDEX, read_json
from hf.hub.cache import Snapshot, folder_of, is_here
from hf.hub.client import Arrived, fetch, read_start
from hf.hub.ids import HubId
from hf.hub.needed import small_files, weight_files


class Weights(Enum):
    """Part of a model's weights that is fetched."""

    WHOLE = "whole"
    HEADERS = "headers"  # a plan looks at names, shapes and sizes alone
    NONE = "none"  # a remote teacher has them elsewhere


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """Folder of a fetched model or data set.

    `name` is the exact one, with its commit; `asked` what the user wrote. `headers`: the weights in `folder` are
    holes. `offline`: the cache answered.
    """

    name: HubId
    asked: str
    folder: Path
    size: int
    headers: bool = False
    offline: bool = False


Announce = Callable[[Snapshot, Sequence[str]], Arrived]
"""Told what is about to be fetched (nothing, where all of it is here); gives the counter of the bytes."""


def fetch_model(known: Snapshot, weights: Weights, announce: Announce) -> Fetched:
    """The model of a snapshot as a folder.

    Raises:
        DataError: it has no safetensors.
        OpdError: fetching failed.
    """
    small = small_files(known.files)
    folder = fetch(known, small, announce(known, [file for file in small if not is_here(known, file)]))
    if weights is Weights.NONE:
        view = _view(known, small)
        return _fetched(known, small, view)
    index = read_json(folder / INDEX, known.part) if INDEX in small else None
    files = weight_files(known.files, index, known.part)
    lacking = [file for file in files if not is_here(known, file)]
    if lacking and weights is Weights.HEADERS and not known.offline:
        view = _view(known, small)
        for file in files:
            _hollow(known, file, view / file)
        return _fetched(known, [*small, *files], view, headers=True)
    fetch(known, files, announce(known, lacking))
    return _fetched(known, [*small, *files], folder)


def _fetched(known: Snapshot, files: Sequence[str], folder: Path, *, headers: bool = False) -> Fetched:
    return Fetched(
        name=known.pinned,
        asked=str(known.name),
        folder=folder,
        size=sum(max(0, known.files[file]) for file in files),
        headers=headers,
        offline=known.offline,
    )


def _view(known: Snapshot, files: Sequence[str]) -> Path:
    """A folder of this process alone, with links to some files of a snapshot."""
    view = _temporary() / known.name.repo.replace("/", "--") / known.commit / str(len(files))
    shutil.rmtree(view, ignore_errors=True)
    view.mkdir(parents=True)
    for file in files:
        (view / file).symlink_to(folder_of(known) / file)
    return view


def _hollow(known: Snapshot, file: str, target: Path) -> None:
    """A safetensors file with its header and its size, and a hole where the numbers are: it takes no room on a disk."""
    start = read_start(known, file)
    with target.open("wb") as stream:
        stream.write(start)
        stream.truncate(max(known.files[file], len(start)))


@cache
def _temporary() -> Path:
    folder = Path(mkdtemp(prefix="opd-hub-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
