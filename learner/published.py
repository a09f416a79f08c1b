"""Published tensors: a student's trained parameters as a checkpoint has them, each a view of one of its own."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hf.weight_names import Piece
from learner.model import Student


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A tensor that engines get under `name`: all of `parameter`, or a matrix of fused experts."""

    name: str
    parameter: nn.Parameter
    piece: Piece | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, also when ZeRO-3 has taken the parameter apart."""
        shape = full_shape(self.parameter)
        return shape if self.piece is None else (self.piece.last - self.piece.first, *shape[2:])

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        return self.parameter.dtype


def published(student: Student) -> list[Published]:
    """All tensors that `student` publishes; those of one parameter follow each other."""
    found = []
    for name, parameter in student.named():
        pieces = student.pieces.get(name)
        if pieces is None:
            found.append(Published(name=name, parameter=parameter))
        else:
            found += [Published(name=piece.name, parameter=parameter, piece=piece) for piece in pieces]
    return found


def described(
    parts: Sequence[Published],
) -> tuple[Sequence[str], Sequence[tuple[int, ...]], Sequence[torch.dtype]]:
    """Names, shapes and dtypes of `parts`."""
    return [part.name for part in parts], [part.shape for part in parts], [part.dtype for part in parts]


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter, also when ZeRO-3 has taken it apart."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
