"""Check of a method's own texts, where others than the student write them."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from opd.doctor.findings import Finding, fine, warned
from opd.method.method import Method
from opd.method.rewards import task_rewards
from opd.ports import Context, Sampling
from opd.rollouts.student import generate
from opd.types import Prompt, StopReason, Trajectory

CHECK = "texts of the method"
_ERRORS = 2.0  # standard errors by which the student's own texts must be better to be said


@dataclass(frozen=True, slots=True, kw_only=True)
class _Solved:
    """Share of texts that were solved, with its standard error."""

    share: float
    error: float

    @classmethod
    async def of(cls, texts: Sequence[Trajectory], context: Context) -> "_Solved":
        rewards = np.asarray(await task_rewards(texts, context), dtype=np.float64)
        # One more of each outcome: a share of 0 or 1 of few texts is not without error.
        mean = (rewards.sum() + 1) / (len(rewards) + 2)
        return cls(share=float(rewards.mean()), error=float((mean * (1 - mean) / len(rewards)) ** 0.5))


async def method_texts(context: Context, method: Method, prompts: Sequence[Prompt], max_tokens: int) -> list[Finding]:
    """Finding about the texts that a method trains on, where its rollout is not the student's own; none otherwise.

    A teacher may score well and still write badly what a method asks it for, such as a text rewritten behind a draft
    (`opd.rollouts.refined`). The task's grader judges what the method collects for `prompts`, whole groups of them, and
    what the student writes. Texts that were cut before `max_tokens` were meant to be, and are not judged.
    """
    if not _others_write(method.rollout):
        return []
    groups = [list(group) for _, group in groupby(prompts, key=lambda prompt: prompt.id)]
    collected = await asyncio.gather(*(method.rollout(group, context) for group in groups))
    texts = _judged([text for group in collected for text in group], context, max_tokens)
    if not texts:
        return [fine(CHECK, "not measured: none of the texts can be graded")]
    asked = [replace(text.prompt, id=f"{text.prompt.id}/own") for text in texts]
    written = await generate(asked, context.student, Sampling(max_tokens=max_tokens))
    theirs, own = await _Solved.of(texts, context), await _Solved.of(written, context)
    what = type(method.rollout).__name__
    measured = f"of {len(texts)} texts {what} brings {theirs.share:.1%} solved ones, the student {own.share:.1%}"
    if own.share - theirs.share <= _ERRORS * (theirs.error**2 + own.error**2) ** 0.5:
        return [fine(CHECK, measured)]
    return [
        warned(
            CHECK,
            measured,
            f"the method trains on texts that are worse than the student's own, as {what} has them written; look at "
            "samples.jsonl after a step, and choose a teacher (or data) that can do what the method asks for, or other "
            "words for it",
        )
    ]


def _others_write(rollout: Any) -> bool:
    """Whether the student does not simply write from its own context; what a selection leaves out is not looked at."""
    chosen_from = getattr(rollout, "of", None)
    own = getattr(rollout, "on_policy", False) or (chosen_from is not None and not _others_write(chosen_from))
    return not own


def _judged(texts: Sequence[Trajectory], context: Context, max_tokens: int) -> list[Trajectory]:
    """Those that are trained, that a grader can judge, and that were not cut on purpose."""
    return [
        text
        for text in texts
        if text.prompt.answer
        and text.prompt.task in context.graders
        and text.loss_mask.any()
        and (text.stop is StopReason.END or len(text) >= max_tokens)
    ]
