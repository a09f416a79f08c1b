"""Tiny language models, small enough to enumerate their completions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

Text = tuple[np.ndarray, np.ndarray]
WIDTH = 8
_FORGOTTEN = 64  # tokens back: 2^-64 of anything is less than a rounding step of float64


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyModel:
    """Causal model without attention: `h_i = tanh(sum_d 2^-d E[id_(i-d)])`, logits `h_i W^T`, in any dtype."""

    embedding: Float[Tensor, "V H"]
    head: Float[Tensor, "V H"]

    def to(self, dtype: torch.dtype) -> "TinyModel":
        """Model with the same parameters, rounded to `dtype`."""
        return TinyModel(embedding=self.embedding.to(dtype), head=self.head.to(dtype))

    def sharpened(self, times: float) -> "TinyModel":
        """Model with all logits multiplied by `times`."""
        return replace(self, head=self.head * times)

    def perturbed(self, draw: torch.Generator, by: float) -> "TinyModel":
        """Model with normal noise of standard deviation `by` on all parameters."""
        noise = torch.randn(2, *self.head.shape, generator=draw, dtype=torch.float64) * by
        return TinyModel(embedding=self.embedding + noise[0], head=self.head + noise[1])

    def hidden(self, ids: Int[Tensor, " N"], positions: Int[Tensor, " N"]) -> Float[Tensor, "N H"]:
        """Hidden states of packed sequences; `positions` count from the start of each sequence."""
        total, back = self.embedding[ids], 1
        while back <= min(int(positions.max()), _FORGOTTEN):  # each turn doubles how far back is seen
            total = total + total.roll(back, 0) * (positions >= back)[:, None] * 0.5**back
            back *= 2
        return total.tanh()

    def logits(self, hidden: Float[Tensor, "N H"]) -> Float[Tensor, "N V"]:
        """Logits as the learner has them: at least float32."""
        logits = hidden @ self.head.T
        return logits if logits.dtype == torch.float64 else logits.float()

    def hidden_states(self, texts: Sequence[Text]) -> list[Float[Tensor, "_T H"]]:
        """Hidden states that predict the completion tokens of every `(context, completion)`."""
        packed = [np.concatenate([context, completion[:-1]]) for context, completion in texts]
        lengths = [len(ids) for ids in packed]
        positions = torch.as_tensor(np.concatenate([np.arange(n) for n in lengths]))
        states = self.hidden(torch.as_tensor(np.concatenate(packed)).long(), positions).split(lengths)
        ends = [len(context) - 1 for context, _ in texts]
        return [h[end : end + len(own)] for h, end, (_, own) in zip(states, ends, texts, strict=True)]

    def logprobs(self, texts: Sequence[Text]) -> list[Float[Tensor, "_T V"]]:
        """Log-probabilities of the vocabulary at each completion token of every text."""
        return [self.logits(h).log_softmax(-1) for h in self.hidden_states(texts)]


def make_model(draw: torch.Generator, vocabulary: int, width: int = WIDTH) -> TinyModel:
    """Random model whose even ids lead to states of low entropy, odd ones to states of high entropy."""
    embedding, head = torch.randn(2, vocabulary, width, generator=draw, dtype=torch.float64)
    embedding[:, 0] = torch.where(torch.arange(vocabulary) % 2 == 0, 2.0, -2.0)
    head = 0.7 * head
    head[:2, 0] += torch.tensor([8.0, 6.0], dtype=torch.float64)
    return TinyModel(embedding=embedding, head=head)
