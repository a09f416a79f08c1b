"""Metrics of each teacher, where a step's prompts ask several."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from opd.types import Batch, Scores, TokenLoss

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
"""The metrics of an objective that are also told per teacher."""

_PREFIX, _SHARE = "teacher/", "share"


def by_teacher(result: TokenLoss, batch: Batch[Scores]) -> TokenLoss:
    """`result` with each divergence also per teacher; unchanged where all tokens have the same one.

    Metrics are means over *all* trained tokens of a step, whoever reads them, so a teacher's is given as two: the
    indicator of its tokens (`teacher/NAME/share`) and the divergence times the indicator. `teacher_means` divides.
    """
    if len(batch.routes) == 1:
        return result
    route = torch.as_tensor(batch.route, device=result.loss.device)
    split: dict[str, Tensor] = {}
    for number, name in enumerate(batch.routes):
        mine = route == number
        split[f"{_PREFIX}{name}/{_SHARE}"] = mine.to(result.loss.dtype)
        for metric in DIVERGENCES:
            if metric in result.metrics:
                split[f"{_PREFIX}{name}/{metric}"] = torch.where(mine, result.metrics[metric], 0.0)
    return replace(result, metrics={**result.metrics, **split})


def teacher_means(metrics: Mapping[str, float]) -> dict[str, float]:
    """A step's metrics, with those of a teacher as means over its own tokens under `NAME/metric`.

    `NAME/share` is its share of the trained tokens; a teacher without any has no other metric.
    Example: `{"teacher/b/share": 0.25, "teacher/b/reverse_kl": 0.1}` gives `{"b/share": 0.25, "b/reverse_kl": 0.4}`.
    """
    means: dict[str, float] = {}
    for key, value in metrics.items():
        if not key.startswith(_PREFIX):
            means[key] = value
            continue
        name, metric = key.removeprefix(_PREFIX).split("/")
        share = metrics[f"{_PREFIX}{name}/{_SHARE}"]
        if metric == _SHARE:
            means[f"{name}/{metric}"] = value
        elif share > 0:
            means[f"{name}/{metric}"] = value / share
    return means
