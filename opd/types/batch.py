"""Micro-batches, unreduced losses and reports of optimizer steps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, ClassVar, Generic

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.types.remote_rows import Fetch, RemoteRows
from opd.types.scores import Array, S, Scores
from opd.types.trajectories import Prompt, Scored, StopReason, Trajectory


@cache
def _large(kind: type) -> tuple[str, ...]:
    """Names of a class's fields that may hold arrays."""
    return tuple(f.name for f in fields(kind) if f.type not in (str, int, float, StopReason))


def nbytes(value: Any) -> int:
    """Bytes of all arrays within a value of this module, remote ones included."""
    if isinstance(value, np.ndarray | Tensor):
        return value.nbytes
    if isinstance(value, RemoteRows):
        return len(value) * value.row_nbytes
    if isinstance(value, tuple):
        return sum(map(nbytes, value))
    if isinstance(value, Mapping):
        return sum(map(nbytes, value.values()))
    if isinstance(value, Prompt | Scores | Trajectory | Scored | Batch | TermRows):
        parts = [getattr(value, name) for name in _large(type(value))]
        return sum([part.nbytes if isinstance(part, np.ndarray) else nbytes(part) for part in parts])
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TermRows:
    """Share of one of several terms of a method in a micro-batch: scores and weights at its trained tokens.

    Its part of the loss is `coefficient * sum(weights * loss) / denominator`; `denominator` is global, as in `Batch`.
    Tokens of weight 0 are trained by other terms alone.
    """

    scores: Scores
    weights: Float[Array, " L"]
    denominator: float
    coefficient: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch(Generic[S]):
    """A micro-batch: `M` sequences packed into `N` tokens, `L` of which are trained.

    `predict_at` picks the hidden states that predict the trained tokens *before* the vocabulary projection.
    `denominator` is global (all micro-batches, all ranks) and known before the first backward, so a loss is
    `sum(weights * loss) / denominator` and adds up over any split. `depth` is a token's place in its completion,
    from 0; tokens of weight 0 count as places. `routes` names the teachers that the prompts of the step ask, and
    `route` is the number of each trained token's; with a single one `route` is empty (`R` is 0 or `L`).

    Of a method with several terms `terms` holds each one's share; `weights` is then 1 where any of them trains and
    `denominator` is that of the first (`opd.method.terms.SumOfTerms` divides by the others'). Terms with equal scorers
    share one `Scores` object.
    """

    input_ids: Int[Array, " N"]
    position_ids: Int[Array, " N"]
    cu_seqlens: Int[Array, " M1"]
    predict_at: Int[Array, " L"]
    target_ids: Int[Array, " L"]
    behavior_logprobs: Float[Array, " L"]
    weights: Float[Array, " L"]
    depth: Int[Array, " L"]
    scores: S
    denominator: float
    routes: tuple[str, ...] = ("default",)
    route: Int[Array, " R"] = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    names: tuple[str, ...] = ()  # of the sequences, for messages and seeds of draws; () where none were given
    terms: Mapping[str, TermRows] = field(default_factory=dict)

    _TOKEN_FIELDS: ClassVar[tuple[str, ...]] = (
        "predict_at",
        "target_ids",
        "behavior_logprobs",
        "weights",
        "depth",
        "route",
    )

    def __len__(self) -> int:
        return len(self.target_ids)

    def rows(self, start: int, stop: int) -> "Batch[S]":
        """The trained tokens `start:stop`; the packed sequences stay whole."""
        cut = {name: getattr(self, name)[start:stop] for name in self._TOKEN_FIELDS}
        return self._with_scores(lambda s: s.rows(start, stop), cut, lambda w: w[start:stop])

    def _with_scores(
        self, change: Callable[[Any], Any], fields_: Mapping[str, Any], weigh: Callable[[Any], Any] = lambda w: w
    ) -> "Batch[Any]":
        """`fields_` replaced, and `change` applied to all scores, once to an object that several terms share."""
        if not self.terms:
            return replace(self, **fields_, scores=change(self.scores))
        made: dict[int, Any] = {}

        def once(scores: Any) -> Any:
            if id(scores) not in made:
                made[id(scores)] = change(scores)
            return made[id(scores)]

        terms = {n: replace(t, scores=once(t.scores), weights=weigh(t.weights)) for n, t in self.terms.items()}
        return replace(self, **fields_, scores=once(self.scores), terms=terms)

    def with_scores(self, change: Callable[[Any], Any]) -> "Batch[Any]":
        """The same batch with `change` applied to the scores of all terms."""
        return self._with_scores(change, {})

    def to(self, device: torch.device | str, get: Fetch) -> "Batch[S]":
        """Tensors on `device`, ids widened to int64 (what embedding and gather want)."""
        moved = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("scores", "denominator", "routes", "names", "terms"):
                continue
            tensor = torch.as_tensor(value)
            moved[f.name] = (tensor if tensor.is_floating_point() else tensor.long()).to(device)
        return self._with_scores(lambda s: s.to(device, get), moved, lambda w: torch.as_tensor(w).to(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLoss:
    """An unreduced loss, which the learner may evaluate in chunks; metrics are per token, detached.

    NaN in a metric means "not defined at this token" (an empty overlap, another position bucket): means are taken
    over the tokens where it is defined. A NaN in `loss` is an error that the learner reports.
    """

    loss: Float[Tensor, " L"]
    metrics: Mapping[str, Float[Tensor, " L"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Report of one optimizer step. `metrics` are means over those trained tokens of the whole batch at which they are
    defined (`opd.loss.metric_sums`); one that was defined nowhere is absent. `skipped`: the loss or the gradient norm
    was not finite, so weights and optimizer are those of before.
    """

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    trained_tokens: int
    metrics: Mapping[str, float]
    skipped: bool = False
