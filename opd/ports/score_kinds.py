"""Score kinds: the quantities that a teacher can give for every token of a text.

A kind is one class: its parameters, how its answer follows from logits, the type of that answer (whose annotations are
the wire form), and what a true answer fulfills. One outside this file needs no registration: name it in a scorer's
`requires`, and for a teacher behind HTTP in `teacher.score_kinds` on both sides.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from opd.types import HiddenScores, RemoteRows, Scores, TokenScores, TopKScores
from opd.types.columns import Column, columns
from opd.types.log_mass import ABSENT
from opd.types.log_probs import MASS, are_logprobs, contradiction, support_mass

A = TypeVar("A", bound=Scores, covariant=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitRows:
    """Logits over the vocabulary at successive tokens, and the ids that were sampled there.

    `total` is the logsumexp of every row, so `logits - total` are log-probabilities; `own` are those of `target_ids`.
    `best` are the largest logits and their ids, as many as the deepest kind needs.
    """

    logits: Float[Tensor, "R V"]
    total: Float[Tensor, "R 1"]
    target_ids: Int[Tensor, " R"]
    own: Float[Tensor, " R"]
    best: tuple[Float[Tensor, "R B"], Int[Tensor, "R B"]] | None

    @staticmethod
    def of(
        logits: Float[Tensor, "R V"], total: Float[Tensor, "R 1"], target_ids: Int[Tensor, " R"], depth: int = 0
    ) -> "LogitRows":
        """Rows whose `depth` likeliest ids are searched once, for all kinds that need as many or fewer."""
        own = (logits.gather(1, target_ids[:, None]) - total)[:, 0]
        values, ids = logits.topk(depth) if depth else (logits[:, :0], target_ids[:, None][:, :0])
        return LogitRows(logits=logits, total=total, target_ids=target_ids, own=own, best=(values, ids))

    def rows(self, start: int, stop: int) -> "LogitRows":
        """The tokens `start:stop`, as views."""
        best = self.best and (self.best[0][start:stop], self.best[1][start:stop])
        cut = {f.name: getattr(self, f.name)[start:stop] for f in fields(self) if f.name != "best"}
        return LogitRows(**cut, best=best)

    def at(self, ids: Int[Tensor, "R K"]) -> Float[Tensor, "R K"]:
        """Log-probabilities of `ids` under the full softmax."""
        return self.logits.gather(1, ids) - self.total

    def likeliest(self, k: int) -> tuple[Float[Tensor, "R k"], Int[Tensor, "R k"]]:
        """Log-probabilities and ids of the `k` likeliest ids of every row, the likeliest first."""
        found = self.best if self.best is not None and self.best[0].shape[1] >= k else self.logits.topk(k)
        return found[0][:, :k] - self.total, found[1][:, :k]

    def rest(self, ids: Int[Tensor, "R K"]) -> Float[Tensor, " R"]:
        """Log of the probability of all other ids than `ids`.

        A copy of the rows would double the largest array there is; so `ids` are blotted out in `logits` and put back.
        """
        kept = self.logits.gather(1, ids)
        others = self.logits.scatter_(1, ids, -torch.inf).logsumexp(-1, keepdim=True) - self.total
        self.logits.scatter_(1, ids, kept)
        return others.nan_to_num(neginf=ABSENT)[:, 0]


class ScoreKind(ABC, Generic[A]):
    """A kind of scores: a frozen dataclass whose fields are its parameters, numbers or arrays over tokens.

    `answer` is the type of the answer: its annotations (`Float[Array, "T K"]`) say what travels. `log_probabilities`
    names the columns of it that must be such. `asks` describes it in error sentences. `wire` is a short name on
    the wire; without one it is the path of the class.
    """

    __slots__ = ()

    answer: ClassVar[type[Scores]]
    log_probabilities: ClassVar[frozenset[str]] = frozenset()
    asks: ClassVar[str] = ""
    wire: ClassVar[str] = ""

    @abstractmethod
    def read(self, rows: LogitRows) -> Mapping[str, Tensor]:
        """The columns of the answer about `rows`, by name, `[R]` or `[R, size]`; remote ones are filled in by others.

        An array among the parameters has been cut to the same tokens.
        """

    @property
    def depth(self) -> int:
        """Number of likeliest ids that `read` uses; a search for the largest depth serves all kinds."""
        return 0

    @property
    def axes(self) -> Mapping[str, int]:
        """Sizes of the axes of the answer that follow from the parameters, by name."""
        return {}

    @classmethod
    def columns(cls) -> tuple[Column, ...]:
        """The columns that are answered."""
        return columns(cls.answer)

    @classmethod
    def wire_name(cls) -> str:
        """Name of the kind between processes."""
        return cls.wire or f"{cls.__module__}.{cls.__qualname__}"

    @classmethod
    def asked(cls) -> str:
        """Description of the kind, as the object of a sentence."""
        return cls.asks or cls.wire_name()

    def rows(self, start: int, stop: int) -> Self:
        """The same kind for the tokens `start:stop` alone."""
        parameters = {f.name: getattr(self, f.name) for f in fields(self)}  # pyright: ignore[reportArgumentType]
        cut = {name: value[start:stop] for name, value in parameters.items() if isinstance(value, np.ndarray)}
        return replace(self, **cut) if cut else self  # pyright: ignore[reportArgumentType]

    def unreadable(self, tokens: int, vocabulary: int, max_k: int) -> str:
        """Reason why a teacher that answers with at most `max_k` numbers per token cannot give it; "" if it can."""
        most = min(max_k, vocabulary)
        wrong = next(((a.lower(), n) for a, n in self.axes.items() if not 1 <= n <= most), None)
        if wrong is None and self.depth > most:
            wrong = ("depth", self.depth)
        if wrong is not None:
            return f"{wrong[0]}={wrong[1]} is not within 1 and {most} (teacher.max_k, vocabulary); correct it"
        for f in fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, f.name)
            if isinstance(value, np.ndarray) and len(value) != tokens:
                return f"its {f.name} are about {len(value)} tokens of {tokens}; correct the scorer"
        return ""

    def contradiction(self, token_ids: Int32[np.ndarray, " T"], scores: Any) -> str:
        """Contradiction of an answer of the right shape with itself or the request; "" if there is none."""
        return ""

    def problem(self, token_ids: Int32[np.ndarray, " T"], scores: Scores) -> str:
        """Reason why `scores` are no answer about the sampled `token_ids`; "" if they are one."""
        if not isinstance(scores, self.answer):
            return f"asked for {self.asked()}, got {type(scores).__name__}"
        for column in self.columns():
            problem = self._wrong(column, getattr(scores, column.name), len(token_ids))
            if problem:
                return problem
        return self.contradiction(token_ids, scores)

    def _wrong(self, column: Column, value: Any, tokens: int) -> str:
        if column.remote:
            if not isinstance(value, RemoteRows):
                return f"asked for {self.asked()} by reference, got {type(value).__name__} in {self.answer.__name__}"
            return f"expected {tokens} rows of {column.name}, got {len(value)}" if len(value) != tokens else ""
        array = np.asarray(value)
        if not array.ndim or len(array) != tokens:
            return f"expected {tokens} rows of {column.name}, got {len(array) if array.ndim else 'a number'}"
        if array.ndim != 1 + len(column.axes) or array.dtype.kind not in ("f" if column.dtype.kind == "f" else "iu"):
            return f"{column.name} has the shape {array.shape} and the dtype {array.dtype}"
        for axis, size in zip(column.axes, array.shape[1:], strict=True):
            if size != self.axes.get(axis, size):
                return f"asked for {axis.lower()}={self.axes[axis]}, got {axis.lower()}={size} in {column.name}"
        if column.name in self.log_probabilities and not are_logprobs(array):
            return f"{column.name} contains NaN, an infinity or a value above 0"
        if column.dtype.kind == "f" and not np.isfinite(array).all():
            return f"{column.name} contains NaN or an infinity"
        return ""


ScoreKinds = frozenset[type[ScoreKind[Scores]]]
"""Kinds of scores: what a scorer `requires`, what a teacher backend `supports`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledToken(ScoreKind[TokenScores]):
    """The log-probability of each sampled token."""

    answer: ClassVar[type[Scores]] = TokenScores
    log_probabilities: ClassVar[frozenset[str]] = frozenset({"logprobs"})
    asks: ClassVar[str] = "log-probabilities of sampled tokens"
    wire: ClassVar[str] = "written"

    def read(self, rows: LogitRows) -> Mapping[str, Tensor]:
        """The log-probabilities alone."""
        return {"logprobs": rows.own}


