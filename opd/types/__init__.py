"""The data that flows through a step.

Axes: `P` student context, `Q` teacher context, `T` completion tokens of one trajectory, `K` support,
`V` vocabulary, `H` hidden width, `N` packed tokens of a micro-batch, `L` trained tokens of a micro-batch,
`M` sequences in it. Ids travel as int32, log-probabilities as float32 (natural log). Everything is frozen;
stages return new values.
"""

from opd.types.batch import Batch, StepReport, TermRows, TokenLoss, nbytes
from opd.types.remote_rows import Fetch, RemoteRows
from opd.types.scores import (
    AdvantageScores,
    Array,
    BlendedScores,
    CreditScores,
    DeltaScores,
    DeviationScores,
    EnsembleScores,
    EvidenceScores,
    FutureScores,
    HiddenScores,
    S,
    Scores,
    TargetScores,
    TokenScores,
    TopKReturnScores,
    TopKScores,
    VocabularyScores,
)
from opd.types.trajectories import NO_VERSION, Prompt, Scored, StopReason, Trajectory

__all__ = [
    "NO_VERSION",
    "AdvantageScores",
    "Array",
    "Batch",
    "BlendedScores",
    "CreditScores",
    "DeltaScores",
    "DeviationScores",
    "EnsembleScores",
    "EvidenceScores",
    "Fetch",
    "FutureScores",
    "HiddenScores",
    "Prompt",
    "RemoteRows",
    "S",
    "Scored",
    "Scores",
    "StepReport",
    "StopReason",
    "TargetScores",
    "TermRows",
    "TokenLoss",
    "TokenScores",
    "TopKReturnScores",
    "TopKScores",
    "Trajectory",
    "VocabularyScores",
    "nbytes",
]
