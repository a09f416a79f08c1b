"""Worlds: tiny students, teachers and prompts, of which every completion can be enumerated.

Two prompts, a few positions, and for every position one trajectory per token that could be sampled there. Teachers
know more than the student: their context is longer. Completions differ in length.
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
    """Models and prompts of a world.

    `behavior` is the policy that generates: the current student unless it is stale. `teachers` score and `writers`
    generate, by name in the order of the engines; `other_teachers` can replace the teachers. `positions` are those at
    which every token is sampled once. `shift` = 1 makes teachers answer for the token before, the commonest mistake of
    all. A teacher's unnormalized probability of the token at `perturbed_position` is smaller by a factor of e (-1:
    nowhere). Prompts take turns with all teachers but those of `named`, which parts of a method name themselves. It is
    a world of the step `step` of a run of `steps`. With `cut`, every other text is cut by the token limit.
    """

    vocabulary: int
    student: TinyModel
    behavior: TinyModel
    teachers: Mapping[str, TinyModel]
    writers: Mapping[str, TinyModel]
    other_teachers: Mapping[str, TinyModel]
    contexts: Contexts = CONTEXTS
    length: int = LENGTH
    positions: tuple[int, ...] = tuple(range(LENGTH))
    shift: int = 0
    named: frozenset[str] = frozenset()
    perturbed_position: int = -1
    step: int = 0
    steps: int = 100
    cut: bool = False

    @property
    def prompts(self) -> list[Prompt]:
        """Prompts, one per trajectory that will be generated; teachers take turns by name."""
        made: list[Prompt] = []
        names = sorted(self.teachers.keys() - self.named) or sorted(self.teachers)
        for number, (own, taught) in enumerate(self.contexts):
            ids, others = (np.asarray(context, dtype=np.int32) for context in (own, taught))
            made += [
                Prompt(
                    id=f"state/{number}",
                    student_ids=ids,
                    teacher_ids=others,
                    teacher=names[number % len(names)],
                    answer=" ".join(map(str, completion)),
                    weight=1.0 + number,
                )
                for completion in self.completions(number)
            ]
        return made

    def completions(self, number: int) -> list[Int[np.ndarray, " _length"]]:
        """Completions of a prompt: one for every id at every position, equal up to there."""
        base = ((np.arange(self.length) * 3 + number + 1) % self.vocabulary).astype(np.int32)
        made = []
        for position in self.positions:
            for token in range(self.vocabulary):
                completion = base[: max(position + 1, self.length - (token + position) % 2)].copy()
                completion[position] = token
                made.append(completion)
        return made

    def heads(self) -> list[Tensor]:
        """Output matrices of the teachers, as the learner has them."""
        return [teacher.head for teacher in self.teachers.values()]

    def to(self, dtype: torch.dtype) -> "World":
        """World in another precision."""
        return self._with(lambda model: model.to(dtype), lambda model: model.to(dtype))

    def sharpened(self, student: float, teacher: float) -> "World":
        """World with the logits of student and teachers multiplied."""
        return self._with(lambda model: model.sharpened(student), lambda model: model.sharpened(teacher))

    def _with(self, own: Callable[[TinyModel], TinyModel], others: Callable[[TinyModel], TinyModel]) -> "World":
        def changed(models: Mapping[str, TinyModel]) -> dict[str, TinyModel]:
            return {name: others(model) for name, model in models.items()}

        return replace(
            self,
            student=own(self.student),
            behavior=own(self.behavior),
            teachers=changed(self.teachers),
            writers=changed(self.writers),
            other_teachers=changed(self.other_teachers),
        )

    def with_teachers(self, teachers: Mapping[str, TinyModel], *, writers: bool = False) -> "World":
        """World with other teachers, which also write in place of the former ones if `writers`."""
        return replace(self, teachers=teachers, writers=teachers if writers else self.writers)

    def with_student_as_teacher(self, power: float = 1.0) -> "World":
        """World whose student is its own teacher, in the same context; its distributions to a power, normalized."""
        own = tuple((context, context) for context, _ in self.contexts)
        return replace(self, teachers=dict.fromkeys(self.teachers, self.student.sharpened(power)), contexts=own)


def make_world(
    seed: int,
    vocabulary: int = VOCABULARY,
    names: Sequence[str] = ("default",),
    *,
    distance: float = 0.5,
    named: frozenset[str] = frozenset(),
) -> World:
    """World of a random student, of teachers that are it with noise of deviation `distance`, and of other teachers."""
    draw = torch.Generator().manual_seed(seed)
    student = make_model(draw, vocabulary)
    teachers = {name: student.perturbed(draw, distance) for name in names}
    other_teachers = {name: student.perturbed(draw, distance) for name in names}
    if MORE[0] in teachers:
        teachers[MORE[0]] = make_model(draw, vocabulary, width=5)
    return World(
        vocabulary=vocabulary,
        student=student,
        behavior=student,
        teachers=teachers,
        writers=teachers,
        other_teachers=other_teachers,
        named=named,
    )


def stale(world: World, seed: int, distance: float = 0.2) -> World:
    """World whose behavior policy is an earlier student."""
    return replace(world, behavior=world.student.perturbed(torch.Generator().manual_seed(seed), distance))


def one_state(world: World, position: int = 1) -> World:
    """World of one prompt and one position."""
    return replace(world, contexts=world.contexts[:1], positions=(position,))


def long(world: World, prompt: int = 350, completion: int = 600) -> World:
    """World of one prompt of `prompt` ids, 50 more for the teacher, and completions of `completion` ids."""
    ids = np.random.default_rng(0).integers(0, world.vocabulary, (2, prompt + 50)).tolist()
    contexts = tuple((tuple(row[50:]), tuple(row)) for row in ids)
    return replace(world, contexts=contexts[:1], length=completion, positions=(1, completion - 1))