class _Support(ScoreKind[TopKScores]):
    """Log-probabilities at a few ids per token, under the full softmax."""

    __slots__ = ()

    answer: ClassVar[type[Scores]] = TopKScores
    log_probabilities: ClassVar[frozenset[str]] = frozenset({"logprobs", "topk_logprobs", "rest"})
    likeliest: ClassVar[bool]

    def contradiction(self, token_ids: Int32[np.ndarray, " T"], scores: Any) -> str:
        """Another number for a sampled token than in its support, or probabilities that do not sum to 1."""
        ids, values, rest = (np.asarray(x) for x in (scores.topk_ids, scores.topk_logprobs, scores.rest))
        if ids.shape != values.shape:
            return f"{ids.shape} ids have {values.shape} log-probabilities"
        problem = contradiction(
            np.asarray(token_ids), np.asarray(scores.logprobs), ids, values, likeliest=self.likeliest
        )
        whole = support_mass(ids, values) + np.exp(rest.astype(np.float64))
        if not problem and (np.abs(whole - 1) > MASS).any():
            return "the probabilities of a support and of the rest of the vocabulary do not sum to 1"
        return problem


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK(_Support):
    """The teacher's own `k` likeliest ids and their log-probabilities under the full softmax."""

    asks: ClassVar[str] = "the teacher's own top-k"
    wire: ClassVar[str] = "topk"
    likeliest: ClassVar[bool] = True

    k: int

    @property
    def depth(self) -> int:
        """All of them."""
        return self.k

    @property
    def axes(self) -> Mapping[str, int]:
        """`K`."""
        return {"K": self.k}

    def read(self, rows: LogitRows) -> Mapping[str, Tensor]:
        """The support and what it leaves."""
        values, ids = rows.likeliest(self.k)
        return {"logprobs": rows.own, "topk_ids": ids, "topk_logprobs": values, "rest": rows.rest(ids)}


