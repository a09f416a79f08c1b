"""Rows of arrays that another process holds, by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

Fetch = Callable[[Any], np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteRows:
    """Rows of arrays that are held elsewhere, in order: `(handle, row numbers)` pieces.

    Hidden states are too large to pass through the driver, so it moves, cuts and joins only these names;
    the learner rank that needs the rows fetches them. Example: `RemoteRows(pieces=((ref, [3, 4, 5]),))`.
    """

    pieces: tuple[tuple[Any, Int[np.ndarray, " _rows"]], ...]
    row_nbytes: int = 0  # of one row, where it is held; 0 = not known

    def __len__(self) -> int:
        return sum(len(rows) for _, rows in self.pieces)

    def take(self, index: np.ndarray) -> "RemoteRows":
        """The rows `index`, in that order; neighboring rows of one array stay one piece."""
        owner = np.concatenate([np.full(len(rows), i) for i, (_, rows) in enumerate(self.pieces)])[index]
        rows = np.concatenate([rows for _, rows in self.pieces])[index]
        cuts = np.flatnonzero(np.diff(owner)) + 1
        starts = np.concatenate([[0], cuts]) if len(index) else np.zeros(0, dtype=np.int64)
        parts = np.split(rows, cuts) if len(index) else []
        pieces = tuple((self.pieces[owner[s]][0], part) for s, part in zip(starts, parts, strict=True))
        return RemoteRows(pieces=pieces, row_nbytes=self.row_nbytes)

    @staticmethod
    def concat(values: Sequence["RemoteRows"]) -> "RemoteRows":
        """Rows of several objects, one after the other."""
        widest = max((value.row_nbytes for value in values), default=0)
        return RemoteRows(pieces=tuple(piece for value in values for piece in value.pieces), row_nbytes=widest)

    def fetch(self, get: Fetch) -> Tensor:
        """Values of the rows, `[rows, H]`; each array is fetched once. 16-bit words are bfloat16.

        Arrays of several teachers may differ in width and dtype: `H` is the widest, narrower rows end in zeros
        (which no output matrix looks at), and the dtype is one that holds all values exactly.
        """
        handles = {id(handle): handle for handle, _ in self.pieces}
        arrays = {key: get(handle) for key, handle in handles.items()}
        kinds = {(array.shape[1], array.dtype) for array in arrays.values()}
        if len(kinds) == 1:
            return _tensor(np.concatenate([arrays[id(handle)][rows] for handle, rows in self.pieces]))
        parts = [_tensor(arrays[id(handle)][rows]) for handle, rows in self.pieces]
        width = max(part.shape[1] for part in parts)
        return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])


def _tensor(rows: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(rows)
    return tensor.view(torch.bfloat16) if rows.dtype == np.uint16 else tensor
