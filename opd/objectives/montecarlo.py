"""Divergences on tokens that the learner draws itself: several per state, from the current student."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
import xxhash
from jaxtyping import Float, Int
from torch import Tensor

from opd.loss.chunked import StudentLogits
from opd.objectives.vocabulary import Estimate
from opd.settings.ranges import In, Seed
from opd.settings.validation import settings
from opd.splitmix64 import GOLDEN, mix_
from opd.types import Batch, Scores, TokenLoss, VocabularyScores


def _sequences(batch: Batch[Scores]) -> Int[Tensor, " n"]:
    """Integer hash of the name of every row's sequence."""
    if not batch.names:
        return torch.zeros_like(batch.target_ids.long())
    words = np.array([xxhash.xxh3_64_intdigest(name.encode()) for name in batch.names], dtype=np.uint64).view(np.int64)
    ends = torch.as_tensor(batch.cu_seqlens)[1:].contiguous()
    return torch.from_numpy(words).to(ends.device)[torch.searchsorted(ends, batch.predict_at, right=True)]


def uniform(batch: Batch[Scores], count: int, seed: int) -> Float[Tensor, "n m"]:
    """Numbers in [0, 1) that depend on which row this is and nothing else: step, prompt and sample (the name of its
    sequence), position, token, and its behavior log-probability.

    The same row gets the same numbers in whatever micro-batch, chunk or rank it lies, and whether or not a run was
    resumed; others at every other step and in every other sample, also where the text is the same.
    """
    position = batch.position_ids[batch.predict_at].long()
    bits = batch.behavior_logprobs.float().contiguous().view(torch.int32).long()
    key = torch.full_like(position, seed)
    for part in (_sequences(batch), position, batch.target_ids.long(), bits):
        key = mix_((key ^ part) + GOLDEN)
    counter = torch.arange(1, count + 1, device=key.device) * GOLDEN
    words = mix_(key[:, None] + counter)
    return ((words >> 11) & (2**53 - 1)).double() / 2**53


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class MonteCarloDivergence(Estimate):
    """Any direction from `samples` tokens per state that the learner draws from the current student.

    Direction: `of`. Support: m drawn tokens. Estimator: `1/m sum_i r_i sg(slope_i)`, r = p / sg(p), for the reverse KL
    with the slope log p - log q; the expected gradient is exact on text of any origin, because only the state is taken
    from it. (AsyncOPD, arXiv 2606.24143, has the reverse KL and finds m = 4 as good as 64.) Noise is counter-based, so
    packing does not change it.
    """

    consumes: ClassVar[type[Scores]] = VocabularyScores
    on_policy: ClassVar[bool] = False

    # tokens per state that the learner draws from the current student
    samples: Annotated[int, In(1, 10_000)] = 4
    # of these draws
    seed: Seed = 0

    def draw(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> Int[Tensor, "n m"]:
        """Ids by inversion of the student's cumulative distribution."""
        logprobs = student.logprobs.detach()  # computed once, with its graph, then detached
        with torch.no_grad():
            total = logprobs.double().exp().cumsum(-1)
            at = uniform(batch, self.samples, self.seed) * total[:, -1:]
            return torch.searchsorted(total, at, right=True).clamp(max=total.shape[1] - 1)

    def given(self, ids: Int[Tensor, "n m"], student: StudentLogits, batch: Batch[VocabularyScores]) -> TokenLoss:
        """Loss if `ids` were drawn."""
        p, q = student.at_support(ids), batch.scores.vocabulary_logprobs.gather(-1, ids)
        old = p.detach()
        loss = ((p - old).exp() * self.of.slope(old, q)).mean(-1)
        return TokenLoss(loss=loss, metrics={})

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> TokenLoss:
        return self.given(self.draw(student, batch), student, batch)
