"""What the learner was asked to do since its newest checkpoint, so that new ranks can do it again."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from opd.ports import LossFunction
from opd.types import Batch, Scores, nbytes

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedStep:
    """A step that was taken; hidden states in it are references, which keep them readable."""

    batches: Sequence[Sequence[Batch[Scores]]]
    objective: LossFunction


@dataclass(slots=True, kw_only=True)
class ReplayLog:
    """The steps since `base`, the newest checkpoint that is whole (None: the student's own checkpoint, step 0).

    Nothing is copied: the steps are the values that the learner was given. Beyond `most` bytes they are let go of, and
    steps are written down again from the next checkpoint on; until that one is whole there is nothing to start from.

    Example: `log = ReplayLog(most=1 << 30)`, `log.add(batches, objective)` after a step, `log.saving()` when the
    state was copied for a checkpoint, `log.kept(folder)` when that checkpoint is whole.
    """

    most: int
    base: Path | None = None
    number: int = 0  # of steps since this process began
    steps: list[LoggedStep] = field(default_factory=list)  # the newest, without a gap
    _nbytes: list[int] = field(default_factory=list)  # of each
    _base_at: int = 0  # the number of steps that `base` has in it
    _saved_at: int = 0  # ... and that the checkpoint has which is being written
    _writes: bool = True

    @property
    def whole(self) -> bool:
        """Do the steps lead from `base` to now?"""
        return len(self.steps) == self.number - self._base_at

    def add(self, batches: Sequence[Sequence[Batch[Scores]]], objective: LossFunction) -> None:
        """A step was taken."""
        self.number += 1
        if not self._writes:
            return
        self.steps.append(LoggedStep(batches=batches, objective=objective))
        self._nbytes.append(sum(nbytes(batch) for rank in batches for batch in rank))
        if sum(self._nbytes) > self.most:
            _log.warning(
                "the %d steps since the newest checkpoint are more than cluster.replay_log_bytes=%d; until the next "
                "one a learner rank that dies ends the run (set a smaller checkpoint_every)",
                len(self.steps),
                self.most,
            )
            self._keep(0)
            self._writes = False

    def saving(self) -> None:
        """The state of now is being written."""
        self._saved_at, self._writes = self.number, True

    def kept(self, folder: Path) -> None:
        """What was being written is whole: steps up to then need not be done again."""
        self.base, self._base_at = folder, self._saved_at
        self._keep(self.number - self._base_at)

    def loaded(self, folder: Path) -> None:
        """The learner has taken over what lies in `folder`."""
        self.saving()
        self.kept(folder)

    def _keep(self, newest: int) -> None:
        cut = max(0, len(self.steps) - newest)
        del self.steps[:cut], self._nbytes[:cut]
