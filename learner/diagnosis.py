"""Diagnosis of a step that is not finite: its first infinite importance ratio, sought when a run is about to end."""

from dataclasses import dataclass, field

import numpy as np
import torch

from learner import engine
from opd.loss.chunked import StudentLogits
from opd.types import Batch, Scores, TokenLoss

_BYTES = 600  # of a sentence, which ranks pass on as numbers


@dataclass(frozen=True, slots=True)
class InfiniteRatio:
    """An objective that trains nothing and notes the trained tokens whose importance ratio `p / mu` is not finite."""

    found: list[str] = field(default_factory=list)

    @torch.no_grad()
    def __call__(self, student: StudentLogits, batch: Batch[Scores]) -> TokenLoss:
        own = student.at(batch.target_ids)
        gap = own - batch.behavior_logprobs
        broken = ~gap.exp().isfinite() & (batch.weights > 0)
        if bool(broken.any()) and not self.found:
            self.found.append(_sentence(batch, int(broken.nonzero()[0, 0]), own, int(broken.sum())))
        return TokenLoss(loss=torch.zeros_like(own), metrics={})


def _sentence(batch: Batch[Scores], row: int, own: torch.Tensor, count: int) -> str:
    sequence = int(
        torch.searchsorted(torch.as_tensor(batch.cu_seqlens)[1:].contiguous(), batch.predict_at[row], right=True)
    )
    name = batch.names[sequence] if batch.names else f"sequence {sequence} of a micro-batch"
    writer, student = float(batch.behavior_logprobs[row]), float(own[row])
    return (
        f"the importance ratio p / mu is not finite at token {int(batch.depth[row])} (id {int(batch.target_ids[row])}) "
        f"of {name}: log p is {student:.4g} and log mu, of the engine that wrote it, {writer:.4g}"
        + (f" (and at {count - 1} tokens beside it)" if count > 1 else "")
    )


def from_first_rank(text: str, rank: int, ranks: int, device: torch.device) -> str:
    """The text of the first rank that has one, on every rank; a collective call."""
    first = engine.max_over_ranks(torch.tensor([-rank if text else -ranks], dtype=torch.float64, device=device))
    mine = text.encode()[:_BYTES] if text and -int(first[0]) == rank else b""
    text_bytes = torch.from_numpy(np.frombuffer(mine.ljust(_BYTES, b"\0"), dtype=np.uint8).astype(np.float64)).to(
        device
    )
    return bytes(engine.sum_over_ranks(text_bytes).cpu().to(torch.uint8).numpy()).rstrip(b"\0").decode(errors="ignore")
