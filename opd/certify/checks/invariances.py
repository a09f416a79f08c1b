"""Checks that need no promise: invariances of a method's gradient, and its dependence on the teacher."""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd.certify.certificate import Finding, Row, Skipped, at_least
from opd.certify.checks.purity import content_of, fresh_random_state, random_state
from opd.certify.credit import credit_by_definition, scorer_credit
from opd.certify.enumeration import Enumeration
from opd.certify.gradients import (
    EXACT,
    NOTICED,
    SAME,
    UNLIMITED,
    Case,
    draws,
    enumerable,
    every_token,
    gradient,
    logit_gradients,
    logits,
    make_case,
    relative_difference,
)
from opd.certify.targets import scorer_targets, targets_by_definition, writes
from opd.loss.chunked import StudentLogits
from opd.method import promises
from opd.method.method import weigh
from opd.ports import Layout, Role, needs_of
from opd.types import Batch, CreditScores, VocabularyScores

TEACHER = ("the teacher matters", "zero where the student equals its teacher", "a shifted teacher is noticed")
TOWARDS = "a step moves the student towards its teacher"
ALONE = "a promise without a teacher asks none"
EVALUATIONS = 100


def check_teacher(case: Case) -> Iterator[Finding]:
    """The gradient depends on the teacher, is 0 where the student equals it, and differs where scores are shifted.

    Where the promise compares with no teacher, the gradient must not depend on the teacher. Of a promise whose target
    is made of both models (`rests_at`) the equal is the teacher that leaves the student where it is.
    """
    if hasattr(case.method.scorer, "judge"):  # whose verdict is a reward, also where student and judge are one model
        yield from (Skipped(name=name, why="a judge's verdict is a reward") for name in (*TEACHER, TOWARDS, ALONE))
        return
    world, exact, trained = case.world, case.exact(), case.training()
    other = make_case(case.method, world.with_teachers(world.other_teachers, writers=writes(case.method.scorer)))
    moved = relative_difference(trained, other.training())
    labeled = scorer_targets(case.enumeration) is not None
    given = _as_given(case) if labeled else _credited(case)
    if not given and relative_difference(exact, case.exact(teachers=world.other_teachers)) < NOTICED:
        why = "the promise compares with no teacher"
        yield from (Skipped(name=name, why=why) for name in (*TEACHER, TOWARDS))
        yield Row(name=ALONE, measured=moved, tolerance=0.0)
        return
    yield Skipped(name=ALONE, why="the promise compares with a teacher")
    yield at_least(TEACHER[0], moved, NOTICED)
    # A student that is shown more than itself is no equal of itself.
    same = replace(case.method, rollout=getattr(case.method.rollout, "plain", case.method.rollout))
    rests_at = getattr(case.method.objective.promise, "rests_at", 1.0)
    own = world.with_student_as_teacher(rests_at)
    equal = make_case(same, own)
    if labeled:
        yield Skipped(name=TEACHER[1], why="a target is learned from, also one of an equal, and compared with nothing")
    else:
        rest = _per_token(equal)
        if rest > EXACT and relative_difference(trained, exact) <= EXACT:  # a baseline, whose mean over draws is 0
            rest = float(equal.training().abs().max()) / rest
        yield Row(name=TEACHER[1], measured=rest, tolerance=EXACT)
    wrong = relative_difference(make_case(case.method, replace(world, shift=1)).training(), exact)
    shifted = make_case(same, replace(own, shift=1))
    # Where a teacher is compared with itself in two contexts, or with its base, a shift of both at once is seen by its
    # gradient alone.
    within = labeled or hasattr(case.method.scorer, "reads") or hasattr(case.method.scorer, "base")
    measured = wrong if within else min(_per_token(shifted), wrong)
    yield at_least(TEACHER[2], measured, NOTICED)
    directions = (promises.ReverseKL(), promises.ForwardKL())
    yield at_least(TOWARDS, max(_cosine(trained, case.exact(d)) for d in directions), 0.1)


