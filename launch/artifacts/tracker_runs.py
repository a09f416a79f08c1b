"""Runs of trackers that belong to a run directory: their ids and places, by which a resumed run goes on with them."""

from collections.abc import Mapping

from launch.artifacts.run_directory import RunDirectory, write_json
from launch.artifacts.untrusted_files import read_json
from opd.errors import DataError

_ADVICE = "remove it, and trackers begin new runs"


def tracker_runs(directory: RunDirectory) -> dict[str, Mapping[str, str]]:
    """Facts by tracker, e.g. `{"mlflow": {"run_id": "0a1b"}}`. Raises `DataError` about a file that has others."""
    if not directory.trackers.exists():
        return {}
    found = read_json(directory.trackers, _ADVICE)
    for name, facts in found.items():
        if not isinstance(facts, dict) or not all(isinstance(value, str) for value in facts.values()):
            raise DataError(f"{directory.trackers} needs texts under {name[:60]!r}; {_ADVICE}")
    return found


def remember_run(directory: RunDirectory, tracker: str, facts: Mapping[str, str]) -> None:
    """Store the facts of one tracker; those of the others stay."""
    known = tracker_runs(directory)
    if known.get(tracker) != facts:
        write_json(directory.trackers, known | {tracker: dict(facts)})
