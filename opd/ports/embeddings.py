"""Protocol of a model's input embeddings, as numbers to compare tokens by."""

from typing import Protocol

import numpy as np
from jaxtyping import Float32, Int32

from opd.errors import ConfigurationError


class Embeddings(Protocol):
    """Input embeddings of the student as it was at the start; they never change."""

    def rows(self, ids: Int32[np.ndarray, " n"]) -> Float32[np.ndarray, "n H"]:
        """The embedding of every id, in order."""
        ...


class NoEmbeddings:
    """Embeddings of a session that has none; it refuses to give any."""

    def rows(self, ids: Int32[np.ndarray, " n"]) -> Float32[np.ndarray, "n H"]:
        """Refuse."""
        raise ConfigurationError(
            f"a part compares {len(ids)} tokens by the student's input embeddings, but this session has none; give "
            "Engines.embeddings, or choose the cost TokenIdentity"
        )
