"""Weighted trajectories to micro-batches: the only place where tokens are shifted, padded or dropped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heapreplace
from typing import Annotated, ClassVar, Protocol

import numpy as np
from jaxtyping import Float, Float32

from opd.errors import ConfigurationError, DataError
from opd.ports import Layout
from opd.settings.ranges import In
from opd.settings.validation import may_lack, settings
from opd.types import Batch, S, Scored, Scores, TermRows

TokenWeights = Float[np.ndarray, " _T"]


@may_lack("per_sequence")  # tokens then keep the weights they have
class Normalizer(Protocol):
    """Divisor of the summed loss of a step."""

    # whether the tokens of a trajectory share one weight: each is first divided by how many are trained there
    per_sequence: ClassVar[bool]

    def __call__(self, weights: Sequence[TokenWeights]) -> float:
        """A positive divisor, computed over the *whole* step before the first backward."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenMean:
    """The mean over all trained tokens of the step, every token alike."""

    per_sequence: ClassVar[bool] = False

    def __call__(self, weights: Sequence[TokenWeights]) -> float:
        return float(sum(np.count_nonzero(w) for w in weights))


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightMean:
    """The mean over all trained tokens of the step by their weights: a token of weight 2 counts as two."""

    per_sequence: ClassVar[bool] = False

    def __call__(self, weights: Sequence[TokenWeights]) -> float:
        return float(sum(w.sum() for w in weights))


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceMean:
    """The mean over trajectories of each one's own mean over its trained tokens (long answers weigh no more).

    GRPO as published (arXiv 2402.03300 eq. 3, `1/G sum_i 1/|o_i| sum_t`) and GKD (arXiv 2306.13649, `1/L_y sum_t`).
    """

    per_sequence: ClassVar[bool] = True

    def __call__(self, weights: Sequence[TokenWeights]) -> float:
        return float(sum(bool(w.any()) for w in weights))


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSum:
    """The loss summed over tokens, averaged over trajectories (long answers weigh more)."""

    per_sequence: ClassVar[bool] = False

    def __call__(self, weights: Sequence[TokenWeights]) -> float:
        return float(sum(bool(w.any()) for w in weights))


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class Constant:
    """A fixed divisor; 1.0 is the plain sum of Thinking Machines' `importance_sampling` loss."""

    per_sequence: ClassVar[bool] = False

    # what a step's sum is divided by
    divisor: Annotated[float, In(1e-6, 1e12)] = 1.0

    def __call__(self, weights: Sequence[TokenWeights]) -> float:
        return self.divisor


@dataclass(frozen=True, slots=True, kw_only=True)
class WeighedTerm:
    """One term of a method at one step: a weight per token of every trajectory, and what scales their sum."""

    weights: Sequence[TokenWeights]
    normalizer: Normalizer
    coefficient: float = 1.0


def pack(
    scored: Sequence[Scored[S]],
    weights: Sequence[TokenWeights],
    layout: Layout,
    normalizer: Normalizer,
    *,
    turn: str = "",
) -> list[list[Batch[S]]]:
    """Micro-batches `[rank][i]` of at most `layout.tokens_per_microbatch` packed tokens.

    Token `t` of a completion is predicted by the hidden state one position earlier; the last token is never an
    input. Tokens of weight 0 keep their place in the context and are not trained. Every rank gets the same
    number of micro-batches, because ranks must enter collectives together; a rank without work repeats a
    sequence with weight 0. Deterministic: the result depends on the arguments alone. `turn` tells this time from others
    at which the same text is packed; it is part of the names of sequences.

    Raises:
        DataError: nothing has a weight, a weight is negative or not finite, or a prompt to train on is empty.
        ConfigurationError: a sequence is longer than the token budget.
    """
    _check(scored, weights)
    denominator = normalizer(weights)
    return _packed(scored, _shared_out(weights, normalizer), layout, denominator, turn)


def pack_terms(
    scored: Sequence[Scored[S]], terms: Mapping[str, WeighedTerm], layout: Layout, *, turn: str = ""
) -> list[list[Batch[S]]]:
    """`pack` for the sum of several terms: a token is packed once, if any of them trains it.

    Scores of a term are `Scored.terms[name]`, or else `Scored.scores`.
    """
    for term in terms.values():
        _check(scored, term.weights)
    anywhere = [
        np.any(each, axis=0).astype(np.float64) for each in zip(*(t.weights for t in terms.values()), strict=True)
    ]
    shares = {
        name: _Share(
            weights=_shared_out(term.weights, term.normalizer),
            denominator=term.normalizer(term.weights) or 1.0,  # a term may train nothing in a step
            coefficient=term.coefficient,
        )
        for name, term in terms.items()
    }
    return _packed(scored, anywhere, layout, next(iter(shares.values())).denominator, turn, shares)


