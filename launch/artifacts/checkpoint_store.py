"""A run's `checkpoints/` on the disk: written whole or not at all, verified before anything is read from it."""

import shutil
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from launch.artifacts.checkpoint_state import (
    FORMAT,
    MANIFEST,
    STATE,
    DriverState,
    expired,
    leftovers,
    name_of,
    newest_first,
)
from launch.artifacts.run_directory import write_json
from launch.artifacts.untrusted_files import read_json
from learner.checkpoints import checkpoint
from opd.errors import ConfigurationError, DataError, OpdError
from opd.loop.ledger import Ledger

ANOTHER = "take another checkpoint"
MOST_MANIFEST = 16 << 20  # bytes: a line per file


@dataclass(frozen=True, slots=True)
class CheckpointStore:
    """Store of checkpoints: `step_<N>/` has `learner/rank_<R>.safetensors`, `state.json`, teachers, `manifest.json`
    last.
    """

    folder: Path

    def steps(self) -> list[int]:
        """Steps that have a folder, newest first; `verified_state` finds out which of them are whole."""
        return newest_first(path.name for path in self.folder.iterdir()) if self.folder.is_dir() else []

    def path(self, step: int) -> Path:
        """Path of the checkpoint of `step`, existing or to be written."""
        return self.folder / name_of(step)

    def begin(self, step: int) -> Path:
        """An empty folder to write the checkpoint of `step` into."""
        checkpoint.start(self.path(step))
        return checkpoint.partial(self.path(step))

    def commit(self, state: DriverState, files: Mapping[str, str]) -> None:
        """Add the driver's state and the manifest (`files`: name -> digest of every file already there), and rename."""
        folder = checkpoint.partial(self.path(state.step))
        write_json(folder / STATE, state.as_json())
        every = {**files, STATE: checkpoint.digest(folder / STATE)}
        write_json(folder / MANIFEST, {"format": FORMAT, "files": dict(sorted(every.items()))})
        checkpoint.commit(self.path(state.step))

    def abandon(self, step: int) -> None:
        """Remove a checkpoint that was begun."""
        shutil.rmtree(checkpoint.partial(self.path(step)), ignore_errors=True)

    def recover(self) -> None:
        """Clean up after a crash; only when no run writes here."""
        found = leftovers(path.name for path in self.folder.iterdir()) if self.folder.is_dir() else leftovers(())
        for now, then in found.back:
            (self.folder / now).rename(self.folder / then)
        for name in found.remove:
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def prune(self, keep: int, keep_every: int, best: Collection[int] = ()) -> None:
        """Remove checkpoints beyond the retention; each is renamed first, so a half-removed one is none."""
        for step in expired(self.steps(), keep, keep_every, best):
            self._remove(step)

    def make_room(self, keep_every: int, best: Collection[int] = ()) -> bool:
        """Remove all but a whole newest one, milestones and `best` if one more has no room; whether any was removed."""
        try:
            newest, *older = self.steps()
            if not set(older) & set(expired([newest, *older], 1, keep_every, best)):
                return False
            verified_state(self.path(newest))
            size = sum(path.stat().st_size for path in self.path(newest).rglob("*"))
            if shutil.disk_usage(self.folder).free >= size:
                return False
            self.prune(1, keep_every, best)
        except (ValueError, OSError, OpdError):  # there is none, or it cannot be looked at
            return False
        return True

    def forget_after(self, step: int) -> None:
        """Remove newer checkpoints: the run goes on from `step` and will write them again."""
        for newer in (s for s in self.steps() if s > step):
            self._remove(newer)

    def _remove(self, step: int) -> None:
        doomed = checkpoint.partial(self.path(step))
        shutil.rmtree(doomed, ignore_errors=True)
        self.path(step).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def newest_whole(self) -> tuple[Path, DriverState, list[str]]:
        """The newest checkpoint that verifies, and a sentence for each newer one that does not.

        Raises:
            ConfigurationError: there is none.
        """
        skipped: list[str] = []
        for step in self.steps():
            try:
                return self.path(step), verified_state(self.path(step)), skipped
            except DataError as error:
                skipped.append(str(error))
        why = f" ({'; '.join(skipped)})" if skipped else ""
        raise ConfigurationError(
            f"{self.folder} has no checkpoint to go on from{why}; start a new run under another run_name=..."
        )


def verified_state(folder: Path) -> DriverState:
    """The verified checkpoint in `folder`: every byte of it is compared with its manifest first.

    Raises:
        DataError: it is foreign, cut off, or damaged; the sentence names the file.
    """
    claimed = _manifest(folder)
    present = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(present, pool.map(lambda name: _digest(folder / name), present), strict=True))
    for name in sorted(claimed.keys() | found.keys()):
        if claimed.get(name) != found.get(name):
            raise DataError(
                f"the checkpoint {folder} is damaged: {name} has digest {found.get(name, 'none')}, but its manifest "
                f"says {claimed.get(name, 'none')}; take another checkpoint"
            )
    state = unverified_state(folder)
    if elsewhere := [file for file in state.followers.values() if file not in claimed]:
        raise DataError(f"{folder / STATE} names {elsewhere[0][:60]!r}, which is no file of the checkpoint; {ANOTHER}")
    if folder.name != name_of(state.step):  # what comes after its step would be removed, and that is itself
        raise DataError(
            f"the checkpoint {folder} is of step {state.step}, so it was moved or copied; call it "
            f"{name_of(state.step)} again, or take another"
        )
    return state


def unverified_state(folder: Path) -> DriverState:
    """The driver's state in `folder`, whose bytes are not compared with the manifest.

    Raises:
        DataError: it cannot be read, or is no state.
    """
    path = folder / STATE
    content = read_json(path, ANOTHER)
    try:
        state = DriverState.from_json(content)
        Ledger.from_json(state.ledger)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return state


def _digest(path: Path) -> str:
    try:
        return checkpoint.digest(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); take another checkpoint") from error


def _manifest(folder: Path) -> dict[str, str]:
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"the checkpoint {folder} has no {MANIFEST}; it is foreign or was cut off, take another")
    content = read_json(path, ANOTHER, MOST_MANIFEST)
    files = content.get("files")
    if content.get("format") != FORMAT or not isinstance(files, dict) or STATE not in files:
        raise DataError(f"{path} is no manifest of {FORMAT!r} that lists {STATE}; {ANOTHER}")
    if wrong := [name for name, value in files.items() if not isinstance(value, str) or not _within(name)]:
        raise DataError(f"{path} lists {wrong[0][:60]!r}, which is no file of this checkpoint; {ANOTHER}")
    return files


def _within(name: str) -> bool:
    """Whether this is the name of a file below the folder, and of none elsewhere."""
    return bool(name) and not name.startswith("/") and ".." not in name.split("/")
