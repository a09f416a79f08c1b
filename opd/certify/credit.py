"""Credit as it is defined: computed from the grader and the models, never from the scorer under test."""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from opd.certify.engines import reward
from opd.certify.models import TinyModel
from opd.certify.states import Enumerated
from opd.types import AdvantageScores, Scored, StopReason, TopKReturnScores

Credit = list[Float[np.ndarray, " _T"]]


def given(scored: list[Scored[Any]]) -> Credit | None:
    """The signed credit of every token as a scorer gave it; None where a scorer gives none."""
    match scored[0].scores:
        case AdvantageScores():
            return [np.asarray(s.scores.advantages, dtype=np.float64) for s in scored]
        case TopKReturnScores():
            return [np.asarray(s.scores.returns, dtype=np.float64) for s in scored]
    return None


def defined(seen: Enumerated, teachers: Mapping[str, TinyModel]) -> Credit | None:
    """The same by definition; None where no definition is known for the scorer's fields."""
    scorer = seen.scorer
    match seen.scored[0].scores:
        case AdvantageScores() if hasattr(scorer, "scale_by_std"):
            return _advantages(seen, scorer.scale_by_std)
        case TopKReturnScores() if hasattr(scorer, "discount"):
            return [_returns(scorer, praise) for praise in _praise(seen, teachers)]
    return None


def at_places(seen: Enumerated, teachers: Mapping[str, TinyModel]) -> Float[np.ndarray, " n"]:
    """The credit of every enumerated token: by definition, or else as given, or 0."""
    credit = defined(seen, teachers) or given(seen.scored)
    if credit is None:
        return np.zeros(len(seen.scored))
    return np.asarray([c[p] for c, p in zip(credit, seen.place, strict=True)])


def rewards(scored: list[Scored[Any]]) -> Float[np.ndarray, " n"]:
    """What the grader gives for each text; a text that the token limit cut is wrong."""
    texts = [" ".join(map(str, s.trajectory.token_ids.tolist())) for s in scored]
    ended = [s.trajectory.stop is StopReason.END for s in scored]
    return np.asarray([reward(text) * end for text, end in zip(texts, ended, strict=True)])


def _advantages(seen: Enumerated, scaled: bool) -> Credit:
    """`A_i = r_i - mean(r)` of a prompt's answers, divided by their standard deviation (n - 1) if scaled."""
    earned, made = rewards(seen.scored), []
    for _, group in groupby(range(len(earned)), key=lambda i: seen.scored[i].trajectory.prompt.id):
        members = list(group)
        mean = sum(earned[members]) / len(members)
        variance = sum((earned[members] - mean) ** 2) / (len(members) - 1)
        scale = variance**0.5 + seen.scorer.epsilon if scaled else 1.0
        made += [np.full(len(seen.scored[i].trajectory), (earned[i] - mean) / scale) for i in members]
    return made


def _praise(seen: Enumerated, teachers: Mapping[str, TinyModel]) -> Credit:
    """`log q - log mu` of every written token."""
    texts = [item.trajectory for item in seen.scored]
    read = {
        name: model.logprobs([(t.prompt.teacher_ids, t.token_ids) for t in texts]) for name, model in teachers.items()
    }
    made = []
    for i, text in enumerate(texts):
        taught = read[text.prompt.teacher][i]
        drawn = seen.notes.written[text.prompt.id, text.sample].chances.to(taught.dtype)
        own = torch.as_tensor(text.token_ids).long()[:, None]
        made.append((taught - drawn).gather(-1, own)[:, 0].detach().double().numpy())
    return made


def _returns(scorer: Any, praise: Float[np.ndarray, " _T"]) -> Float[np.ndarray, " _T"]:
    """`R_t = sum_{j > t} discount^(j - t - 1) r_j`, over the number of its terms if length-normalized."""
    tokens = len(praise)
    from_here = np.convolve(praise[::-1], float(scorer.discount) ** np.arange(tokens))[:tokens][::-1]
    own = begins_with_own(scorer)  # then the sum begins at t
    total = (from_here if own else np.append(from_here[1:], 0.0)) * scorer.reward_scale
    return total / np.maximum(np.arange(tokens)[::-1] + own, 1) if scorer.length_normalized else total


def begins_with_own(scorer: Any) -> bool:
    """Whether a scorer says that a token's own reward is in its return."""
    return bool(getattr(scorer, "own_reward", False))
