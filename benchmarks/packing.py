"""Packing (P5): fill and balance of micro-batches, and equality of the loss with that of padded batches.

    python benchmarks/packing.py

Lengths are drawn as completions come: log-normal with a long tail, cut at a limit, after prompts of 20 to 120 tokens.
No token is padding. `fill` is packed tokens over the budgets of all micro-batches; `possible` the fill of the fewest
micro-batches that hold the tokens at all, when every rank must have as many as the others; `even` the mean over the
greatest load of a micro-batch (ranks wait for the slowest); `squares` the greatest sum of squared lengths over the mean
(attention's share, which is not balanced). `first fit` is the textbook heuristic in the order of arrival, which need
not give ranks equal counts, `padded` the fill of batches padded to their longest sequence, in that order.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import ceil

import numpy as np
import torch
from torch import Tensor

from opd.loss.chunked import chunked_loss
from opd.loss.metrics import diagnosed
from opd.loss.packing import TokenMean, pack
from opd.objectives.sampled import SampledReverseKL
from opd.ports import Layout
from opd.types import Batch, Prompt, Scored, StopReason, TokenScores, Trajectory

LOSS_TARGET = 1e-6
VOCABULARY, WIDTH = 64, 16


def step(trajectories: int, median: float, most: int, seed: int) -> list[Scored[TokenScores]]:
    """Trajectories of a step, with random scores."""
    draw = np.random.default_rng(seed)
    lengths = np.clip(np.exp(draw.normal(np.log(median), 0.8, trajectories)).astype(int), 1, most)
    made = []
    for i, length in enumerate(lengths):
        context = draw.integers(0, VOCABULARY, draw.integers(20, 120)).astype(np.int32)
        teacher, behavior = (-draw.random(length, dtype=np.float32) - 1 for _ in range(2))
        trajectory = Trajectory(
            prompt=Prompt(id=str(i), student_ids=context, teacher_ids=context), sample=0,
            token_ids=draw.integers(0, VOCABULARY, length).astype(np.int32), behavior=TokenScores(logprobs=behavior),
            loss_mask=np.ones(length, dtype=bool), versions=np.zeros(length, dtype=np.int32),
            stop=StopReason.END,
        )  # fmt: skip
        made.append(Scored(trajectory=trajectory, scores=TokenScores(logprobs=teacher)))
    return made


def inputs(item: Scored[TokenScores]) -> int:
    return len(item.trajectory.prompt.student_ids) + len(item.trajectory) - 1


def padded_fill(lengths: Sequence[int], budget: int) -> float:
    """Fill of sequences in the order of arrival, padded to the longest of their batch, as many as the budget holds."""
    batches: list[list[int]] = [[]]
    for length in lengths:
        if max([*batches[-1], length]) * (len(batches[-1]) + 1) > budget:
            batches.append([])
        batches[-1].append(length)
    return sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


def first_fit_fill(lengths: Sequence[int], budget: int) -> float:
    bins: list[int] = []
    for length in lengths:
        place = next((i for i, load in enumerate(bins) if load + length <= budget), None)
        if place is None:
            bins.append(length)
        else:
            bins[place] += length
    return sum(lengths) / (len(bins) * budget)


class Model:
    """One layer of causal attention in float64, on padded or packed sequences: the mask is all that differs."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(1)
        shapes = ((VOCABULARY, WIDTH), (3, WIDTH, WIDTH), (VOCABULARY, WIDTH))
        self.embed, self.qkv, self.head = (
            (torch.randn(shape, generator=draw).double() / 4).requires_grad_() for shape in shapes
        )

    def hidden(self, ids: Tensor, allowed: Tensor) -> Tensor:
        x = self.embed[ids]
        q, k, v = (x @ w for w in self.qkv)
        return (x + (q @ k.transpose(-1, -2)).masked_fill(~allowed, -torch.inf).softmax(-1) @ v).tanh()

    def packed(self, batch: Batch[TokenScores]) -> Tensor:
        owner = torch.repeat_interleave(torch.arange(len(batch.cu_seqlens) - 1), batch.cu_seqlens.diff())
        causal = torch.ones(len(owner), len(owner)).tril().bool()
        return self.hidden(batch.input_ids, (owner[:, None] == owner) & causal)[batch.predict_at]

    def padded(self, batch: Batch[TokenScores]) -> Tensor:
        """The same sequences as rows, padded with token 0 on the right to the longest."""
        spans = list(pairwise(batch.cu_seqlens.tolist()))
        rows = [batch.input_ids[start:stop] for start, stop in spans]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        hidden = self.hidden(ids, torch.ones(ids.shape[1], ids.shape[1]).tril().bool())
        flat = torch.cat([hidden[i, : stop - start] for i, (start, stop) in enumerate(spans)])
        return flat[batch.predict_at]

    def loss(self, batches: Sequence[Batch[TokenScores]], packed: bool) -> float:
        total = 0.0
        for batch in batches:
            b = batch.to("cpu", lambda handle: handle)
            hidden = self.packed(b) if packed else self.padded(b)
            part, _ = chunked_loss(
                hidden, self.head, b.weights, lambda s, i, j, b=b: diagnosed(SampledReverseKL(), s, b.rows(i, j)), 512
            )
            total += part.item() / b.denominator
        return total


def packed_batches(made: list[Scored[TokenScores]], layout: Layout) -> list[Batch[TokenScores]]:
    weights = [np.ones(len(item.trajectory)) for item in made]
    return [batch for rank in pack(made, weights, layout, TokenMean()) for batch in rank]


def main() -> None:
    torch.set_num_threads(1)
    print(
        "trajectories  longest  budget  ranks   fill  possible  of it (target 0.97)  even   squares  first fit  padded"
    )
    for trajectories, median, most, budget, ranks in (
        (64, 50, 77, 4096, 1), (256, 300, 2048, 8192, 1), (256, 300, 2048, 8192, 4), (256, 1500, 8192, 16_384, 8),
        (1024, 1500, 8192, 16_384, 8), (512, 4000, 16_384, 32_768, 8),
    ):  # fmt: skip
        made = step(trajectories, median, most, seed=0)
        batches, lengths = packed_batches(made, Layout(ranks=ranks, tokens_per_microbatch=budget)), [*map(inputs, made)]
        loads = [len(batch.input_ids) for batch in batches]
        squares = [float((np.diff(batch.cu_seqlens).astype(float) ** 2).sum()) for batch in batches]
        fill = sum(lengths) / (len(batches) * budget)
        possible = sum(lengths) / (ceil(sum(lengths) / budget / ranks) * ranks * budget)
        print(
            f"{trajectories:12}  {max(lengths):7}  {budget:6}  {ranks:5}   {fill:.3f}  {possible:8.3f}  "
            f"{fill / possible:18.3f}  {np.mean(loads) / max(loads):.3f}  {max(squares) / np.mean(squares):7.2f}  "
            f"{first_fit_fill(lengths, budget):9.3f}  {padded_fill(lengths, budget):6.3f}"
        )
    made, model = step(24, 30, 120, seed=1), Model()
    batches = packed_batches(made, Layout(ranks=2, tokens_per_microbatch=700))
    packed, padded = (model.loss(batches, packed) for packed in (True, False))
    print(
        f"loss packed {packed:.12f}, padded {padded:.12f}: off by {abs(packed - padded):.1e} (target {LOSS_TARGET:g})"
    )


if __name__ == "__main__":
    main()
