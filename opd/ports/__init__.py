"""What the loop asks of the engines around it: protocols, and the requests that cross them.

Applications implement these without inheriting from them; a pool of engines has the same protocol as one engine.
"""

from opd.ports.engines import Engines, Grader, LogprobTeacher, ReadsReferences, StudentEngine, TextEngine, Tokenizer
from opd.ports.learner import Layout, Learner, Objective, Observer
from opd.ports.prompts import Answered, Listed, PromptSource, References, Routed, Sources
from opd.ports.requests import (
    AtIds,
    Completion,
    GenerateRequest,
    Kinds,
    LastHidden,
    Sampling,
    ScoreRequest,
    TopK,
    Want,
    WrittenToken,
)
from opd.ports.weights import Chunk, Fill, Manifest, Outlet, PublishReport, Receipt, Sentinel, Share, Weights

__all__ = [
    "Answered",
    "AtIds",
    "Chunk",
    "Completion",
    "Engines",
    "Fill",
    "GenerateRequest",
    "Grader",
    "Kinds",
    "LastHidden",
    "Layout",
    "Learner",
    "Listed",
    "LogprobTeacher",
    "Manifest",
    "Objective",
    "Observer",
    "Outlet",
    "PromptSource",
    "PublishReport",
    "ReadsReferences",
    "Receipt",
    "References",
    "Routed",
    "Sampling",
    "ScoreRequest",
    "Sentinel",
    "Share",
    "Sources",
    "StudentEngine",
    "TextEngine",
    "Tokenizer",
    "TopK",
    "Want",
    "Weights",
    "WrittenToken",
]
