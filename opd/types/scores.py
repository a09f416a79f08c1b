"""Scores of the tokens of a trajectory, by a model or a grader."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from opd.types.log_mass import remainder
from opd.types.remote_rows import Fetch, RemoteRows

if TYPE_CHECKING:  # numpy on the wire, torch in the learner: the same type, which a checker cannot follow
    Array = Any
else:
    Array = np.ndarray | Tensor


def _take(value: Any, index: np.ndarray) -> Any:
    if isinstance(value, tuple):
        return tuple(_take(v, index) for v in value)
    return value.take(index) if isinstance(value, RemoteRows | Scores) else value[index]


def _rows(value: Any, start: int, stop: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_rows(v, start, stop) for v in value)
    return value.rows(start, stop) if isinstance(value, Scores) else value[start:stop]


def _concat(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, tuple):
        return tuple(_concat(parts) for parts in zip(*values, strict=True))
    return type(first).concat(values) if isinstance(first, RemoteRows | Scores) else np.concatenate(values)


def _to(value: Any, device: torch.device | str, get: Fetch) -> Any:
    if isinstance(value, tuple):
        return tuple(_to(v, device, get) for v in value)
    if isinstance(value, Scores):
        return value.to(device, get)
    tensor = value.fetch(get) if isinstance(value, RemoteRows) else torch.as_tensor(value)
    return tensor.to(device)


@cache
def _names(kind: type) -> tuple[str, ...]:
    """Names of a dataclass's fields; `dataclasses.fields` builds them anew at every call, once for every sample."""
    return tuple(f.name for f in fields(kind))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Scores of tokens by a model. Every field has the token axis first, so the methods are written once.

    A field is an array, `RemoteRows`, other scores about the same tokens, or a tuple of those.
    The base class itself, `Scores()`, has no scores (SFT needs none).
    """

    def take(self, index: np.ndarray) -> Self:
        """The tokens `index`, in that order."""
        return replace(self, **{name: _take(getattr(self, name), index) for name in _names(type(self))})

    def rows(self, start: int, stop: int) -> Self:
        """The tokens `start:stop`, as views (no copy)."""
        return replace(self, **{name: _rows(getattr(self, name), start, stop) for name in _names(type(self))})

    def to(self, device: torch.device | str, get: Fetch) -> Self:
        """All fields as tensors on `device`; `get` resolves handles of remote rows."""
        return replace(self, **{f.name: _to(getattr(self, f.name), device, get) for f in fields(self)})

    @classmethod
    def concat(cls, values: Sequence[Self]) -> Self:
        """Scores of several trajectories as one, in order. `values` must not be empty."""
        joined = {name: _concat([getattr(v, name) for v in values]) for name in _names(type(values[0]))}
        return replace(values[0], **joined)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores(Scores):
    """Log-probability of the sampled token. Example: `TokenScores(logprobs=[-0.1, -2.3])`."""

    logprobs: Float[Array, " T"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendedScores(TokenScores):
    """Log-probability of the sampled token under a blend of the student with a teacher, which both computed it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKScores(TokenScores):
    """Log-probabilities on a small support per token, under the *full* softmax.

    Which support it is (teacher's top-k, student's top-k, ...) depends on the scorer. `rest` is the log-mass
    of all other ids. Left out by a source that has no whole row, it is what the support leaves of 1 (`remainder`).
    Example: `TopKScores(logprobs=[-0.1], topk_ids=[[7, 9]], topk_logprobs=[[-0.1, -2.4]], rest=[-5.7])`.
    """

    topk_ids: Int[Array, "T K"]
    topk_logprobs: Float[Array, "T K"]
    rest: Float[Array, " T"] = field(default_factory=lambda: np.zeros(0, dtype=np.float32))

    def __post_init__(self) -> None:
        if not len(self.rest):
            object.__setattr__(self, "rest", remainder(self.topk_logprobs))


