"""Metrics of each teacher, where a step's prompts name several."""

from dataclasses import replace

import torch
from torch import Tensor

from opd.types import Batch, Scores, TokenLoss

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
"""Metrics of an objective that are also reported per teacher."""


def by_teacher(result: TokenLoss, batch: Batch[Scores]) -> TokenLoss:
    """`result` with each divergence also per teacher, as `NAME/metric`; unchanged where all tokens have the same one.

    A teacher's metric is not defined (NaN) at the tokens of the others; `NAME/share` is its share of the tokens.
    """
    if len(batch.routes) == 1:
        return result
    route = torch.as_tensor(batch.route, device=result.loss.device)
    split: dict[str, Tensor] = {}
    for number, name in enumerate(batch.routes):
        mine = route == number
        split[f"{name}/share"] = mine.to(result.loss.dtype)
        for metric in DIVERGENCES:
            if metric in result.metrics:
                split[f"{name}/{metric}"] = torch.where(mine, result.metrics[metric], torch.nan)
    return replace(result, metrics={**result.metrics, **split})