def _as_given(case: Case) -> bool:
    """Whether targets are known as the scorer gave them alone, and it declares a teacher: the promise has that one."""
    return _asks_a_teacher(case) and targets_by_definition(case.enumeration, case.world.teachers) is None


def _credited(case: Case) -> bool:
    """Whether credit is known as the scorer gave it alone, and it declares a teacher: the promise has that one's."""
    enumeration = case.enumeration
    known = (
        scorer_credit(enumeration.scored) is None or credit_by_definition(enumeration, case.world.teachers) is not None
    )
    return _asks_a_teacher(case) and not known


def _asks_a_teacher(case: Case) -> bool:
    return bool({need.role for need in needs_of(case.method.scorer)} & {Role.READER, Role.WRITER})


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def _per_token(case: Case) -> float:
    """Largest gradient with respect to the logits that any single sampled token causes, a credit beside it left out.

    What `CreditScores` credit is no comparison with the teacher, so it need not vanish where the student equals it.
    """
    batch = every_token(case.enumeration)
    if isinstance(batch.scores, CreditScores):
        batch = replace(batch, scores=replace(batch.scores, credit=torch.zeros_like(batch.scores.credit)))
    return float(logit_gradients(enumerable(case.method.objective), logits(case.enumeration, batch), batch).abs().max())


def check_steps(case: Case) -> Iterator[Finding]:
    """The gradient of a step does not depend on micro-batches, ranks, chunks, order or earlier evaluations."""
    enumeration, weights = uneven_step(case)
    longest = max(len(s.trajectory.prompt.student_ids) + len(s.trajectory) for s in enumeration.scored)
    objective, normalizer = case.method.objective, case.method.normalizer
    expected = gradient(enumeration, weights, objective, normalizer)

    def differs(ranks: int = 1, tokens: int = UNLIMITED, **how: Any) -> float:
        layout = Layout(ranks=ranks, tokens_per_microbatch=tokens)
        return relative_difference(
            gradient(enumeration, weights, objective, normalizer, layout=layout, **how), expected
        )

    order = np.random.default_rng(0).permutation(len(weights))
    measured = {
        "micro-batch size": max(differs(tokens=longest * n) for n in (2, 5)),
        "packing and padding (every trajectory alone)": differs(tokens=longest),
        "number of ranks": max(differs(ranks=n, tokens=longest * 3) for n in (2, 3)),
        "ranks without work": differs(ranks=len(weights) + 3),
        "scale of the weights": _scaled(case, expected, weights, enumeration),
        "chunks of the loss": max(differs(chunk=n) for n in (1, 7)),
        "order of the trajectories": differs(order=order),
        "evaluated before": _repeated(case, expected, weights, enumeration),
    }
    yield from (Row(name=f"invariance: {name}", measured=x, tolerance=SAME) for name, x in measured.items())


def _scaled(case: Case, expected: Tensor, weights: list[np.ndarray], enumeration: Enumeration) -> float:
    """Difference from linearity in the token weights, apart from the normalizer."""
    more, divisor = [4.0 * w for w in weights], case.method.normalizer
    scaled = gradient(enumeration, more, case.method.objective, divisor) * divisor(more)
    return relative_difference(scaled, 4.0 * expected * divisor(weights))


def _repeated(case: Case, expected: Tensor, weights: list[np.ndarray], enumeration: Enumeration) -> float:
    """Difference between repeated evaluations, or 1.0 where the global random state was changed."""
    batch, before = every_token(case.enumeration), fresh_random_state()
    few = batch.rows(0, 3)
    at = logits(case.enumeration, batch)[:3]
    first = logit_gradients(case.method.objective, at, few)
    later = [logit_gradients(case.method.objective, at, few) for _ in range(EVALUATIONS)]
    again = gradient(enumeration, weights, case.method.objective, case.method.normalizer)
    drawn = float(before != random_state())
    changed = float(_changes_its_batch(case, at))
    return max(
        *(relative_difference(first, one) for one in later), relative_difference(again, expected), drawn, changed
    )


