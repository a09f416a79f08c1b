"""Recorded completions: text, and the log-probability difference teacher - behavior of every token."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from launch.artifacts.untrusted_files import record
from opd.loop.train import StepRecord
from opd.types import AdvantageScores, Scored, TokenScores

Decode = Callable[[np.ndarray], str]

MAX_TOKENS = 512  # what a page can show of one completion; long reasoning is cut
_UNFINISHED = "\ufffd"  # a character of which a byte-level token holds only a part


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One completion of a step, token by token. `"".join(tokens)` is its text.

    `gaps` is the teacher's log-probability minus the writer's, per token (None where no teacher read the
    tokens); `reward` is None where nothing was graded. `length` counts all tokens, also those that were cut.
    Example: `Sample(step=1, prompt="has 3 7 ; Mon gives 8 ?", answer="2 9", tokens=("Mon", " 3"), gaps=(-0.1,
    0.0), reward=None, version=0, stop="end", length=49)`.
    """

    step: int
    prompt: str
    answer: str
    tokens: tuple[str, ...]
    gaps: tuple[float, ...] | None
    reward: float | None
    version: int
    stop: str
    length: int

    @property
    def text(self) -> str:
        """The completion, as far as it was kept."""
        return "".join(self.tokens)

    def as_json(self) -> dict[str, Any]:
        """A plain mapping."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str = "a sample") -> "Sample":
        """Inverse of `as_json`. Raises `DataError` for anything else."""
        return record(cls, values, where, "remove that line")


def samples_of(record: StepRecord, decode: Decode, count: int) -> list[Sample]:
    """`count` completions of a step, evenly spread over it so that they come from different prompts."""
    chosen = np.unique(np.linspace(0, len(record.scored) - 1, min(count, len(record.scored))).astype(int))
    return [_sample(record.step, record.scored[i], decode) for i in chosen]


def token_pieces(ids: np.ndarray, decode: Decode) -> list[str]:
    """Text that each token adds.

    Tokens are decoded in their context, because a tokenizer may write a space only between two of them. Bytes
    of an unfinished character are shown with the token that completes it.
    """
    pieces: list[str] = []
    begin = shown = 0
    for end in range(1, len(ids) + 1):
        before, now = decode(ids[begin:shown]), decode(ids[begin:end])
        if len(now) > len(before) and not now.endswith(_UNFINISHED):
            pieces.append(now[len(before) :])
            begin, shown = shown, end
        else:
            pieces.append("")
    return pieces


def _sample(step: int, item: Scored[Any], decode: Decode) -> Sample:
    trajectory = item.trajectory
    ids = trajectory.token_ids[:MAX_TOKENS]
    return Sample(
        step=step,
        prompt=decode(trajectory.prompt.student_ids),
        answer=trajectory.prompt.answer,
        tokens=tuple(token_pieces(ids, decode)),
        gaps=_gaps(item),
        reward=_reward(item),
        version=int(trajectory.versions[0]) if len(trajectory) else step - 1,
        stop=trajectory.stop.value,
        length=len(trajectory),
    )


def _gaps(item: Scored[Any]) -> tuple[float, ...] | None:
    if not isinstance(item.scores, TokenScores):
        return None
    gaps = np.asarray(item.scores.logprobs) - np.asarray(item.trajectory.behavior.logprobs)
    gaps = np.where(item.trajectory.loss_mask, gaps, 0)  # of an observation there is no writer
    return tuple(round(float(gap), 3) for gap in gaps[:MAX_TOKENS])


def _reward(item: Scored[Any]) -> float | None:
    if isinstance(item.scores, AdvantageScores) and len(item.scores.rewards):
        return float(np.mean(item.scores.rewards))
    return item.trajectory.reward
