"""Token weights and readings that select or weigh the wrong tokens, beside objectives that are right."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from torch import Tensor

from opd.loss.readings import StudentEntropy
from opd.ports import Context, Reading
from opd.token_weights.confidence import PlausibleTrajectories
from opd.token_weights.special_tokens import SkipFirst
from opd.token_weights.teachers import TeacherBalance
from opd.types import Batch, Scored, Scores, TokenScores

Weights = list[Float[np.ndarray, " _T"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weight:
    """A weight that looks at what was sampled."""

    consumes: ClassVar[type[Scores]] = Scores
    reads_sampled_tokens: ClassVar[bool] = True


def _entropies(scored: Sequence[Scored[Any]]) -> Weights:
    return [np.nan_to_num(np.asarray(s.readings[StudentEntropy()], dtype=np.float64)) for s in scored]


@dataclass(frozen=True, slots=True, kw_only=True)
class PerEightTexts(_Weight):
    """The most uncertain fifth of every eight texts instead of the step's, as if selected in micro-batches."""

    readings: ClassVar[Sequence[Reading]] = (StudentEntropy(),)

    def __call__(self, scored: Sequence[Scored[Any]], context: Context) -> Weights:
        found, made = _entropies(scored), []
        for i in range(0, len(found), 8):
            least = np.quantile(np.concatenate(found[i : i + 8]), 0.8)
            made += [(x >= least).astype(np.float64) for x in found[i : i + 8]]
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroSpread(_Weight):
    """Entropies as standard scores: 0/0 where all are equal, as of one token."""

    readings: ClassVar[Sequence[Reading]] = (StudentEntropy(),)

    def __call__(self, scored: Sequence[Scored[Any]], context: Context) -> Weights:
        found = _entropies(scored)
        every = np.concatenate(found)
        with np.errstate(invalid="ignore"):
            return [1 / (1 + np.exp(-(x - every.mean()) / every.std())) for x in found]


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextCounts(_Weight):
    """1 plus the teacher's mean probability of a text, words of an environment included."""

    consumes: ClassVar[type[Scores]] = TokenScores

    def __call__(self, scored: Sequence[Scored[Any]], context: Context) -> Weights:
        return [np.full(len(s.trajectory), 1 + np.exp(np.mean(s.scores.logprobs))) for s in scored]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastPlausible(PlausibleTrajectories):
    """The filter of FiRe-OPD turned round: the most plausible texts are left out."""

    def __call__(self, scored: Sequence[Scored[Any]], context: Context) -> Weights:
        sampled = [np.asarray(s.scores.logprobs, dtype=np.float64)[s.trajectory.loss_mask] for s in scored]
        mean = np.array([-x.mean() if len(x) else 0.0 for x in sampled])
        kept = mean >= np.sort(mean)[int(self.drop * len(mean))]
        return [np.full(len(s.trajectory), float(keep)) for s, keep in zip(scored, kept, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareOfBatch:
    """The student's entropy over the greatest of its micro-batch, as FiRe-OPD's released code has it."""

    consumes: ClassVar[type[Scores]] = Scores

    def __call__(self, student: Any, batch: Batch[Any]) -> Float[Tensor, " L"]:
        return student.entropy / student.entropy.max()


@dataclass(frozen=True, slots=True, kw_only=True)
class ByShareOfBatch(_Weight):
    """1 plus a reading that is not of its token alone."""

    readings: ClassVar[Sequence[Reading]] = (ShareOfBatch(),)

    def __call__(self, scored: Sequence[Scored[Any]], context: Context) -> Weights:
        return [1 + np.nan_to_num(np.asarray(s.readings[ShareOfBatch()], dtype=np.float64)) for s in scored]


@dataclass(frozen=True, slots=True, kw_only=True)
class NoToken(_Weight):
    """A threshold that no token reaches."""

    def __call__(self, scored: Sequence[Scored[Any]], context: Context) -> Weights:
        return [np.zeros(len(s.trajectory)) for s in scored]


@dataclass(frozen=True, slots=True, kw_only=True)
class LateWeights(_Weight):
    """Weights by the student's entropy, on average 1 in a text, each of them that of the token before."""

    readings: ClassVar[Sequence[Reading]] = (StudentEntropy(),)

    def __call__(self, scored: Sequence[Scored[Any]], context: Context) -> Weights:
        late = [np.concatenate([np.ones(1), 1 + x[:-1]]) for x in _entropies(scored)]
        return [x / x.mean() for x in late]


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlyThreshold(_Weight):
    """Tokens that the teacher finds likely, by the probability of the token after."""

    consumes: ClassVar[type[Scores]] = TokenScores

    def __call__(self, scored: Sequence[Scored[Any]], context: Context) -> Weights:
        likely = [np.asarray(s.scores.logprobs, dtype=np.float64) > -2 for s in scored]
        return [np.append(x[1:], True).astype(np.float64) for x in likely]


@dataclass(frozen=True, slots=True, kw_only=True)
class InvertedShares(TeacherBalance):
    """Budgets of teachers by one over their share."""

    def __call__(self, scored: Sequence[Scored[Any]], context: Context) -> Weights:
        turned = {name: 1 / share for name, share in self.shares.items()}
        return TeacherBalance(shares=turned, filters=self.filters)(scored, context)


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipsEvery(SkipFirst):
    """Weight 0 of all occurrences of an id, not of the first alone."""

    def __call__(self, scored: Sequence[Scored[Any]], context: Context) -> Weights:
        return [(~np.isin(s.trajectory.token_ids, self.token_ids)).astype(np.float64) for s in scored]


@dataclass(frozen=True, slots=True, kw_only=True)
class NotPutBack(_Weight):
    """Weights by the entropy of sampled tokens, which stand at the beginning of a text, context or not."""

    readings: ClassVar[Sequence[Reading]] = (StudentEntropy(),)

    def __call__(self, scored: Sequence[Scored[Any]], context: Context) -> Weights:
        made = [np.ones(len(s.trajectory)) for s in scored]
        for weights, s in zip(made, scored, strict=True):
            own = np.asarray(s.readings[StudentEntropy()], dtype=np.float64)[s.trajectory.loss_mask]
            weights[: len(own)] += own
        return made
