"""Best checkpoint of a run by a measure of its evaluations, such as `math500/maj_at_8`."""

from collections.abc import Collection, Iterable

from launch.artifacts.checkpoint_store import CheckpointStore
from launch.artifacts.evaluation_point import EvaluationPoint
from launch.artifacts.run_data import RunData
from launch.artifacts.run_directory import RunDirectory
from launch.artifacts.untrusted_files import read_yaml
from launch.config.best_by import BestBy
from launch.config.run_config import RunConfig
from opd.errors import DataError

BEST = "best"  # in place of a step


class BestSoFar:
    """The step with the best evaluation so far among those that may have a checkpoint; the first of equal ones."""

    def __init__(self, by: BestBy | None, known: Iterable[EvaluationPoint] = ()) -> None:
        self._by = by
        self._score = -float("inf")
        self.step: int | None = None
        for point in known:
            self.see(point)

    def see(self, point: EvaluationPoint) -> None:
        """Take note of an evaluation of the student."""
        score = self._by.score(point) if self._by else None
        if score is not None and score > self._score:
            self.step, self._score = point.step, score

    @property
    def kept(self) -> Collection[int]:
        """Steps whose checkpoints stay for it."""
        return () if self.step is None else (self.step,)


def best_so_far(config: RunConfig, directory: RunDirectory) -> BestSoFar:
    """Best checkpoint so far of a run that begins, or goes on, in `directory`."""
    by = BestBy.of(config.checkpoint_best)
    return BestSoFar(by, _candidates(directory) if by else ())


def best_step(directory: RunDirectory) -> int:
    """Step of the best checkpoint of a run, by its own setting.

    Raises:
        DataError: the run names no measure, or none of its checkpoints was evaluated.
    """
    settings = read_yaml(directory.config, "give the directory of a run")
    by = BestBy.of(str(settings.get("checkpoint_best") or ""))
    if by is None:
        raise DataError(f"run {directory.path} has no checkpoint_best, so none is the best; name a step=N")
    found = BestSoFar(by, _candidates(directory)).step
    if found is None:
        raise DataError(f"run {directory.path} has no checkpoint whose {by} was measured; name a step=N")
    return found


def _candidates(directory: RunDirectory) -> list[EvaluationPoint]:
    """Evaluations of the student at the steps that have a checkpoint."""
    steps = CheckpointStore(directory.checkpoints).steps()
    return [point for of in RunData.read(directory).by_set.values() for point in of if point.step in steps]
