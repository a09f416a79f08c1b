"""Replay log: the learner's calls since its newest checkpoint, which new ranks repeat."""

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd.ports import Call

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedCall:
    """A call that was answered and changed the learner's state; `label` names it, as in `step 3`.

    Hidden states in it are references, which keep them readable.
    """

    call: Call[Any]
    label: str


@dataclass(slots=True, kw_only=True)
class ReplayLog:
    """The calls that changed the learner's state since `base`, the newest checkpoint that is whole.

    Without `base` they begin at the student's own checkpoint, step 0. Nothing is copied: the arguments are the values
    that the learner was given. Beyond `most` bytes the calls are let go of, and are written down again from the next
    checkpoint on; until that one is whole there is nothing to start from.

    Example: `log = ReplayLog(most=1 << 30)`, `log.add(call)` after each call that `changes_state`, `log.saving()` when
    the state was copied for a checkpoint, `log.kept(folder)` when that checkpoint is whole.
    """

    most: int
    base: Path | None = None
    number: int = 0  # of such calls since this process began
    calls: list[LoggedCall] = field(default_factory=list)  # the newest, without a gap
    _of: Counter[str] = field(default_factory=Counter)  # calls by verb
    _nbytes: list[int] = field(default_factory=list)  # of each
    _base_at: int = 0  # the number of calls that `base` has in it
    _saved_at: int = 0  # ... and that the checkpoint has which is being written
    _writes: bool = True

    @property
    def whole(self) -> bool:
        """Whether the calls lead from `base` to the present state."""
        return len(self.calls) == self.number - self._base_at

    def label(self, call: Call[Any]) -> str:
        """Label of `call` in sentences: its verb, with a number if it would be the next to be logged."""
        return f"{call.name} {self._of[call.name] + 1}" if call.changes_state else call.name

    def add(self, call: Call[Any]) -> None:
        """Log a call that changed the state and was answered."""
        logged = LoggedCall(call=call, label=self.label(call))
        self.number += 1
        self._of[call.name] += 1
        if not self._writes:
            return
        self.calls.append(logged)
        self._nbytes.append(call.nbytes)
        if sum(self._nbytes) > self.most:
            _log.warning(
                "the %d calls since the newest checkpoint are more than cluster.replay_log_bytes=%d; until the next "
                "one a learner rank that dies ends the run (set a smaller checkpoint_every)",
                len(self.calls),
                self.most,
            )
            self._keep(0)
            self._writes = False

    def saving(self) -> None:
        """Record that the current state is being written."""
        self._saved_at, self._writes = self.number, True

    def kept(self, folder: Path) -> None:
        """Record that the checkpoint being written is whole, in `folder`: calls before it need not be repeated."""
        self.base, self._base_at = folder, self._saved_at
        self._keep(self.number - self._base_at)

    def loaded(self, folder: Path) -> None:
        """Record that the learner has loaded the checkpoint in `folder`."""
        self.saving()
        self.kept(folder)

    def _keep(self, newest: int) -> None:
        cut = max(0, len(self.calls) - newest)
        del self.calls[:cut], self._nbytes[:cut]