@dataclass(frozen=True, slots=True, kw_only=True)
class AtIds(_Support):
    """Log-probabilities under the full softmax at ids that the caller names per token."""

    asks: ClassVar[str] = "log-probabilities at ids the student chose"
    wire: ClassVar[str] = "at_ids"
    likeliest: ClassVar[bool] = False

    ids: Int32[np.ndarray, "T K"]

    @property
    def axes(self) -> Mapping[str, int]:
        """`K`."""
        return {"K": self.ids.shape[1]} if self.ids.ndim == 2 else {}

    def read(self, rows: LogitRows) -> Mapping[str, Tensor]:
        """The support and what it leaves."""
        ids = torch.from_numpy(self.ids).long().to(rows.logits.device)
        return {"logprobs": rows.own, "topk_ids": ids, "topk_logprobs": rows.at(ids), "rest": rows.rest(ids)}

    def unreadable(self, tokens: int, vocabulary: int, max_k: int) -> str:
        """Ids of another shape, or of none of the vocabulary's tokens."""
        if self.ids.ndim != 2 or len(self.ids) != tokens or not 1 <= self.ids.shape[1] <= max_k:
            return (
                f"it asks at ids of shape {self.ids.shape}, but that must be ({tokens}, K) with K from 1 to "
                f"{max_k} (teacher.max_k); correct the scorer"
            )
        if self.ids.size and (self.ids.min() < 0 or self.ids.max() >= vocabulary):
            return f"it asks at ids outside the vocabulary of {vocabulary}; check that tokenizers agree"
        return ""

    def contradiction(self, token_ids: Int32[np.ndarray, " T"], scores: Any) -> str:
        """Other ids than were requested, or an answer that contradicts itself."""
        if not np.array_equal(scores.topk_ids, self.ids):
            return "the answer is about other token ids than were asked"
        return _Support.contradiction(self, token_ids, scores)


@dataclass(frozen=True, slots=True, kw_only=True)
class LastHidden(ScoreKind[HiddenScores]):
    """The hidden states (after the final norm) that predict each sampled token, by reference.

    The one kind that is no function of logits: the backend puts the states beside what `read` gives.
    """

    answer: ClassVar[type[Scores]] = HiddenScores
    log_probabilities: ClassVar[frozenset[str]] = frozenset({"logprobs"})
    asks: ClassVar[str] = "the whole vocabulary (last hidden states)"
    wire: ClassVar[str] = "hidden"

    @classmethod
    def columns(cls) -> tuple[Column, ...]:
        """Without `head`: a teacher does not know the number of its own output matrix."""
        return tuple(column for column in columns(cls.answer) if column.name != "head")

    def read(self, rows: LogitRows) -> Mapping[str, Tensor]:
        """The log-probabilities alone."""
        return {"logprobs": rows.own}


BUILT_IN: tuple[type[ScoreKind[Scores]], ...] = (SampledToken, TopK, AtIds, LastHidden)
"""The kinds of this file, which every version of the wire format has."""
