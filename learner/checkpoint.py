"""Directories that are either whole or not there, and prove it: a manifest with the digest of every file.

DeepSpeed writes pickles. They are opened only after their digests were compared with the manifest, which
guards against truncation and mix-ups; it is no protection from somebody who may write to the directory.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import xxhash
from jaxtyping import Int64

from opd.errors import ConfigurationError, DataError

MANIFEST = "manifest.json"
_FORMAT = "opd learner checkpoint 1"

SumOverRanks = Callable[[Int64[np.ndarray, " n"]], Int64[np.ndarray, " n"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a checkpoint is of. `updates` is the place in the schedule, `model` a digest of shapes."""

    step: int
    updates: int
    ranks: int
    zero_stage: int
    dtype: str
    model: str


def partial(final: Path) -> Path:
    """Where `final` is written before it is renamed: next to it, so that the rename is atomic."""
    return final.with_name(f".{final.name}.partial")


def start(final: Path) -> None:
    """Make an empty `partial(final)`, whatever an interrupted run has left there."""
    shutil.rmtree(partial(final), ignore_errors=True)
    partial(final).mkdir(parents=True)


def commit(final: Path) -> None:
    """Rename `partial(final)` to `final`; an older `final` is moved out of the way first, then removed."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial(final).rename(final)
    shutil.rmtree(old, ignore_errors=True)


def digests(directory: Path, rank: int, ranks: int, total: SumOverRanks) -> dict[str, str]:
    """File name -> xxh3_64 of all files but the manifest; each rank reads its share and all get the whole."""
    names = sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)
    own = np.zeros(len(names), dtype=np.uint64)
    for i in range(rank, len(names), ranks):
        own[i] = _digest(directory / names[i])
    words = total(own.view(np.int64)).view(np.uint64)
    return {name: f"{int(word):016x}" for name, word in zip(names, words, strict=True)}


def write_manifest(directory: Path, facts: Facts, files: dict[str, str]) -> None:
    """The last file of a checkpoint."""
    content = {"format": _FORMAT, **asdict(facts), "files": files}
    (directory / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")


def read_manifest(directory: Path) -> tuple[Facts, dict[str, str]]:
    """What a checkpoint claims to be, and the digests of its files.

    Raises:
        DataError: there is no manifest, or it is not one of ours.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise DataError(f"the checkpoint {directory} has no {MANIFEST}; it is foreign or was cut off, so take another")
    try:
        content = json.loads(path.read_text())
        if content.pop("format") != _FORMAT:
            raise ValueError("another format")
        files = content.pop("files")
        return Facts(**content), files
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a manifest of {_FORMAT!r} ({error}); take another checkpoint") from error


def check_facts(directory: Path, saved: Facts, own: Facts) -> None:
    """Refuse a checkpoint of another model or another way of sharing it (`step` and `updates` are free)."""
    for name in ("model", "ranks", "zero_stage", "dtype"):
        was, now = getattr(saved, name), getattr(own, name)
        if was != now:
            raise ConfigurationError(
                f"the checkpoint {directory} needs a learner with {name}={was}, but this one has "
                f"{name}={now}; set it back, or start a new run from an exported model"
            )


def check_files(directory: Path, claimed: dict[str, str], found: dict[str, str]) -> None:
    """Refuse a checkpoint with a file missing, added or changed."""
    for name in sorted(claimed.keys() | found.keys()):
        if claimed.get(name) != found.get(name):
            raise DataError(
                f"the checkpoint {directory} is damaged: {name} has digest {found.get(name, 'none')}, but "
                f"its manifest says {claimed.get(name, 'none')}; take another checkpoint"
            )


def _digest(path: Path) -> int:
    state = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    return state.intdigest()
