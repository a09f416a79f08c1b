"""Identity of a teacher server: its model, its vocabulary, its score kinds and bounds."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from hf.digest import model_digest
from hf.tokenizer_check import tokenizer_identity
from opd.errors import DataError
from opd.ports.score_kinds import BUILT_IN
from teacher_service.config import COMPUTING, Backend, TeacherConfig
from teacher_service.frames import FrameLimits
from teacher_service.known_kinds import KnownKinds, known_kinds, wire_code

PROTOCOL = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Identity of a teacher server, known before anything is scored.

    `model` is the digest of its weights (hex), `vocabulary` that of its tokens with their ids, `rows` the ids it
    accepts, `dtype` the numbers it computes in, `supports` the wire names of the kinds of scores, `limits` those of
    one frame.
    """

    model: str
    vocabulary: str
    rows: int
    dtype: str
    supports: tuple[str, ...]
    limits: FrameLimits

    def to_json(self) -> str:
        """As the server sends it."""
        return json.dumps({"protocol": PROTOCOL, **asdict(self)})


def parse_identity(text: str) -> Identity:
    """Identity in a server's answer. Raises `DataError` if there is none, or one of another protocol."""
    try:
        fields: dict[str, Any] = json.loads(text)
        protocol = fields.pop("protocol")
        if protocol != PROTOCOL:
            raise DataError(
                f"the teacher's server speaks protocol {protocol}, this client {PROTOCOL}; update one of them"
            )
        supports = tuple(str(name) for name in fields.pop("supports"))
        identity = Identity(**(fields | {"supports": supports, "limits": FrameLimits(**fields["limits"])}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            "the teacher's server does not say who it is; is teacher.url an `opd serve-teacher` of this version?"
        ) from error
    return identity


def served_kinds(config: TeacherConfig) -> KnownKinds:
    """The kinds that a server over `config.backend` answers: those of the project, and those that it names."""
    named = {code: kind for code, kind in known_kinds(config.score_kinds).items() if kind not in BUILT_IN}
    own = {wire_code(kind): kind for kind in BUILT_IN if kind in config.supports}
    return own | (named if config.backend in (*COMPUTING, Backend.HTTP) else {})


def identity_of(config: TeacherConfig, dtype: str, limits: FrameLimits) -> Identity:
    """The identity of the model in `config.path`, served by `config.backend`."""
    tokens = tokenizer_identity(config.path)
    return Identity(
        model=model_digest(config.path),
        vocabulary=tokens.digest,
        rows=tokens.rows,
        dtype=dtype,
        supports=tuple(kind.wire_name() for kind in served_kinds(config).values()),
        limits=limits,
    )
