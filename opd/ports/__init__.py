"""Ports: protocols of the engines around the loop, and the requests and answers that cross them.

Applications implement these without inheriting from them; a pool of engines has the same protocol as one engine.
"""

from opd.ports.calls import Call
from opd.ports.embeddings import Embeddings, NoEmbeddings
from opd.ports.engines import (
    Context,
    Engines,
    Grader,
    LogprobTeacher,
    NamesAnswers,
    ReadsReferences,
    StudentEngine,
    TextEngine,
    Tokenizer,
)
from opd.ports.environment import Environment, MakeEnvironment, Outcome
from opd.ports.learner import Layout, Learner, LossFunction, Observer, Rank, Reading, broadcast
from opd.ports.needs import Need, Role, needs_of
from opd.ports.prompts import Answered, Elsewhere, Listed, PromptSource, References, Routed, Sources, Windowed
from opd.ports.requests import Completion, GenerateRequest, Sampling, ScoreAnswer, ScoreRequest, TeacherBlend
from opd.ports.score_kinds import AtIds, LastHidden, LogitRows, SampledToken, ScoreKind, ScoreKinds, TopK
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
    "Context",
    "Elsewhere",
    "Embeddings",
    "Engines",
    "Environment",
    "Fill",
    "GenerateRequest",
    "Grader",
    "LastHidden",
    "Layout",
    "Learner",
    "Listed",
    "LogitRows",
    "LogprobTeacher",
    "LossFunction",
    "MakeEnvironment",
    "Manifest",
    "NamesAnswers",
    "Need",
    "NoEmbeddings",
    "Observer",
    "Outcome",
    "PromptSource",
    "PublishReport",
    "PublishedWeights",
    "Rank",
    "Reading",
    "ReadsReferences",
    "References",
    "Role",
    "Routed",
    "SampledToken",
    "Sampling",
    "ScoreAnswer",
    "ScoreKind",
    "ScoreKinds",
    "ScoreRequest",
    "Sentinel",
    "Sources",
    "StudentEngine",
    "TeacherBlend",
    "TextEngine",
    "Tokenizer",
    "TopK",
    "WeightAck",
    "WeightChunk",
    "WeightObserver",
    "WeightSender",
    "WeightShard",
    "Windowed",
    "broadcast",
    "needs_of",
]
