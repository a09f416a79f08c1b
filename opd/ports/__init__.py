"""What the loop asks of the engines around it: protocols, and the requests that cross them.

Applications implement these without inheriting from them; a pool of engines has the same protocol as one engine.
"""

from opd.ports.calls import Call
from opd.ports.engines import Engines, Grader, LogprobTeacher, ReadsReferences, StudentEngine, TextEngine, Tokenizer
from opd.ports.learner import Layout, Learner, LossFunction, Observer, Rank, broadcast
from opd.ports.prompts import Answered, Listed, PromptSource, References, Routed, Sources
from opd.ports.requests import (
    AtIds,
    Completion,
    GenerateRequest,
    LastHidden,
    SampledToken,
    Sampling,
    ScoreKind,
    ScoreKinds,
    ScoreRequest,
    TopK,
)
from opd.ports.weights import (
    Fill,
    Manifest,
    PublishedWeights,
    PublishReport,
    Sentinel,
    WeightAck,
    WeightChunk,
    WeightObserver,
    WeightSender,
    WeightShard,
)

__all__ = [
    "Answered",
    "AtIds",
    "Call",
    "Completion",
    "Engines",
    "Fill",
    "GenerateRequest",
    "Grader",
    "LastHidden",
    "Layout",
    "Learner",
    "Listed",
    "LogprobTeacher",
    "LossFunction",
    "Manifest",
    "Observer",
    "PromptSource",
    "PublishReport",
    "PublishedWeights",
    "Rank",
    "ReadsReferences",
    "References",
    "Routed",
    "SampledToken",
    "Sampling",
    "ScoreKind",
    "ScoreKinds",
    "ScoreRequest",
    "Sentinel",
    "Sources",
    "StudentEngine",
    "TextEngine",
    "Tokenizer",
    "TopK",
    "WeightAck",
    "WeightChunk",
    "WeightObserver",
    "WeightSender",
    "WeightShard",
    "broadcast",
]
