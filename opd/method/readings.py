"""Reading passes: all that the token weights of a method need of the current student, in one call of the learner."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Float32
from torch import Tensor

from opd.errors import DataError
from opd.loss.packing import TokenMean, WeighedTerm, pack, pack_terms, unpack
from opd.method.method import Method, Values, loss_masks, readings_of
from opd.method.terms import MAIN
from opd.ports import Layout, Learner, Reading
from opd.types import Batch, Scored, Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class OfTerm:
    """A reading with the scores of one of several terms."""

    consumes: ClassVar[type[Scores]] = Scores  # what `of` reads was compared with the scorer of its term

    term: str
    of: Reading

    def __call__(self, student: Any, batch: Batch[Any]) -> Float[Tensor, " L"]:
        return self.of(student, replace(batch, scores=batch.terms[self.term].scores))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReadings:
    """Values of the readings of a step, per term and trajectory."""

    by_term: Mapping[str, Sequence[Values]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadingPass:
    """Request to a learner of some layout to read a step: `batches[rank][i]`, with every sampled token in them.

    `asked` are the readings in the order of the answers, `of` the term and the reading that each of them is.
    """

    items: Sequence[Scored[Any]]
    layout: Layout
    batches: Sequence[Sequence[Batch[Any]]]
    asked: Sequence[Reading]
    of: Sequence[tuple[str, Reading]]

    def values(self, answers: Sequence[Sequence[Float32[np.ndarray, "R L"]]]) -> StepReadings:
        """The readings of a step from the answers of all ranks.

        Raises:
            DataError: a reading is not a finite number.
        """
        masks = loss_masks(self.items)
        found = unpack(answers, self.items, masks, self.layout)
        for item, mask, values in zip(self.items, masks, found, strict=True):
            wrong = np.flatnonzero(~np.isfinite(values[:, mask > 0]).all(-1))
            if len(wrong):
                raise DataError(
                    f"prompt {item.trajectory.prompt.id!r}: reading {self.of[wrong[0]][1]} is not finite at every "
                    "token, so nothing can be weighed by it; look at the student's and the teacher's logits there"
                )
        by_term: dict[str, list[Values]] = {}
        for name in dict.fromkeys(term for term, _ in self.of):
            rows = [(i, reading) for i, (term, reading) in enumerate(self.of) if term == name]
            by_term[name] = [{reading: values[i] for i, reading in rows} for values in found]
        return StepReadings(by_term=by_term)


def reading_pass(method: Method, items: Sequence[Scored[Any]], layout: Layout) -> ReadingPass | None:
    """The reading pass that the weights of a method need of a step; None if they declare no readings."""
    needed = {name: readings_of(*term.weights.values()) for name, term in method.every_term.items()}
    of = [(name, reading) for name, readings in needed.items() for reading in readings]
    masks = loss_masks(items)
    if not of or not any(mask.any() for mask in masks):
        return None
    names = dict.fromkeys(name for name, _ in of)
    if [*names] == [MAIN]:
        batches = pack(items, masks, layout, TokenMean())
        return ReadingPass(items=items, layout=layout, batches=batches, asked=[reading for _, reading in of], of=of)
    terms = {name: WeighedTerm(weights=masks, normalizer=TokenMean()) for name in names}
    return ReadingPass(
        items=items,
        layout=layout,
        batches=pack_terms(items, terms, layout),
        asked=[OfTerm(term=name, of=reading) for name, reading in of],
        of=of,
    )


async def read_step(method: Method, items: Sequence[Scored[Any]], learner: Learner) -> StepReadings:
    """The readings of a step; the learner is not called if no weight of the method declares any."""
    asked = reading_pass(method, items, learner.layout)
    if asked is None:
        return StepReadings()
    return asked.values(await learner.read(asked.batches, asked.asked))
