"""What a teacher is shown of a group's own texts (SDPO, TRD), and that nothing else changes by it."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launch.config.run_config import run_config
from opd.certify.certify import certify
from opd.certify.shown import INDEPENDENT
from opd.errors import ConfigurationError
from opd.method.method import Method, check_prompts
from opd.method.templates import shortened
from opd.objectives.topk import TopKDivergence
from opd.objectives.vocabulary import FullForwardKL, JensenShannon
from opd.ports import Context, Need
from opd.rollouts.contexts import Draft, PromptAlone, SuccessfulSibling
from opd.rollouts.privileged import PrivilegedRollout
from opd.rollouts.refined import RefinedRollout, Refiner
from opd.rollouts.student import StudentRollout
from opd.scorers.teacher import StudentTopK, TeacherHidden
from opd.types import NO_VERSION, Prompt, StopReason, TokenScores, Trajectory
from opd.types.prompt_rows import PromptText
from tests.unit.loop.test_loop import Bench, Prompts
from tests.unit.loop.test_prompts import Letters

RECORDED: Any = StudentRollout(max_tokens=8, record_topk=3)
COMPARED: dict[str, Any] = {"scorer": StudentTopK(), "objective": TopKDivergence(of=JensenShannon())}


class Paid:
    """Grader that pays for every text the number it consists of."""

    async def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [float(text.rpartition("</think>")[2]) for text in completions]


def context() -> Context:
    return replace(Bench(None).engines, graders={"t": Paid()}, tokenizer=Letters())


def text(said: str, number: int = 0, observed: str = "") -> Trajectory:
    ids = np.asarray([*map(ord, said + observed)], dtype=np.int32)
    mask = np.arange(len(ids)) < len(said)
    prompt = Prompt(
        id="p",
        student_ids=np.asarray([5], dtype=np.int32),
        teacher_ids=np.asarray([6], dtype=np.int32),
        task="t",
        answer="A",
        source=PromptText(text="ask"),
    )
    return Trajectory(
        prompt=prompt,
        sample=number,
        token_ids=ids,
        behavior=TokenScores(logprobs=np.zeros(len(ids), dtype=np.float32)),
        loss_mask=mask,
        versions=np.zeros(len(ids), dtype=np.int32),
        stop=StopReason.END,
        reward=float(said.rpartition("</think>")[2]) if observed else None,
    )


def shown(texts: Sequence[Trajectory], **fields: Any) -> list[str | None]:
    builder = SuccessfulSibling(solution="{prompt}+{completion}", feedback="{prompt}-{feedback}", **fields)
    return [None if ids is None else Letters().decode(ids) for ids in asyncio.run(builder(texts, context()))]


@given(st.lists(st.sampled_from(["0", "0.25", "0.5", "0.75", "1"]), min_size=2, max_size=8))
def test_everyone_is_shown_the_first_success_that_is_another(rewards: list[str]) -> None:
    found = shown([text(reward, i) for i, reward in enumerate(rewards)])
    for i, one in enumerate(found):
        others = [reward for j, reward in enumerate(rewards) if j != i and float(reward) >= 0.5]
        assert one == (f"ask+{others[0]}" if others else None)


def test_what_was_thought_is_not_shown() -> None:
    assert shown([text("0"), text("or 1?</think>0.9")]) == ["ask+0.9", None]


def test_an_environments_words_are_shown_where_no_sibling_succeeded() -> None:
    failed, other = text("0", observed="too low"), text("0", 1, observed="too high")
    assert shown([failed, other]) == ["ask-too low", "ask-too high"]
    assert shown([failed, text("1", 1, observed="ok")]) == ["ask+1", "ask-ok"]


@given(st.text("abc", max_size=40), st.integers(5, 40))
def test_a_long_solution_loses_its_end_and_no_more_than_it_must(said: str, longest: int) -> None:
    ids = shortened("{prompt}+{completion}", text("0").prompt, {"completion": said}, "completion", longest, context())
    written = Letters().decode(ids)
    room = longest - (len(ids) - len(written)) - len("ask+")
    assert len(ids) <= longest and written == f"ask+{said[:room]}"


def test_a_template_without_room_for_a_solution_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"at most 3 are allowed; raise method\.rollout\.shown\.longest"):
        shortened("{prompt}+{completion}", text("0").prompt, {"completion": "b"}, "completion", 3, context())


# In the loop.


@dataclass(frozen=True, slots=True, kw_only=True)
class Shows:
    """Builder that shows every second trajectory the token 2 after the prompt, and the others nothing."""

    needs_engines: ClassVar[frozenset[Need]] = frozenset()
    min_group: ClassVar[int] = 1
    every: int = 2

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> "list[np.ndarray | None]":
        def ids(t: Trajectory) -> np.ndarray:
            return np.append(t.prompt.student_ids, 2).astype(np.int32)

        return [None if t.sample % self.every else ids(t) for t in trajectories]


def trained(make: Any, rollout: Any, steps: int = 2) -> tuple[torch.Tensor, Bench]:
    bench = Bench(make)
    asyncio.run(bench.run(Method(name="m", rollout=rollout, **COMPARED), steps))
    return bench.learner.table, bench


def test_with_nothing_added_it_is_plain_distillation_bit_for_bit(make: Any) -> None:
    plain, _ = trained(make, RECORDED)
    assert torch.equal(trained(make, PrivilegedRollout(student=RECORDED, shown=cast(Any, PromptAlone())))[0], plain)
    assert not torch.equal(
        trained(make, PrivilegedRollout(student=RECORDED, shown=cast(Any, Shows(every=1))))[0], plain
    )


def test_the_student_keeps_its_prompt_and_what_is_shown_nothing_is_not_trained(make: Any) -> None:
    _, bench = trained(make, PrivilegedRollout(student=RECORDED, shown=cast(Any, Shows())))
    for record in bench.records:
        for item, weight in zip(record.scored, record.weights, strict=True):
            prompt, privileged = item.trajectory.prompt, not item.trajectory.sample % 2
            assert 2 not in prompt.student_ids[1:] and len(prompt.student_ids) == 1
            assert len(prompt.teacher_ids) == 1 + privileged
            assert weight.all() if privileged else not weight.any()
    assert bench.ledger.summary()["dropped"] == bench.ledger.summary()["trained"]


def test_without_a_success_nothing_changes(make: Any) -> None:
    bench = Bench(make)
    before = bench.learner.table.clone()
    rollout = PrivilegedRollout(student=RECORDED, shown=cast(Any, SuccessfulSibling(threshold=1.0)))
    asyncio.run(bench.run(Method(name="m", rollout=rollout, **COMPARED), 2))
    assert torch.equal(bench.learner.table, before)
    assert [record.report.loss for record in bench.records] == [0.0, 0.0]


def test_a_group_of_one_has_no_sibling(make: Any) -> None:
    method = Method(
        name="m", rollout=PrivilegedRollout(student=RECORDED, shown=cast(Any, SuccessfulSibling())), **COMPARED
    )
    with pytest.raises(ConfigurationError, match="rollout PrivilegedRollout compares the trajectories of a group"):
        check_prompts(method, Prompts(make, group_size=1))


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowsItself:
    """The planted defect: what a text is shown is made of the text itself."""

    needs_engines: ClassVar[frozenset[Need]] = frozenset()
    min_group: ClassVar[int] = 2

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> "list[np.ndarray | None]":
        return [np.append(t.prompt.student_ids, t.token_ids).astype(np.int32) for t in trajectories]


def test_a_certificate_refuses_what_shows_a_text_to_its_own_teacher() -> None:
    method = run_config(["experiment=shop", "method=sdpo", "prompts.group_size=8"]).method
    rollout: Any = method.rollout
    assert certify(method).passed
    assert INDEPENDENT in certify(replace(method, rollout=replace(rollout, shown=ShowsItself()))).failures


def test_the_published_settings_are_those_of_the_code() -> None:
    method: Any = run_config(["experiment=shop", "method=sdpo", "prompts.group_size=8"]).method
    assert (method.rollout.shown.threshold, method.rollout.shown.longest) == (0.5, 10240)
    assert method.objective.max_ratio == 2 and method.objective.of == TopKDivergence(of=JensenShannon(beta=0.5))


# Rewritten text (TRD).

EXACT: dict[str, Any] = {"scorer": TeacherHidden(), "objective": FullForwardKL()}
WHOLE: Any = StudentRollout(max_tokens=8)


def exactly(make: Any, rollout: Any, steps: int = 3) -> tuple[torch.Tensor, Bench]:
    bench = Bench(make)
    asyncio.run(bench.run(Method(name="m", rollout=rollout, **EXACT), steps))
    return bench.learner.table, bench


def test_a_text_that_is_not_rewritten_is_plain_forward_kl_bit_for_bit(make: Any) -> None:
    alone = RefinedRollout(student=WHOLE, shown=cast(Any, PromptAlone()), max_tokens=8, refiner=Refiner.STUDENT)
    assert torch.equal(exactly(make, alone)[0], exactly(make, WHOLE)[0])
    assert not torch.equal(exactly(make, replace(alone, refiner=Refiner.TEACHER))[0], exactly(make, WHOLE)[0])


def test_the_teacher_scores_the_rewritten_text_behind_the_draft_and_the_student_learns_it_without(make: Any) -> None:
    _, bench = exactly(make, RefinedRollout(student=WHOLE, shown=cast(Any, Shows()), max_tokens=5))
    for record in bench.records:
        for item, weight in zip(record.scored, record.weights, strict=True):
            t, rewritten = item.trajectory, not item.trajectory.sample % 2
            assert len(t) == len(item.scores.logprobs) == (5 if rewritten else 8)
            assert len(t.prompt.student_ids) == 1 and len(t.prompt.teacher_ids) == 1 + rewritten
            assert weight.all() if rewritten else not weight.any()
            assert set(t.versions.tolist()) == ({NO_VERSION} if rewritten else {record.step - 1})


@given(st.text("abc", min_size=1, max_size=40), st.integers(12, 60))
def test_a_long_draft_is_cut_at_its_end_and_the_rest_stands(said: str, room: int) -> None:
    draft = Draft(room=room, free=3, template="{prompt}[{completion}]{answer}")
    (ids,) = asyncio.run(draft([text(said)], context()))
    assert ids is not None and len(ids) <= room - 3
    before, _, rest = Letters().decode(ids).partition("[")
    shown_draft, _, after = rest.partition("]")
    assert (before, after) == ("ask", "A") and said.startswith(shown_draft)
    assert shown_draft == said or len(ids) == room - 3


def test_a_prompt_that_leaves_a_draft_no_room_is_shown_nothing() -> None:
    assert asyncio.run(Draft(room=6, free=3)([text("abc")], context())) == [None]
