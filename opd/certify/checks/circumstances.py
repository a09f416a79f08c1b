"""Checks that scores, weights, losses and divisors are the same where nothing differs that they may depend on."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from opd.certify.awaited import awaited
from opd.certify.certificate import Finding, Row
from opd.certify.checks.scorers import numbers_of
from opd.certify.checks.weighing import first_tokens
from opd.certify.engines import RequestLog, engines
from opd.certify.gradients import (
    SAME,
    Case,
    enumerable,
    every_token,
    logit_gradients,
    logits,
    relative_difference,
)
from opd.method.method import readings_of, weigh
from opd.ports import Context, Need, Role, needs_of
from opd.types import Scores, TokenScores, Trajectory

ALIKE = "scores, weights and losses are the same in other circumstances"
SAMPLED_STEPS = (0, 33, 99)  # of a hundred: what is the same at these has no reason to differ between them
STEPS_BETWEEN = (1, 2, 3, 5, 7, 9, 10, 16, 20, 25, 39, 49, 50, 75, 90, 98)
# Of a causal teacher: nothing that comes later is known there.
CAUSAL = ("logprobs", "topk_ids", "topk_logprobs", "hidden", "plain", "base", "topk_base")
_RANK = {"RANK": "5", "LOCAL_RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "SLURM_PROCID": "5"}
_DAY = 86_400  # seconds


def check_circumstances(case: Case) -> Iterator[Finding]:
    """Steps between others, ranks, clocks, versions of the writer, later tokens, and what was scored before."""
    texts = [item.trajectory for item in case.enumeration.scored[:: max(1, len(case.enumeration.scored) // 6)]]
    differences: dict[str, Callable[[], float]] = {
        "the step, at some steps alone": lambda: _between_steps(case, texts),
        "the rank, the environment or the clock of the process": lambda: _in_another_process(case, texts),
        "who wrote the text (`versions`, `digests`), or what an environment gave": lambda: _by_others(case, texts),
        "later tokens, or the length of the text": lambda: _shortened(case, texts),
        "where the same text stood before: it is kept by its tokens alone": lambda: _behind_another_prompt(case, texts),
    }
    measured = {what: difference() for what, difference in differences.items()}
    worst = max(measured, key=lambda what: measured[what])
    off = measured[worst]
    yield Row(name=ALIKE, measured=off, tolerance=SAME, note=f"it depends on {worst}" if off > SAME else "")


def _scored(case: Case, texts: Sequence[Trajectory], context: Context | None = None) -> list[Scores]:
    """Scores of each prompt's texts, as one group."""
    context = context or engines(case.world, RequestLog())
    found: dict[int, Scores] = {}
    for name in dict.fromkeys(t.prompt.id for t in texts):
        members = [i for i, t in enumerate(texts) if t.prompt.id == name]
        scores = awaited(_of_group(case, [texts[i] for i in members], context))
        found |= dict(zip(members, scores, strict=True))
    return [found[i] for i in range(len(texts))]