@dataclass(frozen=True, slots=True, kw_only=True)
class EvidenceScores(TokenScores):
    """Log-probability of the sampled token by one teacher in two contexts: `plain` is that without what it is shown.

    Example: `EvidenceScores(logprobs=[-0.1], plain=[-2.3])`.
    """

    plain: Float[Array, " T"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviationScores(TokenScores):
    """Log-probability of the sampled token by one teacher, and how far it falls and rises in other contexts (>= 0).

    Example: `DeviationScores(logprobs=[-0.5], falls=[0.3], rises=[0.0])`.
    """

    falls: Float[Array, " T"]
    rises: Float[Array, " T"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKReturnScores(TopKScores):
    """A support, and the return of every sampled token: the reward of the tokens after it.

    Example: `TopKReturnScores(logprobs=[-0.1], topk_ids=[[7]], topk_logprobs=[[-0.1]], returns=[0.3])`.
    """

    returns: Float[Array, " T"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaScores(TopKScores):
    """A teacher's scores on a support, and those of another model, its base, at the same tokens and ids.

    Example: `DeltaScores(logprobs=[-0.1], topk_ids=[[7]], topk_logprobs=[[-0.1]], base=[-1.3], topk_base=[[-1.3]])`.
    """

    base: Float[Array, " T"]
    topk_base: Float[Array, "T K"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CreditScores(TokenScores):
    """Log-probability of the sampled token, and a signed credit beside it. 0 is none.

    Example: `CreditScores(logprobs=[-0.1, -2.3], credit=[0.0, 1.2])`.
    """

    credit: Float[Array, " T"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetScores(Scores):
    """Target distribution of every token on few ids, which the student is to learn: a soft label.

    `target_probs` sum to 1 where there is a target. `targets` is the number of distributions of which it is the mean, 0
    where there is none (probabilities are then 0). Ids of probability 0 fill a row, and narrow rows where wider ones
    meet them. Example, a token with two labels and one with none:
    `TargetScores(target_ids=[[7, 9], [0, 0]], target_probs=[[0.75, 0.25], [0, 0]], targets=[2, 0])`.
    """

    target_ids: Int[Array, "T K"]
    target_probs: Float[Array, "T K"]
    targets: Float[Array, " T"]

    @classmethod
    def concat(cls, values: Sequence[Self]) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride] (Self, as in the base)
        """Scores of several trajectories as one, as wide as the widest. `values` must not be empty."""
        widest = max(v.target_ids.shape[1] for v in values)
        return super(TargetScores, cls).concat([v._filled(widest) for v in values])

    def _filled(self, width: int) -> Self:
        fill = ((0, 0), (0, width - self.target_ids.shape[1]))
        wide = {name: np.pad(getattr(self, name), fill) for name in ("target_ids", "target_probs")}
        return replace(self, **wide) if fill[1][1] else self


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyScores(TokenScores):
    """Log-probabilities of the whole vocabulary: input of objectives over exact distributions.

    Never travels; the learner makes it, a chunk of rows at a time, from `HiddenScores`.
    """

    vocabulary_logprobs: Float[Array, "T V"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenScores(TokenScores):
    """Last hidden states (after the final norm); with the teacher's head they are `VocabularyScores`.

    Travels as `RemoteRows`. `head` is the number of the output matrix that reads each row: the place of the teacher
    in `Engines.teachers`, filled in by the scorer; left out by a teacher, which does not know it, it is 0. Where rows
    of several teachers meet, `H` is the widest of them, and a matrix reads as many columns as it has.
    Example: `HiddenScores(logprobs=[-0.1], hidden=RemoteRows(...), head=[0])`.
    """

    reads_as: ClassVar[type[Scores]] = VocabularyScores

    hidden: RemoteRows | Float[Array, "T H"]
    head: Int[Array, " T"] = field(default_factory=lambda: np.zeros(0, dtype=np.int32))

    def __post_init__(self) -> None:
        if not len(self.head):
            object.__setattr__(self, "head", np.zeros(len(self.logprobs), dtype=np.int32))


@dataclass(frozen=True, slots=True, kw_only=True)
class FutureScores(HiddenScores):
    """Last hidden states, and how far the teacher's continuation is from the text at some tokens (>= 0), -1 at others.

    Example: `FutureScores(logprobs=[-0.1], hidden=RemoteRows(...), head=[0], ahead=[0.4])`.
    """

    ahead: Float[Array, " T"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsembleScores(TokenScores):
    """Several teachers' scores of the same tokens, read as one: the mixture `sum_m shares[m] * p_m`.

    `logprobs` is already that of the mixture. Example, of two members: `EnsembleScores(logprobs=[-0.1],
    members=(HiddenScores(...), HiddenScores(...)), shares=[[0.5, 0.5]])`.
    """

    reads_as: ClassVar[type[Scores]] = VocabularyScores

    members: tuple[HiddenScores, ...]
    shares: Float[Array, "T M"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageScores(Scores):
    """Signed credit per token, with the raw reward behind it (outcome rewards: constant over a trajectory).

    Example: `AdvantageScores(advantages=[0.7, 0.7], rewards=[1.0, 1.0])`.
    """

    advantages: Float[Array, " T"]
    rewards: Float[Array, " T"]


S = TypeVar("S", bound=Scores, covariant=True)
