"""Rollouts that leave out texts and prompts: which, that they are counted, and that nothing else changes."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from launch.config.run_config import run_config
from opd.errors import ConfigurationError
from opd.method.method import Method
from opd.objectives.sampled import SampledReverseKL
from opd.ports import Need, Role, needs_of
from opd.rollouts.selected import GoodTexts, OpenPrompts
from opd.rollouts.student import StudentRollout, TeacherRollout
from opd.scorers.teacher import SampledTokens
from opd.types import NO_VERSION, Prompt, StopReason, TokenScores, Trajectory

STUDENT, TEACHER = StudentRollout(max_tokens=8), TeacherRollout(max_tokens=8)


def prompt(name: str) -> Prompt:
    return Prompt(id=name, student_ids=np.zeros(1, np.int32), teacher_ids=np.zeros(1, np.int32), answer="right")


def text(name: str, ids: Sequence[int], sample: int = 0, stop: StopReason = StopReason.END) -> Trajectory:
    n = len(ids)
    return Trajectory(
        prompt=prompt(name),
        sample=sample,
        token_ids=np.asarray(ids, np.int32),
        behavior=TokenScores(logprobs=np.zeros(n, np.float32)),
        loss_mask=np.ones(n, bool),
        versions=np.full(n, NO_VERSION, np.int32),
        stop=stop,
    )


class Written:
    """A rollout whose texts are there."""

    records, needs_engines, on_policy, truncated = TokenScores, frozenset({Need(Role.STUDENT)}), True, False

    def __init__(self, texts: Mapping[str, list[Trajectory]]) -> None:
        self.texts = texts

    async def __call__(self, group: Sequence[Prompt], context: Any) -> list[Trajectory]:
        return self.texts[group[0].id][: len(group)]


class Grader:
    """A text is worth its first token over ten."""

    async def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [int(c.split()[0]) / 10 for c in completions]


BOX: Any = SimpleNamespace(
    graders={"": Grader()}, environments={}, tokenizer=SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
)


def kept(rollout: Any, name: str = "p", count: int = 4) -> list[bool]:
    made = asyncio.run(rollout([prompt(name)] * count, BOX))
    assert all(t.loss_mask.all() or not t.loss_mask.any() for t in made)
    return [bool(t.loss_mask.any()) for t in made]


TEXTS = [
    text("p", [10, 1, 2]),
    text("p", [4, 1, 2], 1),
    text("p", [10, 1, 2], 2, StopReason.LENGTH),
    text("p", [10, *[5] * 400], 3),
]


def filtered(**fields: Any) -> GoodTexts:
    return GoodTexts(of=Written({"p": TEXTS}), **fields)  # type: ignore[arg-type]


def test_a_text_is_left_out_that_is_cut_repetitive_or_wrong() -> None:
    assert kept(filtered()) == [True, True, False, True]
    assert kept(filtered(cut=True)) == [True] * 4
    assert kept(filtered(cut=True, repetition=10.0)) == [True, True, True, False]
    assert kept(filtered(at_least=0.5)) == [True, False, False, True]
    assert kept(filtered(at_least=0.4)) == [True, True, False, True]
    assert kept(filtered(at_least=0.5, cut=True)) == [True, False, False, True], "what is cut has the grade 0"


def test_every_text_stands_in_the_step_with_its_grade() -> None:
    made = asyncio.run(filtered(at_least=0.5)([prompt("p")] * 4, BOX))
    assert [t.reward for t in made] == [1.0, 0.4, 0.0, 1.0]
    assert all(np.array_equal(a.token_ids, b.token_ids) for a, b in zip(made, TEXTS, strict=True))
    assert [t.reward for t in asyncio.run(filtered()([prompt("p")] * 4, BOX))] == [None] * 4, "no grader is asked"


def test_a_grader_is_needed_only_where_grades_count() -> None:
    assert needs_of(GoodTexts(of=TEACHER)) == {Need(Role.WRITER)}
    assert needs_of(GoodTexts(of=TEACHER, at_least=1.0)) == {Need(Role.WRITER), Need(Role.GRADER)}
    assert needs_of(OpenPrompts(of=STUDENT)) == {Need(Role.STUDENT), Need(Role.GRADER)}
    assert needs_of(OpenPrompts(of=STUDENT, teacher=TEACHER)) == {Need(role) for role in
        (Role.STUDENT, Role.WRITER, Role.GRADER)}  # fmt: skip


def test_a_prompt_is_open_while_few_of_its_texts_are_right() -> None:
    """Of four texts two are right; the one that is cut is not."""
    half = Written({"p": [replace(t, stop=StopReason.END) for t in TEXTS[:2]] + TEXTS[2:]})
    for most, open_ in ((0.0, False), (0.49, False), (0.5, True), (1.0, True)):
        assert kept(OpenPrompts(of=half, solved_at_most=most)) == [open_] * 4  # type: ignore[arg-type]


def test_a_prompt_that_the_teacher_does_not_solve_is_left_out() -> None:
    own = Written({name: [text(name, [3])] * 2 for name in ("a", "b")})
    its = Written({"a": [text("a", [10])], "b": [text("b", [9])]})
    rollout = OpenPrompts(of=own, teacher=its)  # type: ignore[arg-type]
    assert kept(rollout, "a", 2) == [True, True] and kept(rollout, "b", 2) == [False, False]


@pytest.mark.parametrize("rollout", [GoodTexts(of=STUDENT, cut=True), OpenPrompts(of=STUDENT, solved_at_most=1.0)])
def test_no_estimate_from_samples_goes_with_a_choice_by_whole_texts(rollout: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"rollout {type(rollout).__name__}"):
        Method(name="m", rollout=rollout, scorer=SampledTokens(), objective=SampledReverseKL())
    assert rollout.everything.limits[0].equals == STUDENT and not rollout.truncated


def test_the_cold_start_has_the_published_settings_and_no_grade() -> None:
    rollout: Any = run_config(["experiment=shop", "method=cold_start"]).method.rollout
    assert (rollout.of.temperature, rollout.of.top_p, rollout.at_least, rollout.cut) == (0.7, 0.95, 0.0, False)
