"""Grading failures: sentences for a run's summary, and the end of a run in which nothing can be graded."""

from dataclasses import dataclass, field

from opd.errors import DataError

MOST_FAULTS = 20  # sentences that are kept about what went wrong
HOPELESS = 50  # failures in a row, without one success, that are no accident


@dataclass(slots=True, kw_only=True)
class Faults:
    """The failures of one grader or environment. `part` names it, e.g. `graders.mine`."""

    part: str
    sentences: list[str] = field(default_factory=list)
    _row: int = 0

    def note(self, why: str) -> None:
        """One more. Raises `DataError` if nothing has worked for too long: a run would train on zeros."""
        self._row += 1
        if len(self.sentences) < MOST_FAULTS:
            self.sentences.append(f"{self.part}: {why}; it counts as reward 0")
        if self._row >= HOPELESS:
            raise DataError(f"{self.part} failed {self._row} times in a row, the last time: {why}; correct it")

    def worked(self) -> None:
        """A success."""
        self._row = 0
