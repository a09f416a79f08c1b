"""Checks of a method's token weights in small steps, with readings that are made up: all that a weight may look at."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from opd.certify.certificate import Finding, Row, Skipped
from opd.certify.checks.purity import content_of, fresh_random_state, random_state
from opd.certify.checks.weighing import one_token, reading_by_definition, weights_by_definition
from opd.certify.fitting import other_settings
from opd.certify.gradients import EXACT, SAME, Case, every_token, logits, relative_difference
from opd.errors import ConfigurationError
from opd.loss.chunked import StudentLogits
from opd.method.method import readings_of
from opd.ports import Reading
from opd.types import Batch, Scored

WEIGHED = "weights follow their text in any order, and again"
NUMBERS = "weights are numbers in degenerate steps"
MASKED = "weights do not depend on what is masked"
PLACED = "weights stand at the token that they are made of"
MEANT = "weights are what they are defined to be"
READ = "readings are of their token alone"
READINGS_MEANT = "readings are what they are defined to be"
NONE = "the method has no token weights"

Weights = list[Float[np.ndarray, " _T"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """Texts of a step with readings at every sampled token."""

    name: str
    items: list[Scored[Any]]


def check_weights(case: Case) -> Iterator[Finding]:
    """Weights are a pure function of the step: its texts in any order, and what was sampled in them."""
    parts = case.method.weights
    if not parts:
        yield from (
            Skipped(name=name, why=NONE) for name in (WEIGHED, NUMBERS, MASKED, PLACED, MEANT, READ, READINGS_MEANT)
        )
        return
    step = _with_readings(_asked(case), "a step", _texts(case), seed=0)
    yield Row(name=WEIGHED, measured=max(_reordered(case, part, step) for part in parts.values()), tolerance=SAME)
    wrong = sum(_not_numbers(case, name, part, one) for name, part in parts.items() for one in _degenerate(case))
    yield Row(name=NUMBERS, measured=float(wrong), tolerance=0.0)
    yield Row(name=MASKED, measured=max(_unmasked(case, part) for part in parts.values()), tolerance=SAME)
    within = _with_readings(_asked(case), "texts with context", _begun_by_others(_texts(case)), seed=0).items
    shifted = sum(_shifted(case, part, items) for part in parts.values() for items in (step.items, within))
    yield Row(name=PLACED, measured=float(shifted), tolerance=0.0)
    yield _defined(case)
    yield _readings_alone(case)
    yield _readings_defined(case)


def _asked(case: Case) -> Sequence[Reading]:
    return readings_of(*case.method.weights.values())


def _texts(case: Case) -> list[Scored[Any]]:
    """Some twenty texts of all prompts, of different lengths."""
    every = case.enumeration.scored
    return [every[i] for i in range(0, len(every), max(1, len(every) // 20))]


def _with_readings(
    asked: Sequence[Reading], name: str, items: Sequence[Scored[Any]], seed: int, of: Callable[[float], float] = float
) -> _Step:
    """A step with readings drawn from (0, 1), each passed through `of`; NaN where nothing was sampled."""
    draw = np.random.default_rng(seed)

    def drawn(item: Scored[Any]) -> Float[np.ndarray, " _T"]:
        values = np.asarray([of(x) for x in draw.uniform(0.01, 0.99, len(item.trajectory))], dtype=np.float32)
        return np.where(item.trajectory.loss_mask, values, np.float32(np.nan))

    return _Step(name=name, items=[replace(item, readings={r: drawn(item) for r in asked}) for item in items])


def _weigh(case: Case, part: Any, items: Sequence[Scored[Any]]) -> Weights:
    """Weights of a step at its sampled tokens, 0 at others."""
    found = part(items, case.enumeration.context)
    return [np.asarray(w) * item.trajectory.loss_mask for w, item in zip(found, items, strict=True)]


def _reordered(case: Case, part: Any, step: _Step) -> float:
    """Difference in another order, and after another step; 1.0 where a part changed its input or the random state."""
    items = step.items
    before, random = content_of(items), fresh_random_state()
    first = _weigh(case, part, items)
    order = np.random.default_rng(0).permutation(len(items))
    turned = _weigh(case, part, [items[i] for i in order])
    _weigh(case, part, _with_readings(_asked(case), "another step", items[::2], seed=1, of=lambda x: 100 * x).items)
    again = _weigh(case, part, items)
    changed = before != content_of(items) or random != random_state()
    back = [turned[i] for i in np.argsort(order)]
    return max(_apart(first, back), _apart(first, again), float(changed))


def _apart(a: Weights, b: Weights) -> float:
    return relative_difference(torch.from_numpy(np.concatenate(a)), torch.from_numpy(np.concatenate(b)))


def _degenerate(case: Case) -> Iterator[_Step]:
    """Steps in which something that a weight divides by, or takes the greatest of, may not be there."""
    texts = _texts(case)
    nothing = replace(
        texts[0], trajectory=replace(texts[0].trajectory, loss_mask=np.zeros(len(texts[0].trajectory), bool))
    )
    yield _with_readings(_asked(case), "one text", texts[:1], seed=2)
    yield _with_readings(_asked(case), "one text of one token", [one_token(texts[0])], seed=2)
    yield _with_readings(
        _asked(case), "a text of which nothing was sampled beside another", [nothing, texts[1]], seed=2
    )
    yield _with_readings(_asked(case), "texts that are all alike", [texts[0]] * 3, seed=2, of=lambda _: 0.5)
    yield _with_readings(_asked(case), "readings that are all 0", texts, seed=2, of=lambda _: 0.0)
    yield _with_readings(_asked(case), "readings of 30 nats", texts, seed=2, of=lambda x: 30 * x)
    unlikely = [_unlikely(item) for item in texts]
    yield _with_readings(_asked(case), "tokens that the teacher gives a log-probability of -30", unlikely, seed=2)


def _unlikely(item: Scored[Any]) -> Scored[Any]:
    """A text whose tokens the teacher hardly finds possible, where scores say so."""
    scores: Any = item.scores
    if not hasattr(scores, "logprobs"):
        return item
    return replace(item, scores=replace(scores, logprobs=np.minimum(np.asarray(scores.logprobs), -30.0)))


def _not_numbers(case: Case, name: str, part: Any, step: _Step) -> int:
    """Number of texts whose weights are not one finite number of 0 or more per token."""
    try:
        with np.errstate(all="ignore"):
            found = part(step.items, case.enumeration.context)
    except (ArithmeticError, ValueError, IndexError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"weight {name!r} {type(part).__name__} cannot weigh a step of {step.name} ({type(error).__name__}: "
            f"{error}), which may come up in a run; give every token a finite weight of 0 or more there"
        ) from error
    wrong = len(found) != len(step.items)
    for weights, item in zip(found, step.items, strict=False):
        sampled = np.asarray(weights, dtype=np.float64)
        wrong += sampled.shape != (len(item.trajectory),) or not bool((sampled[item.trajectory.loss_mask] >= 0).all())
        wrong += not np.isfinite(sampled).all()
    return int(wrong)


def _unmasked(case: Case, part: Any) -> float:
    """Change of the weights of sampled tokens with the scores of others: those of a tool, or of an environment."""
    kept = [np.arange(len(item.trajectory)) % 2 == 0 for item in _texts(case)]
    texts = [
        replace(item, trajectory=replace(item.trajectory, loss_mask=mask))
        for item, mask in zip(_texts(case), kept, strict=True)
    ]
    first = _with_readings(_asked(case), "texts with context", texts, seed=3).items
    other = [
        replace(item, scores=item.scores.take(np.where(mask, np.arange(len(mask)), 0)))
        for item, mask in zip(first, kept, strict=True)
    ]
    return _apart(_weigh(case, part, first), _weigh(case, part, other))


def _shifted(case: Case, part: Any, items: Sequence[Scored[Any]]) -> int:
    """Number of inputs that move the weight of another token, always as far away, and never that of their own.

    Texts of one or two tokens tell nothing: with weights that are 1 on average, one falls there as the other rises.
    """
    before = _weigh(case, part, items)
    tokens = [(n, t) for n, item in enumerate(items) if len(item.trajectory) > 2 for t in _sampled(item)]
    wrong = 0
    for change in _changes(items):
        places: set[int] = set()
        for (number, token), far in product(tokens, (-20.0, 20.0)):
            moved = _weigh(case, part, [*items[:number], change(items[number], token, far), *items[number + 1 :]])
            places |= _moved(moved[number] - before[number], token)
            if 0 in places:
                break
        wrong += len(places) == 1 and 0 not in places
    return wrong


def _sampled(item: Scored[Any]) -> list[int]:
    return np.flatnonzero(item.trajectory.loss_mask).tolist()


def _begun_by_others(items: Sequence[Scored[Any]]) -> list[Scored[Any]]:
    """Texts behind two tokens of context: what is computed of sampled ones alone must be put back at their places."""
    return [_begun_by_other(item) for item in items if len(item.trajectory) > 2]


def _begun_by_other(item: Scored[Any]) -> Scored[Any]:
    rows = np.concatenate([np.zeros(2, dtype=np.int64), np.arange(len(item.trajectory))])
    text = item.trajectory
    longer = replace(
        text,
        token_ids=text.token_ids[rows],
        behavior=text.behavior.take(rows),
        loss_mask=text.loss_mask[rows] & (np.arange(len(rows)) > 1),
        versions=text.versions[rows],
    )
    return replace(item, trajectory=longer, scores=item.scores.take(rows))


def _moved(by: Float[np.ndarray, " T"], token: int) -> set[int]:
    """Distance from `token` to the one whose weight moved most; 0 if its own did, among others, and nothing if not."""
    most = np.flatnonzero(np.abs(by) > max(0.7 * np.abs(by).max(), EXACT)) - token
    return {int(most[0])} if len(most) == 1 else {0} & set(most.tolist())


_Change = Callable[[Scored[Any], int, float], Scored[Any]]


def _changes(items: Sequence[Scored[Any]]) -> Iterator[_Change]:
    """Changes of what a weight may read of one token: each of its readings, and each number of its scores."""
    for reading in items[0].readings:
        yield lambda item, token, far, of=reading: replace(
            item, readings={**item.readings, of: _with(item.readings[of], token, abs(far) if far > 0 else 0.0)}
        )
    for spec in fields(items[0].scores):
        value = getattr(items[0].scores, spec.name)
        if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind == "f":
            yield lambda item, token, far, of=spec.name: replace(
                item, scores=replace(item.scores, **{of: _with(getattr(item.scores, of), token, far)})
            )


def _with(values: np.ndarray, token: int, other: float) -> np.ndarray:
    changed = np.array(values)
    changed[token] = other
    return changed


def _defined(case: Case) -> Finding:
    """Agreement of known weights with their definition, at every legal setting."""
    errors, texts = [], [_ends_as_it_begins(item) if i % 3 == 0 else item for i, item in enumerate(_texts(case))]
    for part in case.method.weights.values():
        for one in (part, *other_settings(part), *_other_shares(part)):
            names = sorted(getattr(one, "shares", {})) or ("default", "second")
            items = _with_readings(readings_of(one), "a step", _of_teachers(texts, names), seed=0).items
            expected = weights_by_definition(one, items)
            if expected is not None:
                steps = (0, case.world.steps // 2)
                errors += [_apart(_weigh(_at(case, step), one, items), expected) for step in steps]
    if not errors:
        return Skipped(name=MEANT, why="no definition is known for these weights; the other rows hold without one")
    return Row(name=MEANT, measured=max(errors), tolerance=EXACT)


def _at(case: Case, step: int) -> Case:
    """The case at another step of its run, which a weight may read."""
    enumeration = case.enumeration
    return replace(case, enumeration=replace(enumeration, context=enumeration.context.at(step)))


def _ends_as_it_begins(item: Scored[Any]) -> Scored[Any]:
    """A text whose last token is its first one again."""
    ids = item.trajectory.token_ids.copy()
    ids[-1:] = ids[:1]
    return replace(item, trajectory=replace(item.trajectory, token_ids=ids))


def _other_shares(part: Any) -> Iterator[Any]:
    """A weight with shares of teachers, at uneven ones."""
    if hasattr(part, "shares"):
        yield replace(part, shares={"default": 3.0, "second": 1.0})


def _of_teachers(items: Sequence[Scored[Any]], names: Sequence[str]) -> list[Scored[Any]]:
    """Texts whose prompts name one teacher after the other."""
    return [
        replace(item, trajectory=replace(text, prompt=replace(text.prompt, teacher=names[i % len(names)])))
        for i, (item, text) in enumerate((item, item.trajectory) for item in items)
    ]


def _readings_defined(case: Case) -> Finding:
    """Difference between known readings and their definition, at every legal setting."""
    batch = every_token(case.enumeration)
    at = logits(case.enumeration, batch)
    taught = getattr(batch.scores, "vocabulary_logprobs", None)
    p, q = at.log_softmax(-1).detach().numpy(), None if taught is None else taught.numpy()
    errors = []
    for reading in readings_of(*case.method.weights.values()):
        for one in (reading, *other_settings(reading)):
            expected = reading_by_definition(one, p, q)
            if expected is not None:
                errors.append(relative_difference(_read((one,), at, batch)[0], torch.from_numpy(expected)))
    if not errors:
        return Skipped(name=READINGS_MEANT, why="no definition is known for these readings, or there are none")
    return Row(name=READINGS_MEANT, measured=max(errors), tolerance=EXACT)


def _readings_alone(case: Case) -> Finding:
    """Difference between readings of tokens one by one, or thousands together, and in their batch."""
    readings = readings_of(*case.method.weights.values())
    if not readings:
        return Skipped(name=READ, why="the weights declare no readings")
    batch = every_token(case.enumeration)
    at = logits(case.enumeration, batch)
    expected = _read(readings, at, batch)
    cut = torch.cat([_read(readings, at[i : i + n], batch.rows(i, i + n)) for i, n in _pieces(len(batch))], dim=1)
    return Row(name=READ, measured=relative_difference(cut, expected), tolerance=SAME)


def _pieces(tokens: int) -> Iterator[tuple[int, int]]:
    start = 0
    while start < tokens:
        size = min((1, 7, 40)[start % 3], tokens - start)
        yield start, size
        start += size


@torch.no_grad()
def _read(readings: Sequence[Reading], at: Float[Tensor, "n V"], batch: Batch[Any]) -> Float[Tensor, "R n"]:
    return torch.stack([reading(StudentLogits(logits=at), batch) for reading in readings])
