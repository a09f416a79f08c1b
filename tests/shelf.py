"""An object store for tests: arrays are put, and found again by handles that say nothing."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class PullSender:
    """Where arrays are put; handles are objects of their own, as an object store gives them."""

    arrays: dict[Any, np.ndarray] = field(default_factory=dict)

    def store(self, array: np.ndarray) -> Any:
        handle = object()
        self.arrays[handle] = array
        return handle

    def fetch(self, handle: Any) -> np.ndarray:
        return self.arrays[handle]
