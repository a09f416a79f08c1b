"""The data that flows through a step.

Axes: `P` student context, `Q` teacher context, `T` completion tokens of one trajectory, `K` support,
`V` vocabulary, `H` hidden width, `N` packed tokens of a micro-batch, `L` trained tokens of a micro-batch,
`M` sequences in it. Ids travel as int32, log-probabilities as float32 (natural log). Everything is frozen;
stages return new values.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor

from opd.log_mass import remainder

if TYPE_CHECKING:  # numpy on the wire, torch in the learner: the same type, which a checker cannot follow
    Array = Any
else:
    Array = np.ndarray | Tensor
Fetch = Callable[[Any], np.ndarray]

NOBODY = -1
"""The version of tokens that no policy of the run wrote: a teacher's text, or text of a data set."""


class Stop(Enum):
    """Why a completion ended."""

    END = "end"  # the model wrote its end-of-text token
    LENGTH = "length"  # the token limit cut it


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What is asked, and what the teacher may know about it.

    `teacher_ids` equals `student_ids` unless the teacher is privileged. Prompts of one step that share an
    `id` form a group. `weight` >= 0 is how much the prompt counts where a method asks for it
    (`opd.weights.teachers.PromptWeight`). Example: `Prompt(id="shop/17", student_ids=[1, 40, 6],
    teacher_ids=[1, 40, 6], teacher="default", task="shop", answer="2 4")`.
    """

    id: str
    student_ids: Int32[np.ndarray, " P"]
    teacher_ids: Int32[np.ndarray, " Q"]
    teacher: str = "default"
    task: str = ""
    answer: str = ""
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteRows:
    """Rows of arrays that are held elsewhere, in order: `(handle, row numbers)` pieces.

    Hidden states are too large to pass through the driver, so it moves, cuts and joins only these names;
    the learner rank that needs the rows fetches them. Example: `RemoteRows(pieces=((ref, [3, 4, 5]),))`.
    """

    pieces: tuple[tuple[Any, Int[np.ndarray, " _rows"]], ...]
    row_nbytes: int = 0  # of one row, where it is held; 0 = not said

    def __len__(self) -> int:
        return sum(len(rows) for _, rows in self.pieces)

    def take(self, index: np.ndarray) -> "RemoteRows":
        """The rows `index`, in that order; neighbouring rows of one array stay one piece."""
        owner = np.concatenate([np.full(len(rows), i) for i, (_, rows) in enumerate(self.pieces)])[index]
        rows = np.concatenate([rows for _, rows in self.pieces])[index]
        cuts = np.flatnonzero(np.diff(owner)) + 1
        starts = np.concatenate([[0], cuts]) if len(index) else np.zeros(0, dtype=np.int64)
        parts = np.split(rows, cuts) if len(index) else []
        pieces = tuple((self.pieces[owner[s]][0], part) for s, part in zip(starts, parts, strict=True))
        return RemoteRows(pieces=pieces, row_nbytes=self.row_nbytes)

    @staticmethod
    def concat(values: Sequence["RemoteRows"]) -> "RemoteRows":
        """One after the other."""
        widest = max((value.row_nbytes for value in values), default=0)
        return RemoteRows(pieces=tuple(piece for value in values for piece in value.pieces), row_nbytes=widest)

    def fetch(self, get: Fetch) -> Tensor:
        """The rows themselves, `[rows, H]`; each array is fetched once. 16-bit words are bfloat16.

        Arrays of several teachers may differ in width and dtype: `H` is the widest, narrower rows end in zeros
        (which no output matrix looks at), and the dtype is one that holds all values exactly.
        """
        handles = {id(handle): handle for handle, _ in self.pieces}
        arrays = {key: get(handle) for key, handle in handles.items()}
        kinds = {(array.shape[1], array.dtype) for array in arrays.values()}
        if len(kinds) == 1:
            return _tensor(np.concatenate([arrays[id(handle)][rows] for handle, rows in self.pieces]))
        parts = [_tensor(arrays[id(handle)][rows]) for handle, rows in self.pieces]
        width = max(part.shape[1] for part in parts)
        return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])


def _tensor(rows: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(rows)
    return tensor.view(torch.bfloat16) if rows.dtype == np.uint16 else tensor


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What a model says about tokens. Every field has the token axis first, so the verbs are written once.

    A field is an array, `RemoteRows`, other scores about the same tokens, or a tuple of those.
    The base class itself is the testimony of nobody (SFT needs none): `Scores()`.
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
        """Testimony about several trajectories as one, in order. `values` must not be empty."""
        joined = {name: _concat([getattr(v, name) for v in values]) for name in _names(type(values[0]))}
        return replace(values[0], **joined)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores(Scores):
    """Log-probability of the token that was written. Example: `TokenScores(logprobs=[-0.1, -2.3])`."""

    logprobs: Float[Array, " T"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKScores(TokenScores):
    """Log-probabilities on a small support per token, under the *full* softmax.

    Whose support it is (teacher's top-k, student's top-k, ...) is said by the scorer that asked. `rest` is the log-mass
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
class TopKReturnScores(TopKScores):
    """A support, and the return of every written token: what the tokens after it earned.

    Example: `TopKReturnScores(logprobs=[-0.1], topk_ids=[[7]], topk_logprobs=[[-0.1]], returns=[0.3])`.
    """

    returns: Float[Array, " T"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyScores(TokenScores):
    """Log-probabilities of the whole vocabulary: what objectives over exact distributions consume.

    Never travels; the learner makes it, a chunk of rows at a time, from `HiddenScores`.
    """

    vocabulary_logprobs: Float[Array, "T V"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenScores(TokenScores):
    """Last hidden states (after the final norm); with the teacher's head they are `VocabularyScores`.

    Travels as `RemoteRows`. `head` is the number of the output matrix that reads each row: the place of the teacher
    in `Engines.teachers`, filled in by the scorer; left out by a teacher, who does not know it, it is 0. Where rows
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
class EnsembleScores(TokenScores):
    """Several teachers about the same tokens, to be read as one: the mixture `sum_m shares[m] * p_m`.

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """A prompt and what was written for it.

    `behavior` is the testimony of the policy that wrote (the *actual* sampling distribution, after temperature and
    truncation); `versions` says which policy version wrote each token (`NOBODY`: somebody else did); `loss_mask` is
    False where a token is context only. `sample` is its number within the group. `digests` names the published weights
    behind each of those versions (`Completion.digests`); it is empty for text that no student engine wrote.
    """

    prompt: Prompt
    sample: int
    token_ids: Int32[np.ndarray, " T"]
    behavior: TokenScores
    loss_mask: Bool[np.ndarray, " T"]
    versions: Int32[np.ndarray, " T"]
    stop: Stop
    rewards: Mapping[str, float]
    digests: Mapping[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.token_ids)


S = TypeVar("S", bound=Scores, covariant=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored(Generic[S]):
    """A trajectory with the testimony about it."""

    trajectory: Trajectory
    scores: S


@cache
def _names(kind: type) -> tuple[str, ...]:
    """The fields of a dataclass; `dataclasses.fields` builds them anew at every call, which every sample would pay."""
    return tuple(f.name for f in fields(kind))


@cache
def _large(kind: type) -> tuple[str, ...]:
    """Those of its fields that may hold arrays."""
    return tuple(f.name for f in fields(kind) if f.type not in (str, int, float, Stop))


def nbytes(value: Any) -> int:
    """Bytes of all arrays within a value of this module, those held elsewhere included."""
    if isinstance(value, np.ndarray | Tensor):
        return value.nbytes
    if isinstance(value, RemoteRows):
        return len(value) * value.row_nbytes
    if isinstance(value, tuple):
        return sum(map(nbytes, value))
    if isinstance(value, Prompt | Scores | Trajectory | Scored | Batch):
        parts = [getattr(value, name) for name in _large(type(value))]
        return sum([part.nbytes if isinstance(part, np.ndarray) else nbytes(part) for part in parts])
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch(Generic[S]):
    """A micro-batch: `M` sequences packed into `N` tokens, `L` of which are trained.

    `predict_at` picks the hidden states that predict the trained tokens *before* the vocabulary projection.
    `denominator` is global (all micro-batches, all ranks) and known before the first backward, so a loss is
    `sum(weights * loss) / denominator` and adds up over any split. `depth` is a token's place in its completion,
    from 0; tokens of weight 0 count as places. `routes` names the teachers that the prompts of the step ask, and
    `route` is the number of each trained token's; with a single one `route` is empty (`R` is 0 or `L`).
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
    names: tuple[str, ...] = ()  # of the sequences, for messages and for what is drawn; () where nobody gave any

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
        return replace(self, **cut, scores=self.scores.rows(start, stop))

    def to(self, device: torch.device | str, get: Fetch) -> "Batch[S]":
        """Tensors on `device`, ids widened to int64 (what embedding and gather want)."""
        moved = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("scores", "denominator", "routes", "names"):
                continue
            tensor = torch.as_tensor(value)
            moved[f.name] = (tensor if tensor.is_floating_point() else tensor.long()).to(device)
        return replace(self, **moved, scores=self.scores.to(device, get))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLoss:
    """An unreduced loss, so that the learner may evaluate it in chunks; metrics are per token, detached.

    NaN in a metric means "not defined at this token" (an empty overlap, another position bucket): means are taken
    over the tokens where it is defined. A NaN in `loss` is an error that the learner reports.
    """

    loss: Float[Tensor, " L"]
    metrics: Mapping[str, Float[Tensor, " L"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one optimizer step did. `metrics` are means over those trained tokens of the whole batch at which they
    are defined (`opd.tally`); one that was defined nowhere is absent. `skipped`: the loss or the gradient norm was not
    finite, so weights and optimizer are those of before."""

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    trained_tokens: int
    metrics: Mapping[str, float]
    skipped: bool = False
