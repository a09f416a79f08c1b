"""A plan refuses a method that would train nothing, and remarks on one that trains something else than it seems to."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf.tokenizer import HuggingFaceTokenizer
from launch.config.run_config import RunConfig, run_config
from launch.plan.checks.methods.factors import at_step, check_factors
from launch.plan.checks.methods.meaning import check_meaning
from launch.plan.checks.survey import Survey, survey_all
from opd.errors import ConfigurationError
from opd.method.schedules import LinearSchedule, SwitchSchedule, value
from opd.objectives.truncated import TruncatedRatio
from opd.ports import Sources
from tests.method_needs import NEEDS

SHOP, SELF = "experiment=shop", "experiment=locks_self"
OWN, SECOND = "teacher.path=${student.path}", "teachers.other.path=${teacher.path}"
START, GROUPS = "teachers.start.path=${student.path}", "prompts.group_size=8"
JUDGE = [GROUPS, "teachers.judge.path=${teacher.path}", "method.terms.verdict.scorer.yes=1"]
JUDGE += ["method.terms.verdict.scorer.no=0"]
REMARKED = [  # overrides, and what the plan must say of them
    ("grpo", [GROUPS, "method.rollout.temperature=0.5"], "its clip acts on fresh text"),
    ("thinking_machines", ["method.rollout.temperature=0.7"], "the student at that temperature"),
    ("top_d_returns", [GROUPS, "method.rollout.temperature=0.7"], "than for that policy"),
    ("top_d_returns", [], "each text is a group of its own"),
    ("context_distillation", ["method.rollout.temperature=0", GROUPS], "the 8 texts of a prompt are all the same"),
    ("opsd", ["method.rollout.temperature=1"], "published is one temperature for both"),
    ("kdrl", [GROUPS, "method.coefficient=0"], "is scored all the same and trains nothing"),
    ("kdrl", [GROUPS, "method.terms.teacher.coefficient=-0.1"], "trained away from its own objective"),
    ("kdrl_annealed", [GROUPS], "80 steps, but the run has 20 and ends at 0.00405"),
    ("opd_then_rl", [GROUPS, "method.coefficient.at=0.8"], "nothing is trained at 40% of the steps (the first is 8)"),
    ("opd_then_rl", [GROUPS, "method.coefficient.at=0"], "its switch at the share 0"),
    ("grpo", [GROUPS, "max_tokens=2"], "what is cut gets the reward 0"),
    ("golden_data", ["method.rollout.fraction=1"], "leaves no text of source FIXED"),
    ("golden_data", ["method.rollout.fraction=0"], "leaves no text of source STUDENT"),
    ("sdft", [OWN], "there is nothing to learn from it"),
    ("opsd", [OWN], "there is nothing to learn from it"),
    ("edge_opd", [], "no token has evidence and the term trains nothing"),
    ("reference_kl", [START, "teachers.start.mixup=1"], "compares the student with itself"),
    ("reward_extrapolation", [START, "teachers.start.mixup=1"], "goes beyond nothing"),
    ("reward_extrapolation", ["teachers.start.path=${teacher.path}"], "their shares count as one"),
    ("reward_extrapolation", [START, "method.scorer.shares={default: 0.5, start: 0.5}"], "goes beyond none"),
    ("reward_extrapolation", [START, "method.scorer.shares={default: -0.5, start: 1.5}"], "away from that teacher"),
    ("reward_extrapolation", [START, "method.scorer.shares={default: 0.0, start: 1.0}"], "counts nothing"),
    ("ensemble_reverse_kl", [SECOND, "method.scorer.shares.other=1"], "their shares count as one"),
    ("opd2", ["teachers.base.path=${teacher.path}"], "the delta between them is 0"),
    ("judged", JUDGE, "method.terms.verdict.scorer.after: mostly unknown tokens"),
    ("judged", [*JUDGE, "method.terms.verdict.scorer.after="], "is asked nothing"),
    ("judged", [*JUDGE, "method.terms.verdict.scorer.before="], "does not read the prompt"),
    ("sdpo", [GROUPS], "method.rollout.shown.solution, method.rollout.shown.feedback: mostly unknown tokens"),
]
REFUSED = [
    ("sampled_reverse_kl", ["method.coefficient=0"], "trains nothing"),
    ("opd_then_rl", [GROUPS, "method.coefficient.at=1", "method.terms.teacher.coefficient.at=0"], "trains nothing"),
    ("grpo", [GROUPS, "method.rollout.temperature=0"], "GroupAdvantage compares the texts of a group"),
    ("sdft", ["method.weights.beginning.count=77"], "so that none would be trained"),
    ("fixed_advantage", ["method.objective.advantage=0"], "needs an advantage other than 0"),
    ("edge_opd", ["method.objective.threshold=1e6"], "a token's evidence"),
    ("sdpo", [GROUPS, "method.rollout.shown.threshold=0"], "takes every answer for right"),
    ("sdpo", [GROUPS, "method.rollout.shown.solution='{prompt}'"], "without {completion}"),
    ("sdpo", [GROUPS, "method.rollout.shown.longest=1"], "without any solution"),
    ("sdpo", [GROUPS, "teacher.max_batch_tokens=150"], "a solution and the text"),
]


@cache
def surveyed(experiment: str) -> tuple[Survey, HuggingFaceTokenizer]:
    config = run_config([experiment, "method=sampled_reverse_kl"])
    tokenizer = HuggingFaceTokenizer(config.student.path)
    sources = Sources(tokenizer=tokenizer, rows=lambda *_: (), examples=lambda *_: (), teachers={})  # type: ignore[arg-type]
    return survey_all(config.prompts, sources, tokenizer), tokenizer


def remarks(*overrides: str, experiment: str = SHOP) -> list[str]:
    return check_meaning(run_config([experiment, "steps=20", *overrides]), *surveyed(experiment))


@pytest.mark.parametrize(("name", "more", "said"), REMARKED)
def test_what_trains_something_else_is_remarked_on_in_one_sentence(name: str, more: list[str], said: str) -> None:
    found = [note for note in remarks(f"method={name}", *more) if said in note]
    assert len(found) == 1 and found[0].startswith("note: ") and "\n" not in found[0]


@pytest.mark.parametrize(("name", "more", "said"), REFUSED)
def test_what_would_train_nothing_is_refused(name: str, more: list[str], said: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        remarks(f"method={name}", *more)
    assert said in str(refused.value)


@pytest.mark.parametrize("name", ["opsd", "sdft", "context_distillation", "edge_opd", "sampled_reverse_kl"])
def test_a_student_that_is_shown_more_than_itself_is_a_teacher(name: str) -> None:
    assert remarks(f"method={name}", experiment=SELF) == []


@pytest.mark.parametrize("name", ["kdrl", "reference_kl", "reward_extrapolation", "opd2", "golden_data", "cal_opd"])
def test_a_method_as_shipped_has_no_remark_but_on_words(name: str) -> None:
    assert [n for n in remarks(f"method={name}", *NEEDS.get(name, ())) if "mostly unknown" not in n] == []


def test_two_that_say_what_a_teacher_reads_are_remarked_on() -> None:
    assert any("which is not read" in note for note in remarks("method=sdpo", GROUPS, experiment=SELF))


@cache
def _base() -> RunConfig:
    return run_config([SHOP, "method=kdrl", GROUPS])


def _schedules() -> Any:
    ends = st.sampled_from([0.0, 0.0, 1.0, -0.5])
    shares = st.floats(0, 1)
    return st.one_of(
        ends,
        st.builds(SwitchSchedule, first=ends, last=ends, at=shares),
        st.builds(LinearSchedule, first=ends, last=ends, steps=st.integers(0, 40)),
    )


@settings(max_examples=60, deadline=None)
@given(first=_schedules(), second=_schedules(), steps=st.integers(1, 30))
def test_factors_are_refused_where_all_are_0_and_remarked_on_where_some_are(
    first: Any, second: Any, steps: int
) -> None:
    method = _base().method
    method = replace(method, coefficient=first, terms={"teacher": replace(method.terms["teacher"], coefficient=second)})
    config = replace(_base(), steps=steps, method=method)
    at = [at_step(step, steps) for step in range(steps)]
    values = np.asarray([[value(factor, step) for step in at] for factor in (first, second)])
    if not values.any():
        with pytest.raises(ConfigurationError, match="trains nothing"):
            check_factors(config)
        return
    notes = check_factors(config)
    assert any("nothing is trained at" in note for note in notes) == (not values.any(axis=0).all())
    assert sum("trained away from" in note for note in notes) == int((values < 0).any(axis=1).sum())


@pytest.mark.parametrize("name", ["kdrl", "opd_then_rl", "judged", "reference_kl"])
def test_a_bound_of_importance_ratios_holds_in_every_term(name: str) -> None:
    method = run_config([SHOP, f"method={name}", *NEEDS[name], "max_ratio=2"]).method
    bounded = [term.objective for term in method.every_term.values()]
    assert len(bounded) == 2 and all(isinstance(objective, TruncatedRatio) for objective in bounded)


def test_a_bound_leaves_terms_without_a_ratio_as_they_are() -> None:
    anchor = (
        "+method.terms.anchor={scorer: {_target_: opd.scorers.teacher.SampledTokens}, "
        "objective: {_target_: opd.objectives.estimators.SquaredReverseKL}}"
    )
    method = run_config([SHOP, "method=full_reverse_kl", anchor, "max_ratio=2"]).method
    assert isinstance(method.terms["anchor"].objective, TruncatedRatio)
    assert not isinstance(method.objective, TruncatedRatio)
