"""What became of every trajectory: nothing is lost without a reason."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Ledger:
    """Counts of trajectories. The identity `issued == trained + dropped + outstanding` holds at all times.

    Example: after one step of 64 prompts of which one could not be trained,
    `{"issued": 64, "generated": 64, "scored": 64, "trained": 63, "dropped": 1, "outstanding": 0}`.
    """

    issued: int = 0
    generated: int = 0
    scored: int = 0
    trained: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def outstanding(self) -> int:
        """Issued, and neither trained nor dropped yet."""
        return self.issued - self.trained - self.dropped.total()

    def summary(self) -> dict[str, int]:
        """Flat counts; dropped ones also by reason."""
        reasons = {f"dropped/{reason}": n for reason, n in sorted(self.dropped.items())}
        return {
            "issued": self.issued,
            "generated": self.generated,
            "scored": self.scored,
            "trained": self.trained,
            "dropped": self.dropped.total(),
            "outstanding": self.outstanding,
        } | reasons

    def to_json(self) -> dict[str, Any]:
        """What is settled, for a checkpoint; whoever resumes asks again for what was outstanding."""
        settled = self.trained + self.dropped.total()
        return {"settled": settled, "trained": self.trained, "dropped": dict(self.dropped)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Ledger":
        """The inverse of `to_json`, with nothing outstanding."""
        settled, dropped = int(values["settled"]), Counter[str](values["dropped"])
        return cls(issued=settled, generated=settled, scored=settled, trained=int(values["trained"]), dropped=dropped)
