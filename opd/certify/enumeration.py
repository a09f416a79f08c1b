"""Enumeration of a world: all trajectories of a method's own rollout with the scores of its own scorer.

The real rollout, scorer, packing and loss of a method run on it unchanged, so what is enumerated is what trains. The
probabilities of tokens are computed from the models alone, and are not taken from the parts under test.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.certify.awaited import awaited
from opd.certify.engines import RequestLog, engines
from opd.certify.models import TinyModel
from opd.certify.worlds import World
from opd.errors import DataError
from opd.method.promises import States
from opd.ports import Context
from opd.scorers.ensemble import ContextIds
from opd.types import Scored, TopKScores, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Enumeration:
    """All trajectories of a world with their scores; `probabilities[i]` is that of the enumerated token.

    Trajectory `i` enumerates position `position[i]`; its states are `(prompt, position)`, each with `V` trajectories.
    `shares` are those of an ensemble's teachers, empty where a prompt's own teacher scores alone.
    """

    world: World
    scorer: Any
    scored: list[Scored[Any]]
    position: Int[np.ndarray, " n"]
    probabilities: Float[np.ndarray, " n"]
    context: Context
    log: RequestLog = field(default_factory=RequestLog)

    def weights(self, values: Float[np.ndarray, " n"]) -> list[Float[np.ndarray, " _T"]]:
        """`values[i]` at the enumerated token of trajectory `i`, 0 at all others."""
        made = []
        for item, position, value in zip(self.scored, self.position, values, strict=True):
            weight = np.zeros(len(item.trajectory))
            weight[position] = value
            made.append(weight)
        return made

    def alone(self) -> list[Scored[Any]]:
        """Trajectories with everything but the enumerated token as context, which was not sampled."""
        made = []
        for item, position in zip(self.scored, self.position, strict=True):
            mask = np.zeros_like(item.trajectory.loss_mask)
            mask[position] = item.trajectory.loss_mask[position]
            made.append(replace(item, trajectory=replace(item.trajectory, loss_mask=mask)))
        return made

    def support_is_fixed(self) -> bool:
        """Whether the scores of a state are about the same ids whichever token was sampled there."""
        members = self._support()
        return bool((members == members[:, :1]).all())

    def states(
        self,
        student: TinyModel,
        teachers: Mapping[str, TinyModel],
        credit: Float[np.ndarray, "n ..."],
        target: Float[np.ndarray, "s V"],
    ) -> States:
        """Enumerated states, in order, in float64; differentiable in `student`."""
        firsts = [self.scored[i].trajectory for i in range(0, len(self.scored), self.world.vocabulary)]
        probabilities = torch.from_numpy(self.probabilities).reshape(len(firsts), -1)
        return States(
            student=self._at(student, firsts, ContextIds.STUDENT),
            teacher=self._taught(teachers, firsts).detach(),
            behavior=probabilities.log(),
            support=torch.from_numpy(self._support()[:, 0]),
            credit=torch.from_numpy(credit).reshape(*probabilities.shape, *credit.shape[1:]),
            target=torch.from_numpy(target),
        )

    def _at(self, model: TinyModel, firsts: list[Trajectory], context: ContextIds) -> Float[Tensor, "n V"]:
        texts = [(context.of(t.prompt), t.token_ids) for t in firsts]
        positions = self.position[:: self.world.vocabulary]
        return torch.stack([row[p] for row, p in zip(model.logprobs(texts), positions, strict=True)])

    def _taught(self, teachers: Mapping[str, TinyModel], firsts: list[Trajectory]) -> Float[Tensor, "n V"]:
        """Log-probabilities of the prompts' own teachers, of an ensemble's mixture, or of a product of teachers."""
        contexts = getattr(self.scorer, "contexts", {})
        logprobs = {
            name: self._at(model, firsts, contexts.get(name, ContextIds.TEACHER)) for name, model in teachers.items()
        }
        shares = getattr(self.scorer, "shares", None)
        if shares and getattr(self.scorer, "unnormalized", False):
            powers = {name: share / sum(shares.values()) for name, share in shares.items()}
            return torch.stack([power * logprobs[name] for name, power in powers.items()]).sum(0).log_softmax(-1)
        if shares:
            parts = [logprobs[name] + np.log(share / sum(shares.values())) for name, share in shares.items()]
            return torch.stack(parts).logsumexp(0)
        return torch.stack([logprobs[t.prompt.teacher][i] for i, t in enumerate(firsts)])

    def _support(self) -> np.ndarray:
        members = np.ones((len(self.scored), self.world.vocabulary), dtype=bool)
        for member, item, position in zip(members, self.scored, self.position, strict=True):
            if isinstance(item.scores, TopKScores):
                member[:] = False
                member[np.asarray(item.scores.topk_ids)[position]] = True
        return members.reshape(-1, self.world.vocabulary, self.world.vocabulary)


async def enumerate_world(rollout: Any, scorer: Any, world: World) -> Enumeration:
    """Enumerate `world`: all trajectories of `rollout`, scored by `scorer`."""
    log = RequestLog()
    context = engines(world, log)
    scored: list[Scored[Any]] = []
    for _, group in groupby(world.prompts, key=lambda prompt: prompt.id):
        trajectories: list[Trajectory] = await rollout(list(group), context)
        scores = await scorer(trajectories, context)
        scored += [Scored(trajectory=t, scores=s) for t, s in zip(trajectories, scores, strict=True)]
    v = world.vocabulary
    index = np.arange(len(scored))
    position = np.asarray(world.positions)[index // v % len(world.positions)]
    if len(scored) != len(world.prompts) or any(
        len(s.trajectory) <= p
        or s.trajectory.token_ids[p] != i % v
        or s.trajectory.sample != i % (v * len(world.positions))
        for i, s, p in zip(index, scored, position, strict=True)
    ):
        raise DataError(
            f"rollout {type(rollout).__name__} does not keep the completions of its engines, one per prompt in order "
            "and numbered so (`sample`), so its states cannot be enumerated; certify its objective in a method with "
            "rollout StudentRollout"
        )
    probabilities = np.exp(
        [_sampling_logprob(s.trajectory, int(p), log) for s, p in zip(scored, position, strict=True)]
    ).reshape(-1, v)
    probabilities = (probabilities / probabilities.sum(-1, keepdims=True)).reshape(-1)
    return Enumeration(
        world=world,
        scorer=scorer,
        scored=scored,
        position=position,
        probabilities=probabilities,
        context=context,
        log=log,
    )


def _sampling_logprob(trajectory: Trajectory, position: int, log: RequestLog) -> float:
    """Log-probability with which a token was sampled: that of the engine, or else of the trajectory itself."""
    generation = log.generations.get((trajectory.prompt.id, trajectory.sample))
    if generation is None:
        return float(trajectory.behavior.logprobs[position])
    return float(generation.logprobs[position, int(trajectory.token_ids[position])])


def enumerated(rollout: Any, scorer: Any, world: World) -> Enumeration:
    """Run `enumerate_world` outside of an event loop."""
    return awaited(enumerate_world(rollout, scorer, world))