def unpack(
    answers: Sequence[Sequence[Float32[np.ndarray, "R L"]]],
    scored: Sequence[Scored[S]],
    weights: Sequence[TokenWeights],
    layout: Layout,
) -> list[Float32[np.ndarray, "R _T"]]:
    """Numbers per trajectory of `answers[rank][i]` about tokens of micro-batches, NaN at tokens that are not trained.

    The other arguments are those by which `pack` or `pack_terms` (there: 1 where any term trains) made the batches.
    """
    bins = _bins(scored, weights, layout)
    found = [np.full((len(answers[0][0]), len(weight)), np.nan, dtype=np.float32) for weight in weights]
    for number, chosen in enumerate(bins):  # one without work has a sequence that stands elsewhere, too
        answer, start = answers[number % layout.ranks][number // layout.ranks], 0
        for i in chosen:
            rows = np.flatnonzero(weights[i])
            found[i][:, rows] = answer[:, start : start + len(rows)]
            start += len(rows)
        if chosen and start != answer.shape[1]:
            raise DataError(f"micro-batch {number} has {start} trained tokens, but was answered for {answer.shape[1]}")
    return found


def _bins(scored: Sequence[Scored[S]], weights: Sequence[TokenWeights], layout: Layout) -> list[list[int]]:
    """Numbers of the trajectories in each micro-batch, rank by rank in turn; empty where a rank has no work."""
    kept = [i for i, weight in enumerate(weights) if np.count_nonzero(weight)]
    if not kept:
        raise DataError(
            "the step has no token to train: every weight is 0; check loss masks, filters and the weight parts"
        )
    return _fill({i: _inputs(scored[i]) for i in kept}, layout)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    """A term's weights as they are multiplied, and the rest of `TermRows`."""

    weights: Sequence[TokenWeights]
    denominator: float
    coefficient: float


def _check(scored: Sequence[Scored[S]], weights: Sequence[TokenWeights]) -> None:
    """Check that there is one weight, and one behavior log-probability, per token."""
    finite = bool(weights) and _good(np.concatenate(weights))  # all at once: a check of each costs more than the rest
    for item, weight in zip(scored, weights, strict=True):
        if len(weight) != len(item.trajectory) or not (finite or _good(weight)):
            raise DataError(
                f"prompt {item.trajectory.prompt.id!r}: weights must be one finite number >= 0 per token, got "
                f"{weight!r} for {len(item.trajectory)} tokens; correct the weight part"
            )
        if len(item.trajectory.behavior.logprobs) != len(item.trajectory):
            raise DataError(
                f"prompt {item.trajectory.prompt.id!r}: the behavior scores have "
                f"{len(item.trajectory.behavior.logprobs)} logprobs for {len(item.trajectory)} tokens; they must have "
                "one for each: correct the rollout part"
            )


def _shared_out(weights: Sequence[TokenWeights], normalizer: Normalizer) -> Sequence[TokenWeights]:
    if not getattr(normalizer, "per_sequence", False):
        return weights
    return [weight / max(np.count_nonzero(weight), 1) for weight in weights]


def _packed(
    scored: Sequence[Scored[S]],
    weights: Sequence[TokenWeights],
    layout: Layout,
    denominator: float,
    turn: str,
    terms: Mapping[str, _Share] | None = None,
) -> list[list[Batch[S]]]:
    bins = _bins(scored, weights, layout)
    spare = min(i for b in bins for i in b)
    routes = tuple(sorted({item.trajectory.prompt.teacher for item in scored}))  # of the step, alike in all batches
    batches = []
    for b in bins:
        chosen = b or [spare]
        batch = _batch([scored[i] for i in chosen], [weights[i] * bool(b) for i in chosen], denominator, routes, turn)
        if terms:
            rows = _term_rows(scored, weights, terms, chosen, bool(b))
            batch = replace(batch, terms=rows, scores=next(iter(rows.values())).scores)
        batches.append(batch)
    return [batches[rank :: layout.ranks] for rank in range(layout.ranks)]


def _term_rows(
    scored: Sequence[Scored[S]],
    anywhere: Sequence[TokenWeights],
    terms: Mapping[str, _Share],
    chosen: Sequence[int],
    trained: bool,
) -> dict[str, TermRows]:
    """Rows of each term in the sequences `chosen`; equal scores of several terms become one object."""
    rows = [np.flatnonzero(anywhere[i]) if trained else np.arange(len(anywhere[i])) for i in chosen]
    joined: dict[tuple[int, ...], Scores] = {}

    def of(name: str) -> Scores:
        parts = [scored[i].terms.get(name, scored[i].scores) for i in chosen]
        key = tuple(map(id, parts))
        if key not in joined:
            joined[key] = type(parts[0]).concat([part.take(r) for part, r in zip(parts, rows, strict=True)])
        return joined[key]

    return {
        name: TermRows(
            scores=of(name),
            weights=np.concatenate([term.weights[i][r] * trained for i, r in zip(chosen, rows, strict=True)]).astype(
                np.float32
            ),
            denominator=term.denominator,
            coefficient=term.coefficient,
        )
        for name, term in terms.items()
    }


def halves(batch: Batch[S]) -> tuple[Batch[S], Batch[S]] | None:
    """A packed micro-batch as two, cut between the sequences nearest to the middle of its tokens.

    Losses and gradients of the two add up to the whole's, since the denominator is global. None if there is no
    boundary with trained tokens on both sides.
    """
    ends = np.asarray(batch.cu_seqlens)
    trained = np.searchsorted(np.asarray(batch.predict_at), ends)  # predict_at ascends with the sequences
    fit = [i for i in range(1, len(ends) - 1) if 0 < trained[i] < len(batch)]
    if not fit:
        return None
    cut = min(fit, key=lambda i: abs(2 * int(ends[i]) - int(ends[-1])))
    tokens, rows = int(ends[cut]), int(trained[cut])
    first, second = batch.rows(0, rows), batch.rows(rows, len(batch))
    return (
        replace(
            first,
            input_ids=batch.input_ids[:tokens],
            position_ids=batch.position_ids[:tokens],
            cu_seqlens=batch.cu_seqlens[: cut + 1],
            names=batch.names[:cut],
        ),
        replace(
            second,
            input_ids=batch.input_ids[tokens:],
            position_ids=batch.position_ids[tokens:],
            cu_seqlens=batch.cu_seqlens[cut:] - tokens,
            predict_at=second.predict_at - tokens,
            names=batch.names[cut:],
        ),
    )


def _good(weight: np.ndarray) -> bool:
    return bool(np.count_nonzero((weight >= 0) & (weight < np.inf)) == len(weight))


def _inputs(item: Scored[S]) -> int:
    prompt = item.trajectory.prompt
    if len(prompt.student_ids) == 0:
        raise DataError(f"prompt {prompt.id!r} is empty; a completion needs a token to follow, mend the prompts")
    return len(prompt.student_ids) + len(item.trajectory) - 1


def _fill(lengths: dict[int, int], layout: Layout) -> list[list[int]]:
    """Bins of sequences: longest first into the emptiest, and one more round of bins for all ranks until all fit."""
    longest, budget = max(lengths.values()), layout.tokens_per_microbatch
    if longest > budget:
        raise ConfigurationError(
            f"learner.tokens_per_microbatch is {budget}, but a sequence has {longest} tokens; raise it to at "
            f"least {longest} or lower rollout.max_tokens"
        )
    order = sorted(lengths, key=lambda i: (-lengths[i], i))
    rounds = -(-sum(lengths.values()) // (budget * layout.ranks))
    while True:
        bins: list[list[int]] = [[] for _ in range(rounds * layout.ranks)]
        loads = [(0, b) for b in range(len(bins))]  # a heap: a step of a thousand ranks has thousands of bins
        for i in order:
            load, best = loads[0]
            bins[best].append(i)
            heapreplace(loads, (load + lengths[i], best))
        if max(loads)[0] <= budget:
            return [sorted(b) for b in bins]
        rounds += 1


def _batch(
    items: list[Scored[S]], weights: list[TokenWeights], denominator: float, routes: tuple[str, ...], turn: str
) -> Batch[S]:
    inputs, positions, predict_at, targets, behavior, kept_weights, depth, scores = [], [], [], [], [], [], [], []
    owners = []
    offset, boundaries = 0, [0]
    for item, weight in zip(items, weights, strict=True):
        trajectory = item.trajectory
        context = trajectory.prompt.student_ids
        count = np.count_nonzero(weight)
        some = 0 < count < len(trajectory)
        trained = np.flatnonzero(weight) if some else np.arange(len(trajectory))
        rows = trained if some else slice(None)  # most often all: a view instead of a copy that is copied once more
        inputs.append(np.concatenate([context, trajectory.token_ids[:-1]]))
        positions.append(np.arange(len(inputs[-1]), dtype=np.int32))
        predict_at.append(offset + len(context) - 1 + trained)
        targets.append(trajectory.token_ids[rows])
        behavior.append(trajectory.behavior.logprobs[rows])
        kept_weights.append(weight[rows])
        depth.append(trained)
        scores.append(item.scores.take(trained) if some else item.scores)
        if len(routes) > 1:
            owners.append(np.full(len(trained), routes.index(trajectory.prompt.teacher), dtype=np.int32))
        offset += len(inputs[-1])
        boundaries.append(offset)
    return Batch(
        input_ids=np.concatenate(inputs),
        position_ids=np.concatenate(positions),
        cu_seqlens=np.asarray(boundaries, dtype=np.int32),
        predict_at=np.concatenate(predict_at),
        target_ids=np.concatenate(targets),
        behavior_logprobs=np.concatenate(behavior).astype(np.float32, copy=False),
        weights=np.concatenate(kept_weights).astype(np.float32, copy=False),
        depth=np.concatenate(depth).astype(np.int32),
        scores=type(items[0].scores).concat(scores),
        denominator=denominator,
        routes=routes,
        route=np.concatenate(owners) if owners else np.zeros(0, dtype=np.int32),
        names=tuple(f"sample {t.sample} of prompt {t.prompt.id!r}{turn}" for t in (item.trajectory for item in items)),
    )
