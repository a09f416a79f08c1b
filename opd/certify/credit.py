"""Credit by definition: computed from the grader and the models, never from the scorer under test."""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int32

from opd.certify.engines import IdTokenizer, reward
from opd.certify.enumeration import Enumeration
from opd.certify.models import TinyModel
from opd.types import (
    AdvantageScores,
    CreditScores,
    DeltaScores,
    DeviationScores,
    EvidenceScores,
    Prompt,
    Scored,
    StopReason,
    TopKReturnScores,
    TopKScores,
    Trajectory,
)

Credit = list[Float[np.ndarray, "_T ..."]]
"""Signed credit of every token of a text, or several numbers of each in a last axis."""


def scorer_credit(scored: list[Scored[Any]]) -> Credit | None:
    """Signed credit of every token as the scorer gave it; None where a scorer gives none."""
    match scored[0].scores:
        case AdvantageScores():
            return [np.asarray(s.scores.advantages, dtype=np.float64) for s in scored]
        case TopKReturnScores():
            return [np.asarray(s.scores.returns, dtype=np.float64) for s in scored]
        case CreditScores():
            return [np.asarray(s.scores.credit, dtype=np.float64) for s in scored]
        case EvidenceScores():
            return [np.asarray(s.scores.logprobs - s.scores.plain, dtype=np.float64) for s in scored]
        case DeltaScores():
            return [np.asarray(s.scores.logprobs - s.scores.base, dtype=np.float64) for s in scored]
        case DeviationScores():
            return [np.stack([s.scores.falls, s.scores.rises], axis=-1).astype(np.float64) for s in scored]
    return None


def credit_by_definition(enumeration: Enumeration, teachers: Mapping[str, TinyModel]) -> Credit | None:
    """Signed credit of every token by definition; None where no definition is known for the scorer's fields."""
    scorer = enumeration.scorer
    match enumeration.scored[0].scores:
        case AdvantageScores() if _has(scorer, "judge", "before", "after", "yes", "no", "scale_by_std", "epsilon"):
            return _advantages(enumeration, scorer.scale_by_std, _verdicts(enumeration, teachers))
        case AdvantageScores() if _has(scorer, "scale_by_std", "epsilon"):
            return _advantages(enumeration, scorer.scale_by_std, rewards(enumeration.scored))
        case AdvantageScores() if _has(scorer, "shape", "later", "normalized", "epsilon"):
            return _teacher_advantages(enumeration, teachers)
        case TopKReturnScores() if _has(scorer, "discount", "length_normalized", "reward_scale"):
            return _own_returns(enumeration, teachers)
        case CreditScores() if _has(scorer, "scale_by_std", "epsilon"):
            return _advantages(enumeration, scorer.scale_by_std, rewards(enumeration.scored))
        case CreditScores() if getattr(scorer, "looks_ahead", False) and _has(scorer, "threshold", "epsilon"):
            return _lookaheads(enumeration, teachers)
        case EvidenceScores():
            return _evidence(enumeration, teachers)
        case DeltaScores() if _has(scorer, "base", "base_reads"):
            return _deltas(enumeration, teachers)
        case DeviationScores() if hasattr(scorer, "probes"):
            return _deviations(enumeration, teachers)
    return None


def _has(scorer: Any, *names: str) -> bool:
    """Whether a scorer has all fields that a definition reads: one that has some of them has credit of its own."""
    return all(hasattr(scorer, name) for name in names)


def credit_at_positions(enumeration: Enumeration, teachers: Mapping[str, TinyModel]) -> Float[np.ndarray, "n ..."]:
    """Credit of every enumerated token: by definition, or else as the scorer gave it, or 0."""
    credit = credit_by_definition(enumeration, teachers) or scorer_credit(enumeration.scored)
    if credit is None:
        return np.zeros(len(enumeration.scored))
    return np.asarray([c[p] for c, p in zip(credit, enumeration.position, strict=True)])


def rewards(scored: list[Scored[Any]]) -> Float[np.ndarray, " n"]:
    """Reward of the grader for each text; 0 for a text that the token limit cut."""
    return np.asarray([reward_of(s.trajectory) for s in scored])


def reward_of(text: Trajectory) -> float:
    """Reward of the grader; 0 for a text that the token limit cut."""
    return reward(" ".join(map(str, text.token_ids.tolist()))) * (text.stop is StopReason.END)


def _advantages(enumeration: Enumeration, scaled: bool, rewarded: Float[np.ndarray, " n"]) -> Credit:
    """`A_i = r_i - mean(r)` of a prompt's answers, divided by their standard deviation (n - 1) if scaled."""
    made = []
    for _, group in groupby(range(len(rewarded)), key=lambda i: enumeration.scored[i].trajectory.prompt.id):
        members = list(group)
        mean = sum(rewarded[members]) / len(members)
        variance = sum((rewarded[members] - mean) ** 2) / (len(members) - 1)
        scale = variance**0.5 + enumeration.scorer.epsilon if scaled else 1.0
        made += [np.full(len(enumeration.scored[i].trajectory), (rewarded[i] - mean) / scale) for i in members]
    return made