def _changes_its_batch(case: Case, at: Tensor) -> bool:
    """Whether an objective writes into the batch that it is given, whose numbers are so far that any clamp acts."""
    batch = every_token(case.enumeration).rows(0, 3)
    far = replace(batch, behavior_logprobs=40 * batch.behavior_logprobs, scores=_scaled_up(batch.scores))
    before = content_of(far)
    logit_gradients(case.method.objective, at, far)
    return content_of(far) != before


def _scaled_up(scores: Any) -> Any:
    """Scores whose numbers are 40 times as far from 0; ids, counts and probabilities as they are."""
    kept = ("target_probs", "targets", "shares")
    return replace(
        scores,
        **{
            f.name: 40 * value
            for f in fields(scores)
            if isinstance(value := getattr(scores, f.name), Tensor) and value.is_floating_point() and f.name not in kept
        },
    )


def uneven_step(case: Case) -> tuple[Enumeration, list[np.ndarray]]:
    """Step of some fifteen trajectories with the method's own weights, made uneven."""
    enumeration = case.enumeration
    pick = [i for i in range(0, len(enumeration.scored), 7) if enumeration.probabilities[i] > 0][:12]
    others = [
        i for i in range(len(enumeration.scored) - 1, 0, -11) if enumeration.probabilities[i] > 0
    ]  # of another prompt
    pick += others[:5]
    few = replace(
        enumeration,
        scored=[enumeration.scored[i] for i in pick],
        position=enumeration.position[pick],
        probabilities=enumeration.probabilities[pick],
    )
    own = weigh(case.method.weights, case.read(few.scored), few.context)
    factors = (0.5, 1.0, 2.0)
    uneven = [w * [factors[(i + t) % 3] for t in range(len(w))] for i, w in enumerate(own)]
    likely = [np.isfinite(s.trajectory.behavior.logprobs) for s in few.scored]
    return few, [w * mask for w, mask in zip(uneven, likely, strict=True)]


def check_masks(case: Case) -> Iterator[Finding]:
    """The gradient and the normalizer do not depend on scores of masked tokens."""
    enumeration, weights = uneven_step(case)
    masked = [w * (np.arange(len(w)) % 2 == i % 2) for i, w in enumerate(weights)]
    masked_scores = []
    for item, weight in zip(enumeration.scored, masked, strict=True):
        kept = np.flatnonzero(weight) if weight.any() else np.arange(1)
        index = np.where(weight > 0, np.arange(len(weight)), kept[0])
        masked_scores.append(replace(item, scores=item.scores.take(index)))
    objective, normalizer = case.method.objective, case.method.normalizer
    before = gradient(enumeration, masked, objective, normalizer)
    after = gradient(replace(enumeration, scored=masked_scores), masked, objective, normalizer)
    yield Row(name="masked tokens give zero", measured=relative_difference(before, after), tolerance=0.0)
    yield from _normalizer(case, masked)


def _normalizer(case: Case, weights: list[np.ndarray]) -> Iterator[Finding]:
    """The normalizer does not depend on untrained tokens, order or earlier steps."""
    divisor, (scaled, *_) = case.method.normalizer, weights
    expected = divisor(weights)
    others = {
        "order": divisor(weights[::-1]),
        "texts without weight": divisor([*weights, np.zeros(400), np.zeros(1)]),
        "masked tokens": divisor([np.concatenate([w, np.zeros(i)]) for i, w in enumerate(weights)]),
        "earlier steps": [divisor([scaled]), divisor(weights)][1],
    }
    doubled = divisor([*weights, *weights]) / expected  # a sum is divided by a constant, a mean by what it counts
    measured = max(*(abs(value / expected - 1) for value in others.values()), min(abs(doubled - n) for n in (1, 2)))
    measured = max(measured, _not_a_sum(divisor, weights))
    yield Row(name="the divisor of a step counts what is trained", measured=measured, tolerance=SAME)


