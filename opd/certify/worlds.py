"""Worlds small enough to enumerate, and corners of the space in which methods train.

Two prompts, a few positions, and for every position one trajectory per token that could be written there. Teachers
know more than the student: they read a longer context. Completions differ in length.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from opd.certify.models import TinyModel, make_model
from opd.types import Prompt

Contexts = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
CONTEXTS: Contexts = (((3, 5), (1, 3, 5)), ((2, 7, 4), (2, 6, 4)))  # student's, teacher's
VOCABULARY, LENGTH = 12, 3
WIDE = 256  # ids, in the world of supports as they are shipped
MORE = ("second", "third")  # teachers besides those that a method names itself; the first of them is narrower


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Who reads and writes. `writer` is the student that wrote, the current one unless it is stale.

    `teachers` read and `authors` write, by name in the order of the engines; `strangers` are to be put in the teachers'
    place. `places` are the positions at which every token is written once. `shift` = 1 makes teachers answer for the
    token before, the commonest mistake of all. A teacher gives less by a factor of e to what stands at place `doubt` of
    a text (nowhere where it is below 0).
    """

    vocabulary: int
    student: TinyModel
    writer: TinyModel
    teachers: Mapping[str, TinyModel]
    authors: Mapping[str, TinyModel]
    strangers: Mapping[str, TinyModel]
    contexts: Contexts = CONTEXTS
    length: int = LENGTH
    places: tuple[int, ...] = tuple(range(LENGTH))
    shift: int = 0
    doubt: int = -1

    @property
    def prompts(self) -> list[Prompt]:
        """Every prompt once per trajectory that will be written for it; teachers take turns by name."""
        made: list[Prompt] = []
        names = sorted(self.teachers)
        for number, (own, taught) in enumerate(self.contexts):
            ids, others = (np.asarray(context, dtype=np.int32) for context in (own, taught))
            made += [
                Prompt(
                    id=f"state/{number}",
                    student_ids=ids,
                    teacher_ids=others,
                    teacher=names[number % len(names)],
                    answer=" ".join(map(str, path)),
                    weight=1.0 + number,
                )
                for path in self.paths(number)
            ]
        return made

    def paths(self, number: int) -> list[Int[np.ndarray, " _length"]]:
        """Completions for a prompt: one writes `v` at place `t`, and up to there all are the same."""
        base = ((np.arange(self.length) * 3 + number + 1) % self.vocabulary).astype(np.int32)
        made = []
        for place in self.places:
            for token in range(self.vocabulary):
                path = base[: max(place + 1, self.length - (token + place) % 2)].copy()
                path[place] = token
                made.append(path)
        return made

    def heads(self) -> list[Tensor]:
        """Output matrices of the teachers, as the learner has them."""
        return [teacher.head for teacher in self.teachers.values()]

    def to(self, dtype: torch.dtype) -> "World":
        """The same world in another precision."""
        return self._with(lambda model: model.to(dtype), lambda model: model.to(dtype))

    def surer(self, student: float, teacher: float) -> "World":
        """The same world, student or teacher nearly certain of every token."""
        return self._with(lambda model: model.surer(student), lambda model: model.surer(teacher))

    def _with(self, own: Callable[[TinyModel], TinyModel], others: Callable[[TinyModel], TinyModel]) -> "World":
        def changed(models: Mapping[str, TinyModel]) -> dict[str, TinyModel]:
            return {name: others(model) for name, model in models.items()}

        return replace(
            self,
            student=own(self.student),
            writer=own(self.writer),
            teachers=changed(self.teachers),
            authors=changed(self.authors),
            strangers=changed(self.strangers),
        )

    def taught_by(self, teachers: Mapping[str, TinyModel]) -> "World":
        """The same texts, read by others."""
        return replace(self, teachers=teachers)

    def equal(self) -> "World":
        """The student is its own teacher, and knows as much."""
        own = tuple((context, context) for context, _ in self.contexts)
        return replace(self, teachers=dict.fromkeys(self.teachers, self.student), contexts=own)


def make_world(
    seed: int, vocabulary: int = VOCABULARY, names: Sequence[str] = ("default",), *, distance: float = 0.5
) -> World:
    """A fresh student, teachers not far from it, and strangers to put in their place."""
    draw = torch.Generator().manual_seed(seed)
    student = make_model(draw, vocabulary)
    teachers = {name: student.moved(draw, distance) for name in names}
    strangers = {name: student.moved(draw, distance) for name in names}
    if MORE[0] in teachers:
        teachers[MORE[0]] = make_model(draw, vocabulary, width=5)
    return World(
        vocabulary=vocabulary,
        student=student,
        writer=student,
        teachers=teachers,
        authors=teachers,
        strangers=strangers,
    )


def stale(world: World, seed: int, distance: float = 0.2) -> World:
    """The same world, written in by an earlier student."""
    return replace(world, writer=world.student.moved(torch.Generator().manual_seed(seed), distance))


def one_state(world: World, place: int = 1) -> World:
    """A world of one prompt and one position."""
    return replace(world, contexts=world.contexts[:1], places=(place,))


def long(world: World, prompt: int = 350, completion: int = 600) -> World:
    """Prompts of hundreds of ids, of which the teacher sees as many more, and completions of hundreds."""
    ids = np.random.default_rng(0).integers(0, world.vocabulary, (2, prompt + 50)).tolist()
    contexts = tuple((tuple(row[50:]), tuple(row)) for row in ids)
    return replace(world, contexts=contexts[:1], length=completion, places=(1, completion - 1))