async def _of_group(case: Case, texts: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
    return await case.method.scorer(texts, context)


def _numbers(scores: Sequence[Scores]) -> list[Tensor]:
    return numbers_of(type(scores[0]).concat(scores).to("cpu", lambda rows: rows))


def _apart(first: Sequence[Tensor], then: Sequence[Tensor]) -> float:
    return max((relative_difference(a, b) for a, b in zip(first, then, strict=True)), default=0.0)


def _weighed(case: Case, context: Context) -> list[Tensor]:
    """Weights of few texts; nothing of those that read the student."""
    parts = case.method.weights
    if readings_of(*parts.values()):
        return []
    return [torch.from_numpy(np.concatenate(weigh(parts, case.enumeration.scored[::9], context)))]


def _between_steps(case: Case, texts: Sequence[Trajectory]) -> float:
    """Greatest difference at a step from the first, if there is none between three that lie far apart."""
    context, text = engines(case.world, RequestLog()), [texts[0]] * getattr(case.method.scorer, "min_group", 1)
    seldom = _asks_beyond_the_text(case.method.scorer)

    async def every() -> list[list[Tensor]]:
        there = [context.at(step) for step in (*SAMPLED_STEPS, *STEPS_BETWEEN)]
        given = [] if seldom else [_numbers(list(await case.method.scorer(text, at))) for at in there]
        return [[*scores, *_weighed(case, at)] for scores, at in zip(given or [[]] * len(there), there, strict=True)]

    first, *others = awaited(every())
    off = [_apart(first, other) for other in others]
    known = len(SAMPLED_STEPS) - 1
    return 0.0 if max(off[:known]) > SAME else max(off[known:])  # else it follows the step, as a schedule does


def _asks_beyond_the_text(scorer: Any) -> bool:
    """Whether a scorer asks about texts that are not there, which takes its time."""
    return getattr(scorer, "looks_ahead", False) or Role.WRITER in {need.role for need in needs_of(scorer)}


def _in_another_process(case: Case, texts: Sequence[Trajectory]) -> float:
    """Difference in a process that has another rank, a day later."""

    def measure() -> list[Tensor]:
        batch = every_token(case.enumeration).rows(0, 5)
        at = logits(case.enumeration, batch)[:5]
        divisor = case.method.normalizer(case.weights())
        return [
            *_numbers(_scored(case, texts)),
            *_weighed(case, case.enumeration.context),
            logit_gradients(enumerable(case.method.objective), at, batch),
            torch.tensor([divisor], dtype=torch.float64),
        ]

    here = measure()
    with _elsewhere():
        there = measure()
    return _apart(here, there)


@contextmanager
def _elsewhere() -> Iterator[None]:
    """Rank 5 of 8, in a process that a launcher started a day from now."""
    moved = (("time", _DAY), ("time_ns", _DAY * 10**9))
    clocks: dict[str, Any] = {name: _later(getattr(time, name), by) for name, by in moved}
    ranks = (("is_initialized", True), ("get_rank", 5), ("get_world_size", 8))
    group: dict[str, Any] = {name: _constant(value) for name, value in ranks}
    with patch.dict(os.environ, _RANK), patch.multiple(time, **clocks):
        if not torch.distributed.is_available():
            yield
            return
        with patch.multiple(torch.distributed, **group):
            yield


def _later(clock: Callable[[], Any], by: int) -> Callable[[], Any]:
    return lambda: clock() + by


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def _by_others(case: Case, texts: Sequence[Trajectory]) -> float:
    """Difference that other versions make, and a reward without a grader: a score is of ids and contexts."""
    reward = None if Need(Role.GRADER) in needs_of(case.method.scorer) else 1.0
    first = _numbers(_scored(case, texts))
    others = [
        [replace(t, versions=versions(t), digests={}, reward=reward) for t in texts]
        for versions in (
            lambda t: np.zeros(len(t), dtype=np.int32),
            lambda t: np.arange(len(t), dtype=np.int32),  # published while it was written
        )
    ]
    return max(_apart(first, _numbers(_scored(case, other))) for other in others)


def _shortened(case: Case, texts: Sequence[Trajectory]) -> float:
    """Difference that it makes to scores of a text's first tokens if the others are not there."""
    whole = _scored(case, texts)
    off = 0.0
    for count in range(1, case.world.length):
        cut = [first_tokens(t, count) for t in texts]
        off = max(off, _apart(*(_causal(scores, count) for scores in (whole, _scored(case, cut)))))
    return off


def _causal(scores: Sequence[Scores], count: int) -> list[Tensor]:
    """Numbers about the first `count` tokens that a causal model gives by itself."""
    rows = np.arange(count)
    cut = [s.take(rows) for s in scores if isinstance(s, TokenScores)]
    if not cut:
        return []
    there = type(cut[0]).concat(cut).to("cpu", lambda rows: rows)
    return [n for name in CAUSAL if hasattr(there, name) for n in numbers_of(getattr(there, name))]


def _behind_another_prompt(case: Case, texts: Sequence[Trajectory]) -> float:
    """Difference between scores of new texts that stood behind another prompt before, and of slightly longer ones."""
    prompts = {t.prompt.id: t.prompt for t in texts}
    if len(prompts) < 2:
        return 0.0
    first, second, *_ = prompts.values()
    context, off = engines(case.world, RequestLog()), 0.0
    # A causal model knows nothing of the token that the longer text has more, and no part has seen that one.
    longer = [replace(t, token_ids=(t.token_ids + 5) % case.world.vocabulary) for t in texts if len(t) > 1]
    short = [first_tokens(t, len(t) - 1) for t in longer]
    for prompt in (first, second):
        found = _scored(case, [replace(t, prompt=prompt) for t in short], context)
    right = _scored(case, [replace(t, prompt=second) for t in longer], context)
    for a, b, text in zip(found, right, short, strict=True):
        off = max(off, _apart(_causal([a], len(text)), _causal([b], len(text))))
    return off