def _not_a_sum(divisor: Any, weights: list[np.ndarray]) -> float:
    """Distance of a divisor from what it is for each text added up, or from itself if it is constant; 0 if exact."""
    trained = [w[: 1 + i % 3] for i, w in enumerate(w[w > 0] for w in weights if w.any())]
    alone, whole, many = [divisor([w]) for w in trained], divisor(trained), divisor(trained * CROWD)
    constant = max(abs(x / whole - 1) for x in (*alone, many))
    summed = max(abs(sum(alone) / whole - 1), abs(many / whole / CROWD - 1))
    off = min(constant, summed)
    return off if off > EXACT else 0.0


SHIFTS = (1, 64, 300, 5000, 1_000_000)
PADDED = 2**15  # ids of a vocabulary, nearly all of them of probability 0
MANY = 2**18  # more ids than any checkpoint has
ENDS = (106, 32_000, 32_007, 50_256, 100_257, 128_001, 128_009, 151_643, 151_645, 199_999, 200_020, MANY - 1)
SAMPLED_ENDS = (1, 3, 6, 7, 8, 11)  # places in it of the tokens that are looked at as sampled ones
DEAD = -1e4  # the log-probability of those: 0 in float64
CROWD = 64  # times the tokens of a small world: thousands


def check_tokens(case: Case) -> Iterator[Finding]:
    """The loss of a token depends on its state and its scores alone: not on position, weight or other tokens."""
    batch, objective = every_token(case.enumeration), enumerable(case.method.objective)
    at = logits(case.enumeration, batch)
    expected = logit_gradients(objective, at, batch)

    def differs(changed: Batch[Any]) -> float:
        return relative_difference(logit_gradients(objective, at, changed), expected)

    moved = [
        replace(batch, depth=batch.depth + down, position_ids=batch.position_ids + down + ahead)
        for n in SHIFTS
        for down, ahead in ((n, 0), (0, n))  # in a longer text, after a longer prompt
    ]
    name = "invariance: position in the text"
    placed = max(*map(differs, moved), _everywhere(objective, at, batch))
    yield Row(name=name, measured=placed, tolerance=SAME)
    heavier = replace(batch, weights=batch.weights * 3, denominator=batch.denominator * 7)
    yield Row(name="invariance: weight and divisor", measured=differs(heavier), tolerance=SAME)
    yield Row(name="invariance: other tokens of the batch", measured=_neighbors(objective, at, batch), tolerance=SAME)
    yield Row(name="invariance: ids of probability 0", measured=_padded(case, at, batch), tolerance=SAME)
    yield Row(name="invariance: ids under other numbers", measured=_renumbered(case, at, batch), tolerance=SAME)
    watched = [logit_gradients(objective, at, batch, overlap_k=k) for k in (0, 16)]
    reported = max(relative_difference(gradients, expected) for gradients in watched)
    yield Row(name="invariance: what is reported", measured=reported, tolerance=SAME)


def _neighbors(objective: Any, at: Tensor, batch: Batch[Any]) -> float:
    """Difference between rows evaluated one by one, or thousands together, and in their batch."""
    expected = logit_gradients(objective, at, batch)
    rows = range(0, len(batch), 5)
    alone = torch.cat([logit_gradients(objective, at[i : i + 1], batch.rows(i, i + 1)) for i in rows])
    many = torch.arange(len(batch)).repeat(CROWD)
    crowd = _taken(batch, many)
    return max(
        relative_difference(alone, expected[list(rows)]),
        relative_difference(logit_gradients(objective, at[many], crowd), expected[many]),
        relative_difference(logit_gradients(objective, at, _among_others(batch)), expected),
    )


def _among_others(batch: Batch[Any]) -> Batch[Any]:
    """The same trained tokens in a batch of other ids before them, of forty teachers, and without names."""
    names = tuple(f"teacher-{number:02}" for number in range(40))
    route = torch.arange(len(batch)) % len(names)
    return replace(
        batch, input_ids=batch.target_ids[:1].expand(len(batch.input_ids)), routes=names, route=route, names=()
    )


