"""What a server says about itself: which model it is, and what it answers."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hf.digest import model_digest
from hf.tokenizer_check import tokenizer_identity
from opd.errors import DataError
from opd.ports import AtIds, LastHidden, SampledToken, ScoreKinds, TopK
from teacher_service.config import TeacherConfig
from teacher_service.frames import FrameLimits

PROTOCOL = 1
_NAMES: Mapping[str, type] = {"written": SampledToken, "topk": TopK, "at_ids": AtIds, "hidden": LastHidden}


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a teacher server says about itself, before anything is scored.

    `model` is the digest of its weights (hex), `vocabulary` that of its tokens with their ids, `rows` the ids it
    accepts, `dtype` the numbers it computes in, `answers` the kinds of testimony, `limits` those of one frame.
    """

    model: str
    vocabulary: str
    rows: int
    dtype: str
    answers: tuple[str, ...]
    limits: FrameLimits

    def to_json(self) -> str:
        """As the server sends it."""
        return json.dumps({"protocol": PROTOCOL, **asdict(self)})

    @property
    def kinds(self) -> ScoreKinds:
        """`answers` as request kinds."""
        return frozenset(_NAMES[name] for name in self.answers)


def parse_identity(text: str) -> Identity:
    """Read what a server said. Raises `DataError` if it is no identity, or one of another protocol."""
    try:
        said: dict[str, Any] = json.loads(text)
        protocol = said.pop("protocol")
        answers = tuple(str(name) for name in said.pop("answers") if name in _NAMES)
        identity = Identity(**(said | {"answers": answers, "limits": FrameLimits(**said["limits"])}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            "the teacher's server does not say who it is; is teacher.url an `opd serve-teacher` of this version?"
        ) from error
    if protocol != PROTOCOL:
        raise DataError(f"the teacher's server speaks protocol {protocol}, this client {PROTOCOL}; update one of them")
    return identity


def identity_of(config: TeacherConfig, dtype: str, limits: FrameLimits) -> Identity:
    """The identity of the model in `config.path`, served by `config.backend`."""
    tokens = tokenizer_identity(config.path)
    return Identity(
        model=model_digest(config.path),
        vocabulary=tokens.digest,
        rows=tokens.rows,
        dtype=dtype,
        answers=tuple(name for name, kind in _NAMES.items() if kind in config.answers),
        limits=limits,
    )