def judged(scorer: Any, trajectory: Trajectory) -> list[tuple[Int32[np.ndarray, " Q"], Int32[np.ndarray, " 1"]]]:
    """Contexts and tokens that a judging scorer asks its judge about: the verdicts behind the answer."""
    prompt, encode = trajectory.prompt, IdTokenizer().encode
    said = " ".join(map(str, trajectory.token_ids.tolist()))
    before = scorer.before.replace("{prompt}", " ".join(map(str, prompt.student_ids.tolist())))
    text = encode(f"{before} {said} {scorer.after}".replace("{answer}", prompt.answer))
    return [(text, encode(verdict)[:1]) for verdict in (scorer.yes, scorer.no)]


def _verdicts(enumeration: Enumeration, teachers: Mapping[str, TinyModel]) -> Float[np.ndarray, " n"]:
    """Probability of yes among yes and no."""
    model, made = teachers[enumeration.scorer.judge], []
    for item in enumeration.scored:
        yes, no = (
            float(model.logprobs([(ids, token)])[0][0, int(token[0])].exp())
            for ids, token in judged(enumeration.scorer, item.trajectory)
        )
        made.append(yes / (yes + no))
    return np.asarray(made)


def _teacher_advantages(enumeration: Enumeration, teachers: Mapping[str, TinyModel]) -> Credit:
    """Shaped log-ratio of each token, with the mean of later ones, relative to all tokens of the group."""
    scorer, made = enumeration.scorer, list[Float[np.ndarray, " _T"]]()
    masks = [item.trajectory.loss_mask for item in enumeration.scored]  # context has no reward
    for log_ratios, own in zip(_log_ratios(enumeration, teachers), masks, strict=True):
        reward = scorer.shape.reward(torch.from_numpy(log_ratios[own])).numpy()
        later = [float(np.mean(reward[t + 1 :])) if t + 1 < len(reward) else 0.0 for t in range(len(reward))]
        made.append(reward + later if scorer.later else reward)
    if scorer.normalized:
        number = range(len(made))
        for _, group in groupby(number, key=lambda i: enumeration.scored[i].trajectory.prompt.id):
            members = list(group)
            every = [value for i in members for value in made[i].tolist()]
            mean = sum(every) / len(every)
            spread = (sum((value - mean) ** 2 for value in every) / (len(every) - 1)) ** 0.5
            for i in members:
                made[i] = (made[i] - mean) / (spread + scorer.epsilon)
    return [_at(mask, values) for mask, values in zip(masks, made, strict=True)]


def _at(mask: np.ndarray, values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " _T"]:
    """`values` where the mask is True, 0 elsewhere."""
    every = np.zeros(len(mask))
    every[mask] = values
    return every


def _log_ratios(enumeration: Enumeration, teachers: Mapping[str, TinyModel]) -> Credit:
    """`log q - log mu` of every sampled token."""
    texts = [item.trajectory for item in enumeration.scored]
    scores = {
        name: model.logprobs([(t.prompt.teacher_ids, t.token_ids) for t in texts]) for name, model in teachers.items()
    }
    made = []
    for i, text in enumerate(texts):
        taught = scores[text.prompt.teacher][i]
        drawn = enumeration.log.generations[text.prompt.id, text.sample].logprobs.to(taught.dtype)[: len(text)]
        own = torch.as_tensor(text.token_ids).long()[:, None]
        made.append((taught - drawn).gather(-1, own)[:, 0].detach().double().numpy())
    return made


def _evidence(enumeration: Enumeration, teachers: Mapping[str, TinyModel]) -> Credit:
    """`log q(y | what the teacher reads) - log q(y | what the student reads)` of every sampled token."""
    made = []
    for item in enumeration.scored:
        t, model = item.trajectory, teachers[item.trajectory.prompt.teacher]
        contexts = (t.prompt.teacher_ids, t.prompt.student_ids)
        own = torch.as_tensor(t.token_ids).long()[:, None]
        shown, plain = (model.logprobs([(ids, t.token_ids)])[0].gather(-1, own)[:, 0] for ids in contexts)
        made.append((shown - plain).detach().double().numpy())
    return made