def _everywhere(objective: Any, at: Tensor, batch: Batch[Any]) -> float:
    """Difference between every token at another of thousands of places, and at its own."""
    expected, many = logit_gradients(objective, at, batch), torch.arange(len(batch)).repeat(CROWD)
    places, before = torch.arange(len(many)), batch.input_ids[batch.predict_at]
    spread = replace(
        _taken(batch, many), depth=places, predict_at=places, position_ids=places, input_ids=before[many], names=()
    )
    return relative_difference(logit_gradients(objective, at[many], spread), expected[many])


def _taken(batch: Batch[Any], rows: Tensor) -> Batch[Any]:
    """Batch of the trained tokens `rows`, in that order and as often."""
    per_token = ("predict_at", "target_ids", "behavior_logprobs", "weights", "depth", "route")
    fields = {name: getattr(batch, name) for name in per_token}
    taken = {name: values[rows] for name, values in fields.items() if len(values)}
    return replace(batch, **taken, scores=batch.scores.take(rows.numpy()))


def _padded(case: Case, at: Tensor, batch: Batch[Any]) -> float:
    """Difference that a vocabulary padded with thousands of ids of probability 0 makes, as in real checkpoints."""
    rows = torch.arange(0, len(batch), 6)
    few, objective = _taken(batch, rows), case.method.objective  # as it is: dead ids are never drawn
    expected = logit_gradients(objective, at[rows], few)

    def wide(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, PADDED - x.shape[1]), value=DEAD)

    if isinstance(few.scores, VocabularyScores):
        few = replace(few, scores=replace(few.scores, vocabulary_logprobs=wide(few.scores.vocabulary_logprobs)))
    measured = logit_gradients(objective, wide(at[rows]), few)
    return relative_difference(measured, torch.nn.functional.pad(expected, (0, PADDED - expected.shape[1])))


def _renumbered(case: Case, at: Tensor, batch: Batch[Any]) -> float:
    """Difference that it makes if the ids of the world have numbers that mark an end in vocabularies of checkpoints.

    What an objective draws itself depends on these numbers; of one that draws, the loss of given draws is compared.
    """
    numbers, objective = torch.tensor(ENDS), case.method.objective
    found = [(batch.target_ids == target).nonzero()[:, 0] for target in SAMPLED_ENDS]
    rows = torch.stack([places[i % len(places)] for i, places in enumerate(found) if len(places)])
    few = _taken(batch, rows)

    def wide(x: Tensor, fill: float = DEAD) -> Tensor:
        return x.new_full((len(x), MANY), fill).index_copy(1, numbers, x)

    moved = replace(few, target_ids=numbers[few.target_ids], scores=_moved_ids(few.scores, numbers, wide))
    gradients = _given if draws(objective) else logit_gradients
    expected, measured = gradients(objective, at[rows], few), gradients(objective, wide(at[rows]), moved)
    return relative_difference(measured, wide(expected, 0.0))


def _given(objective: Any, at: Tensor, batch: Batch[Any]) -> Tensor:
    """Gradient of the loss of a drawing objective if it had drawn what was sampled, with respect to the logits."""
    leaf = at.detach().clone().requires_grad_()
    ids = batch.target_ids[:, None].expand(-1, objective.samples)
    return torch.autograd.grad(objective.given(ids, StudentLogits(logits=leaf), batch).loss.sum(), leaf)[0]


def _moved_ids(scores: Any, numbers: Tensor, wide: Callable[[Tensor], Tensor]) -> Any:
    """Scores about the same ids under other numbers."""
    changed = {f.name: numbers[getattr(scores, f.name)] for f in fields(scores) if f.name in ("topk_ids", "target_ids")}
    if isinstance(scores, VocabularyScores):
        changed["vocabulary_logprobs"] = wide(scores.vocabulary_logprobs)
    return replace(scores, **changed)
