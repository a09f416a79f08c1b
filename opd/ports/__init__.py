"""What the loop asks of the engines around it: protocols, and the requests that cross them.

Applications implement these without inheriting from them; a pool of engines has the same protocol as one engine.
"""

from opd.ports.engines import Engines, Grader, LogprobTeacher, ReadsReferences, StudentEngine, TextEngine, Tokenizer
from opd.ports.environment import Environment, MakeEnvironment, Outcome
from opd.ports.learner import Layout, Learner, LossFunction, Observer
from opd.ports.needs import Need, Role, needs_of
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
    WeightSender,
    WeightShard,
)

__all__ = [
    "Answered",
    "AtIds",
    "Completion",
    "Engines",
    "Environment",
    "Fill",
    "GenerateRequest",
    "Grader",
    "LastHidden",
    "Layout",
    "Learner",
    "Listed",
    "LogprobTeacher",
    "LossFunction",
    "MakeEnvironment",
    "Manifest",
    "Need",
    "Observer",
    "Outcome",
    "PromptSource",
    "PublishReport",
    "PublishedWeights",
    "ReadsReferences",
    "References",
    "Role",
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
    "WeightSender",
    "WeightShard",
    "needs_of",
]
