"""A model's input embeddings alone, for parts that compare tokens by them."""

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Int32
from torch import Tensor

from hf.folder import Stored, input_matrix, read_headers
from hf.single_tensor import read_tensor
from opd.errors import ConfigurationError, DataError


class FolderEmbeddings:
    """Input embeddings of the student's folder at `path`, read at the first question and kept in their own dtype."""

    def __init__(self, path: str | Path) -> None:
        self._path = str(path)

    def rows(self, ids: Int32[np.ndarray, " n"]) -> Float32[np.ndarray, "n H"]:
        """The embedding of every id. Raises `DataError` for an id that has none."""
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(self._matrix):
            raise DataError(
                f"token id {int(ids.max())} has no embedding among the {len(self._matrix)} of the student "
                f"{self._path!r}; check that its tokenizer and the teacher's agree"
            )
        return self._matrix[torch.from_numpy(np.asarray(ids)).long()].float().numpy()

    @cached_property
    def _matrix(self) -> Tensor:
        name, stored = find_embeddings(self._path)
        return read_tensor(name, stored)


def find_embeddings(path: str) -> tuple[str, Stored]:
    """Name and place of the input embeddings in a folder. Raises `ConfigurationError` where there are none."""
    stored = read_headers(path, "the student")
    name = input_matrix(stored)
    if name is None:
        raise ConfigurationError(
            f"the method compares tokens by the student's input embeddings, but {path!r} has none under a known name; "
            "set the cost of its scorer to opd.scorers.transport.TokenIdentity"
        )
    return name, stored[name]