def _deltas(enumeration: Enumeration, teachers: Mapping[str, TinyModel]) -> Credit:
    """`log q - log base` of every sampled token."""
    made, scorer = [], enumeration.scorer
    for text in (item.trajectory for item in enumeration.scored):
        own, prompt = torch.as_tensor(text.token_ids).long()[:, None], text.prompt
        models = ((teachers[prompt.teacher], prompt.teacher_ids), (teachers[scorer.base], scorer.base_reads.of(prompt)))
        tuned, base = (model.logprobs([(ids, text.token_ids)])[0].gather(-1, own)[:, 0] for model, ids in models)
        made.append((tuned - base).detach().double().numpy())
    return made


def probed_contexts(scorer: Any, prompt: Prompt) -> list[Int32[np.ndarray, " Q"]]:
    """Contexts in which a scorer that probes its teacher has it read a text again; of any other scorer none."""
    known = {"{prompt}": " ".join(map(str, prompt.student_ids.tolist())), "{answer}": prompt.answer}
    texts = list(getattr(scorer, "probes", {}).values())
    for name, value in known.items():
        texts = [text.replace(name, value) for text in texts]
    return [IdTokenizer().encode(text) for text in texts]


def _deviations(enumeration: Enumeration, teachers: Mapping[str, TinyModel]) -> Credit:
    """Largest fall and largest rise of each sampled token's log-probability in any context that is probed."""
    made = []
    for text in (item.trajectory for item in enumeration.scored):
        model, own = teachers[text.prompt.teacher], torch.as_tensor(text.token_ids).long()[:, None]
        contexts = [text.prompt.teacher_ids, *probed_contexts(enumeration.scorer, text.prompt)]
        rows = model.logprobs([(ids, text.token_ids) for ids in contexts])
        plain, *others = (row.gather(-1, own)[:, 0].detach().double().numpy() for row in rows)
        falls, rises = (np.max([sign * (other - plain) for other in others], axis=0) for sign in (-1, 1))
        made.append(np.stack([np.maximum(falls, 0.0), np.maximum(rises, 0.0)], axis=-1))
    return made


def _own_returns(enumeration: Enumeration, teachers: Mapping[str, TinyModel]) -> Credit:
    """Returns of a text's own tokens, between which words of an environment count for nothing; 0 at those."""
    masks = [item.trajectory.loss_mask for item in enumeration.scored]
    return [
        _at(own, _returns(enumeration.scorer, log_ratios[own]))
        for own, log_ratios in zip(masks, _log_ratios(enumeration, teachers), strict=True)
    ]


def _returns(scorer: Any, log_ratios: Float[np.ndarray, " _T"]) -> Float[np.ndarray, " _T"]:
    """`R_t = sum_{j > t} discount^(j - t - 1) r_j`, over the number of its terms if length-normalized."""
    tokens = len(log_ratios)
    from_here = np.convolve(log_ratios[::-1], float(scorer.discount) ** np.arange(tokens))[:tokens][::-1]
    own = begins_with_own(scorer)  # then the sum begins at t
    total = (from_here if own else np.append(from_here[1:], 0.0)) * scorer.reward_scale
    return total / np.maximum(np.arange(tokens)[::-1] + own, 1) if scorer.length_normalized else total


def _lookaheads(enumeration: Enumeration, teachers: Mapping[str, TinyModel]) -> Credit:
    """Standing of a teacher's confidence after a token among those after the likeliest ones, where entropy is high."""
    scorer, made, known = enumeration.scorer, list[Float[np.ndarray, " _T"]](), dict[tuple[bytes, str], np.ndarray]()
    for text in (item.trajectory for item in enumeration.scored):
        drawn = enumeration.log.generations[text.prompt.id, text.sample].logprobs.double().exp().numpy()
        assert isinstance(text.behavior, TopKScores)
        likeliest = np.argsort(-drawn, axis=-1, kind="stable")[:, : np.shape(text.behavior.topk_ids)[1]]
        credit = np.zeros(len(text))
        for t in range(len(text) - 1):
            kept = drawn[t, likeliest[t]]
            mass = np.append(kept, max(1 - kept.sum(), 0.0))
            if -(mass * np.log(np.where(mass > 0, mass, 1.0))).sum() <= scorer.threshold:
                continue
            before = np.concatenate([text.prompt.teacher_ids, text.token_ids[:t]])
            key = before.tobytes(), text.prompt.teacher
            if key not in known:
                then = [(before, np.asarray([token, 0])) for token in range(drawn.shape[1])]
                rows = teachers[text.prompt.teacher].logprobs(then)
                known[key] = np.asarray([float(row[1].max().exp()) for row in rows])
            group, own = known[key][likeliest[t]], known[key][text.token_ids[t]]
            spread = np.std(group)
            credit[t] = (own - np.mean(group)) / (spread + scorer.epsilon) if spread > scorer.epsilon else 0.0
        made.append(credit)
    return made


def begins_with_own(scorer: Any) -> bool:
    """Whether the return of a token has the token's own reward, as the scorer declares."""
    return bool(getattr(scorer, "own_reward", False))
