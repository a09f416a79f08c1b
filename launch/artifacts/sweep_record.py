"""Record of a sweep: its runs with the values of the settings that vary, in its directory."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.artifacts.file_locks import alone_in
from launch.artifacts.run_directory import write_json
from launch.artifacts.untrusted_files import read_json
from opd.errors import DataError

RECORD = "points.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRecord:
    """Runs of a sweep by their names, each with its values by their settings.

    Example: `SweepRecord(runs={"learner.lr=0.0001,seed=0": {"learner.lr": "0.0001", "seed": "0"}})`.
    """

    runs: Mapping[str, Mapping[str, str]]

    @classmethod
    def read(cls, root: Path) -> "SweepRecord":
        """The record in a sweep's directory. Raises `DataError` about one that a sweep does not write."""
        path = root / RECORD
        runs = read_json(path, "put it back, or begin another sweep").get("runs")
        if not isinstance(runs, dict) or not all(map(_is_run, runs.items())):
            raise DataError(f"{path} has no runs with their values; put it back, or begin another sweep")
        return cls(runs=runs)

    def add_to(self, root: Path) -> None:
        """Add these runs to those that the sweep in `root` has; several processes may do so at once."""
        with alone_in(root):
            before = SweepRecord.read(root).runs if is_sweep(root) else {}
            write_json(root / RECORD, {"runs": {**before, **self.runs}})


def is_sweep(root: Path) -> bool:
    """Whether this is the directory of a sweep."""
    return (root / RECORD).is_file()


def _is_run(entry: tuple[object, object]) -> bool:
    name, values = entry
    plain = isinstance(name, str) and name == Path(name).name and name not in ("", ".", "..")
    return plain and isinstance(values, dict) and all(isinstance(v, str) for pair in values.items() for v in pair)
