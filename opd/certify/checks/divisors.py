"""Check of a method's normalizer against its definition: what every trained token of a step counts in the end."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float

from opd.certify.certificate import Finding, Row, Skipped
from opd.certify.checks.invariances import uneven_step
from opd.certify.fitting import other_settings
from opd.certify.gradients import EXACT, ONE_RANK, Case, relative_difference
from opd.loss.packing import Constant, SequenceMean, SequenceSum, TokenMean, WeightMean, pack

DIVIDED = "a token counts in its step as the normalizer is defined"
Known = TokenMean | WeightMean | SequenceMean | SequenceSum | Constant


def check_divisor(case: Case) -> Iterator[Finding]:
    """Weight over divisor of every trained token, at every other legal setting too, with texts of several lengths."""
    normalizer = case.method.normalizer
    if not isinstance(normalizer, Known):
        yield Skipped(name=DIVIDED, why="no definition is known for this normalizer; the other row holds without one")
        return
    enumeration, weights = uneven_step(case)
    weights = [w * (np.arange(len(w)) <= i % 3) for i, w in enumerate(weights)]
    errors = []
    for one in (normalizer, *other_settings(normalizer)):
        ((batch,),) = pack(enumeration.scored, weights, ONE_RANK, one)
        found = np.asarray(batch.weights, dtype=np.float64) / batch.denominator
        errors.append(relative_difference(torch.from_numpy(found), torch.from_numpy(_shares(one, weights))))
    yield Row(name=DIVIDED, measured=max(errors), tolerance=EXACT)


def _shares(normalizer: Known, weights: Sequence[Float[np.ndarray, " _T"]]) -> Float[np.ndarray, " n"]:
    """Share of every token with a weight in its step, in the order of the texts."""
    trained = [w[w > 0] for w in weights if (w > 0).any()]
    every = np.concatenate(trained)
    match normalizer:
        case TokenMean():
            return every / len(every)
        case WeightMean():
            return every / sum(every.tolist())
        case SequenceMean():
            return np.concatenate([w / len(w) for w in trained]) / len(trained)
        case SequenceSum():
            return every / len(trained)
        case Constant():
            return every / normalizer.divisor
