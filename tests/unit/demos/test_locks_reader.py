"""The reader of the locks task: what it learned is what a run shows its teacher, and what it does with that."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from demos.prompts.locks import LocksPrompts
from demos.recipes.evaluate_task import load
from demos.recipes.locks_reader import (
    DRAFT,
    SIBLING,
    after_draft,
    after_sibling,
    first_values,
    read,
    reader_batches,
    rewritten,
    right,
    shown,
)
from demos.recipes.measure_locks import found, go_on, held_out
from demos.tasks.locks import MARKS, MAX_COMPLETION_WORDS, LocksTask, grade, judge
from hf.tokenizer import HuggingFaceTokenizer
from launch.config.run_config import run_config
from launch.plan.plan import make_plan
from opd.ports import Context, Sources
from opd.rollouts.contexts import Draft, SuccessfulSibling
from opd.types import Prompt, StopReason, TokenScores, Trajectory
from tests.unit.loop.test_loop import Bench

TASK = LocksTask()
ASSETS = Path(__file__).parents[3] / "assets" / "locks"
seeds = st.integers(min_value=0, max_value=2**32)


class Verifier:
    """The task's own grader."""

    async def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [grade(*pair) for pair in zip(completions, answers, strict=True)]


@pytest.fixture(scope="module")
def tokenizer() -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(str(ASSETS / "reader"))


def context(tokenizer: HuggingFaceTokenizer) -> Context:
    return replace(Bench(None).engines, graders={"locks": Verifier()}, tokenizer=tokenizer)


def trajectory(prompt: Prompt, text: str, number: int, tokenizer: HuggingFaceTokenizer) -> Trajectory:
    ids = np.append(tokenizer.encode(text)[1:], tokenizer.eos_id).astype(np.int32)
    return Trajectory(
        prompt=prompt,
        sample=number,
        token_ids=ids,
        behavior=TokenScores(logprobs=np.zeros(len(ids), dtype=np.float32)),
        loss_mask=np.ones(len(ids), dtype=bool),
        versions=np.zeros(len(ids), dtype=np.int32),
        stop=StopReason.END,
    )


@given(number=st.integers(0, 1000), seed=seeds)
@settings(max_examples=20, deadline=None)
def test_what_methods_show_as_shipped_is_what_the_reader_learned(
    number: int, seed: int, tokenizer: HuggingFaceTokenizer
) -> None:
    """Token by token, the method's own template around any group's own texts, of which one is right."""
    source, rng = LocksPrompts(prompts_per_step=1, seed=seed), random.Random(seed)
    problem = source.problem(number)
    (prompt,) = source.between(number, 1, Sources(tokenizer=tokenizer, rows=lambda *_: ()))
    wrong, good = LocksTask(notice=0.0).pupil_solution(problem, rng), right(TASK, problem, rng)
    group = [trajectory(prompt, w.text, i, tokenizer) for i, w in enumerate((wrong, good))]
    of_sibling, _ = asyncio.run(SuccessfulSibling()(group, context(tokenizer)))
    assert of_sibling is not None
    learned = read(shown(SIBLING, problem, good.text), good)
    assert of_sibling.tolist() == list(learned.ids[: len(of_sibling)]) and not any(learned.loss_mask[: len(of_sibling)])
    of_drafts = asyncio.run(Draft(room=288, free=MAX_COMPLETION_WORDS)(group, context(tokenizer)))
    for of_draft, working in zip(of_drafts, (wrong, good), strict=True):
        assert of_draft is not None
        assert of_draft.tolist() == list(read(shown(DRAFT, problem, working.text), good).ids[: len(of_draft)])


def test_templates_have_as_many_words_as_when_the_reader_was_made() -> None:
    """Its tokenizer knows none of them, so their number is all that it reads: with another, make it again."""
    words = [[len(part.replace("{prompt}", "").split()) for part in t.split("{completion}")] for t in (SIBLING, DRAFT)]
    assert words == [[2, 5], [3, 25]]


@given(seeds)
def test_a_text_that_is_shown_as_right_is_right(seed: int) -> None:
    rng = random.Random(seed)
    problem = LocksTask().problem(rng)
    assert grade(right(TASK, problem, rng).text, problem.answer) == 1
    prompt, working = after_sibling(TASK, problem, rng)
    assert prompt.startswith(problem.prompt) and len(working.words) == len(working.loss_mask)


@given(seeds, st.floats(0, 0.9), st.floats(0, 0.9), st.floats(0, 0.9))
def test_a_rewritten_draft_is_right_and_begins_as_the_draft(
    seed: int, wrong: float, slip: float, missed: float
) -> None:
    rng = random.Random(seed)
    problem = LocksTask().problem(rng)
    draft = LocksTask().solution(problem, rng, wrong, slip, missed).words
    for words in (draft, draft[: rng.randrange(len(draft) + 1)]):
        working = rewritten(problem, words, rng)
        verdict = judge(working.text, problem.answer)
        assert verdict.failure is None and verdict.repeated == 0 and all(working.loss_mask)
        assert first_values(working.words).items() >= first_values(words).items()
        assert len(working.words) < MAX_COMPLETION_WORDS


def test_longest_contexts_and_texts_fit_into_the_model_of_the_experiment() -> None:
    rng, limit = random.Random(0), run_config(["experiment=locks_reader", "method=trd"]).student.max_model_len
    longest = " ".join(["first"] * MAX_COMPLETION_WORDS)
    for template in (SIBLING, DRAFT):
        prompt = shown(template, LocksTask().problem(rng), longest)
        assert len(prompt.split()) + 1 + MAX_COMPLETION_WORDS <= limit
    assert max(len(one.ids) for one in next(reader_batches(0, notice=0.6, whole=1.0))) <= limit
    assert all(word in MARKS for word in first_values(after_draft(TASK, TASK.problem(rng), rng)[1].words))


@pytest.mark.parametrize("method", ["sdpo", "trd"])
def test_the_experiment_can_be_planned_with_both_methods_as_they_are_shipped(method: str) -> None:
    config: Any = run_config(["experiment=locks_reader", f"method={method}"])
    make_plan(config)
    assert config.method.name == method and config.student.path == config.teacher.path


def test_the_reader_takes_the_code_from_a_right_text_and_repairs_a_draft() -> None:
    torch.manual_seed(0)
    model, tokenizer = load(ASSETS / "reader")
    problems, rng = held_out(24), random.Random(0)
    told = go_on(model, tokenizer, [shown(SIBLING, p, right(TASK, p, rng).text) for p in problems], sample=False)
    drafts = [LocksTask(notice=0.3).pupil_solution(p, rng).text for p in problems]
    before = [shown(DRAFT, p, d) for p, d in zip(problems, drafts, strict=True)]
    repaired = go_on(model, tokenizer, before, sample=False)
    after_right, after_wrong = (
        found([judge(text, p.answer, ended=ended) for (text, ended), p in zip(texts, problems, strict=True)])
        for texts in (told, repaired)
    )
    assert after_right.solved > 0.8 and after_right.at_once > 0.8
    assert after_wrong.solved > 0.8 and after_wrong.at_once < 0.5
