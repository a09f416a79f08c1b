"""Everything that a method's own rollout writes and its scorer reads in a world, and what is true there.

The real rollout, scorer, packing and loss of a method run on it unchanged, so what is enumerated is what trains. What
is true is computed from the models alone: chances are not taken from the parts under test.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.certify.engines import Notes, engines
from opd.certify.models import TinyModel
from opd.certify.worlds import World
from opd.errors import DataError
from opd.method.promises import States
from opd.ports import Context
from opd.scorers.ensemble import ContextIds
from opd.types import Scored, TopKScores, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Enumerated:
    """All trajectories of a world with the testimony about them; `chances[i]` is how likely the enumerated token is.

    Trajectory `i` enumerates position `place[i]`; its states are `(prompt, position)`, each with `V` trajectories.
    `shares` are those of an ensemble's teachers, empty where a prompt's own teacher reads alone.
    """

    world: World
    scorer: Any
    scored: list[Scored[Any]]
    place: Int[np.ndarray, " n"]
    chances: Float[np.ndarray, " n"]
    context: Context
    notes: Notes = field(default_factory=Notes)

    def weights(self, values: Float[np.ndarray, " n"]) -> list[Float[np.ndarray, " _T"]]:
        """`values[i]` at the enumerated token of trajectory `i`, 0 at all others."""
        made = []
        for item, place, value in zip(self.scored, self.place, values, strict=True):
            weight = np.zeros(len(item.trajectory))
            weight[place] = value
            made.append(weight)
        return made

    def support_is_fixed(self) -> bool:
        """Whether the ids that were testified about are the same whatever was written at the state."""
        marks = self._support()
        return bool((marks == marks[:, :1]).all())

    def states(self, student: TinyModel, teachers: Mapping[str, TinyModel], credit: Float[np.ndarray, " n"]) -> States:
        """The enumerated states, in order, in float64; differentiable in `student`."""
        firsts = [self.scored[i].trajectory for i in range(0, len(self.scored), self.world.vocabulary)]
        chances = torch.from_numpy(self.chances).reshape(len(firsts), -1)
        return States(
            student=self._at(student, firsts, ContextIds.STUDENT),
            teacher=self._taught(teachers, firsts).detach(),
            behavior=chances.log(),
            support=torch.from_numpy(self._support()[:, 0]),
            credit=torch.from_numpy(credit).reshape(len(firsts), -1),
        )

    def _at(self, model: TinyModel, firsts: list[Trajectory], context: ContextIds) -> Float[Tensor, "n V"]:
        texts = [(context.of(t.prompt), t.token_ids) for t in firsts]
        places = self.place[:: self.world.vocabulary]
        return torch.stack([row[p] for row, p in zip(model.logprobs(texts), places, strict=True)])

    def _taught(self, teachers: Mapping[str, TinyModel], firsts: list[Trajectory]) -> Float[Tensor, "n V"]:
        """The prompts' own teachers, or the mixture of an ensemble's."""
        contexts = getattr(self.scorer, "contexts", {})
        said = {
            name: self._at(model, firsts, contexts.get(name, ContextIds.TEACHER)) for name, model in teachers.items()
        }
        shares = getattr(self.scorer, "shares", None)
        if shares:
            parts = [said[name] + np.log(share / sum(shares.values())) for name, share in shares.items()]
            return torch.stack(parts).logsumexp(0)
        return torch.stack([said[t.prompt.teacher][i] for i, t in enumerate(firsts)])

    def _support(self) -> np.ndarray:
        marks = np.ones((len(self.scored), self.world.vocabulary), dtype=bool)
        for mark, item, place in zip(marks, self.scored, self.place, strict=True):
            if isinstance(item.scores, TopKScores):
                mark[:] = False
                mark[np.asarray(item.scores.topk_ids)[place]] = True
        return marks.reshape(-1, self.world.vocabulary, self.world.vocabulary)


async def enumerate_world(rollout: Any, scorer: Any, world: World) -> Enumerated:
    """Let `rollout` write and `scorer` read everything there is in `world`."""
    notes = Notes()
    box = engines(world, notes)
    scored: list[Scored[Any]] = []
    for _, group in groupby(world.prompts, key=lambda prompt: prompt.id):
        trajectories: list[Trajectory] = await rollout(list(group), box)
        testimony = await scorer(trajectories, box)
        scored += [Scored(trajectory=t, scores=s) for t, s in zip(trajectories, testimony, strict=True)]
    v = world.vocabulary
    index = np.arange(len(scored))
    place = np.asarray(world.places)[index // v % len(world.places)]
    if len(scored) != len(world.prompts) or any(
        len(s.trajectory) <= p or s.trajectory.token_ids[p] != i % v
        for i, s, p in zip(index, scored, place, strict=True)
    ):
        raise DataError(
            f"rollout {type(rollout).__name__} does not keep what its engines write, one trajectory per prompt in "
            "order, so its states cannot be enumerated; certify its objective in a method with rollout StudentRollout"
        )
    chances = np.exp([_drawn(s.trajectory, int(p), notes) for s, p in zip(scored, place, strict=True)]).reshape(-1, v)
    chances = (chances / chances.sum(-1, keepdims=True)).reshape(-1)
    return Enumerated(world=world, scorer=scorer, scored=scored, place=place, chances=chances, context=box, notes=notes)


def _drawn(trajectory: Trajectory, place: int, notes: Notes) -> float:
    """Log of the chance with which a token was drawn: what the engine knows, or else what the text says itself."""
    written = notes.written.get((trajectory.prompt.id, trajectory.sample))
    if written is None:
        return float(trajectory.behavior.logprobs[place])
    return float(written.chances[place, int(trajectory.token_ids[place])])


def read(rollout: Any, scorer: Any, world: World) -> Enumerated:
    """`enumerate_world`, outside of a loop of events."""
    found: list[Enumerated] = []

    async def look() -> None:  # returns nothing, because asyncio prints the result of the task it runs
        found.append(await enumerate_world(rollout, scorer, world))

    asyncio.run(look())
    return found[0]
