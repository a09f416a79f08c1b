"""Self-distillation: what a teacher is shown beside the prompt, and the limits in which its methods are plain ones."""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launch.config.run_config import run_config
from launch.inputs.prompt_files import read_rows
from opd.errors import ConfigurationError, DataError
from opd.method.method import Method
from opd.objectives import reweighted
from opd.objectives.sampled import SampledReverseKL
from opd.objectives.topk import TopKDivergence
from opd.objectives.vocabulary import FullReverseKL, JensenShannon
from opd.ports import Sources
from opd.rollouts.student import StudentRollout
from opd.scorers.teacher import StudentTopK, TeacherHidden
from opd.token_weights.length import SkipBeginning
from opd.types.prompt_templates import filled
from tests.unit.loop.test_loop import Bench
from tests.unit.loop.test_prompts import Letters, dataset, written

WHOLE: Any = StudentRollout(max_tokens=8)
AtTemperature: Any = reweighted.AtTemperature
ImportanceWeighted: Any = reweighted.ImportanceWeighted
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=20)


def trained(make: Any, steps: int = 3, lr: float = 1.0, **parts: Any) -> tuple[torch.Tensor, Bench]:
    bench = Bench(make, lr=lr)
    asyncio.run(bench.run(Method(**({"name": "m", "rollout": WHOLE} | parts)), steps))
    return bench.learner.table, bench


# Templates.


@given(prompt=TEXT, answer=TEXT, before=TEXT)
def test_what_is_put_into_a_template_is_not_searched_again(prompt: str, answer: str, before: str) -> None:
    before = before.replace("{", "(")
    text = filled(before + "{prompt}|{answer}|{other}", prompt + "{answer}", {"answer": answer + "{prompt}"})
    assert text == f"{before}{prompt}{{answer}}|{answer}{{prompt}}|{{other}}"


@given(st.lists(TEXT, min_size=1, max_size=4))
def test_of_a_conversation_the_last_message_is_written_anew_and_nothing_else(contents: list[str]) -> None:
    chat = tuple({"role": "user", "name": str(i), "content": text} for i, text in enumerate(contents))
    made = filled("{prompt}\n\nhint", chat, {})
    assert made == (*chat[:-1], {**chat[-1], "content": f"{contents[-1]}\n\nhint"})


def test_a_conversation_that_ends_without_text_has_no_place_for_a_template() -> None:
    calls: tuple[Mapping[str, Any], ...] = ({"role": "user", "content": None, "tool_calls": [1]},)
    with pytest.raises(ValueError, match="no text"):
        filled("{prompt}", calls, {})


def test_a_template_writes_the_teachers_prompt_from_the_rows_columns(tmp_path: Path) -> None:
    path = written(tmp_path, {"prompt": "ask", "answer": "7", "hint": "look"})
    source = dataset(
        path=path,
        answer_column="answer",
        teacher_prompt_column="hint",
        teacher_template="{prompt}({context}:{answer})",
        suffix="!",
    )
    (prompt,) = source(0, Sources(tokenizer=Letters(), rows=read_rows))[:1]
    assert Letters().decode(prompt.student_ids) == "ask!"
    assert Letters().decode(prompt.teacher_ids) == "ask(look:7)!"
    assert prompt.source is not None and prompt.source.text == "ask!"


@pytest.mark.parametrize(
    ("template", "says"),
    [("no place", r"\{prompt\} is missing"), ("{prompt} {answer}", r"\{answer\} is missing.*prompts\.answer_column")],
)
def test_a_template_that_cannot_be_filled_is_refused(template: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        dataset(path="rows.jsonl", answer_column="", teacher_template=template)


def test_a_row_without_what_the_template_names_is_refused_by_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, {"prompt": "ask", "hint": [{"role": "user", "content": "hint"}]})
    source = dataset(path=path, answer_column="", teacher_prompt_column="hint", teacher_template="{prompt}{context}")
    with pytest.raises(DataError, match=r"line 1 has no text for \{context\}"):
        source(0, Sources(tokenizer=Letters(), rows=read_rows))


# Limits.


def test_at_temperature_1_an_objective_is_itself_bit_for_bit(make: Any) -> None:
    parts: dict[str, Any] = {"scorer": TeacherHidden()}
    plain, _ = trained(make, objective=JensenShannon(), **parts)
    assert torch.equal(trained(make, objective=AtTemperature(of=JensenShannon()), **parts)[0], plain)
    other, _ = trained(make, objective=AtTemperature(of=JensenShannon(), temperature=1.1), **parts)
    assert (other - plain).abs().max() > 1e-6


def test_on_fresh_text_importance_weights_are_1_and_the_weight_of_no_token_is_skipped(make: Any) -> None:
    of = TopKDivergence(of=JensenShannon())
    parts: dict[str, Any] = {"scorer": StudentTopK(), "rollout": replace(WHOLE, record_topk=3)}
    plain, _ = trained(make, objective=of, **parts)
    weighted, _ = trained(make, objective=ImportanceWeighted(of=of), **parts)
    torch.testing.assert_close(weighted, plain, rtol=0, atol=1e-6)  # log-probabilities travel in float32
    nothing = {"beginning": SkipBeginning()}
    assert torch.equal(trained(make, objective=of, weights=nothing, **parts)[0], plain)
    some, _ = trained(make, objective=of, weights={"beginning": SkipBeginning(count=3)}, **parts)
    assert (some - plain).abs().max() > 1e-4


@pytest.mark.parametrize("wrapper", [AtTemperature, ImportanceWeighted])
def test_an_estimate_from_sampled_tokens_is_not_reweighted(wrapper: Any) -> None:
    with pytest.raises(ConfigurationError, match="over distributions, but SampledReverseKL is an estimate"):
        wrapper(of=SampledReverseKL())
    with pytest.raises(ConfigurationError, match="reads TopKScores"):
        AtTemperature(of=TopKDivergence(of=FullReverseKL()))


@given(st.floats(0.01, 0.99), st.integers(0, 100))
def test_the_divergence_of_opsd_is_at_most_the_entropy_of_its_coin(beta: float, seed: int) -> None:
    p, q = torch.from_numpy(np.random.default_rng(seed).normal(0, 8, (2, 5, 9))).log_softmax(-1)
    value = JensenShannon(beta=beta).between(p, q)
    assert (value >= -1e-12).all() and (value <= -beta * log(beta) - (1 - beta) * log(1 - beta) + 1e-12).all()


def test_the_published_settings_are_those_of_the_papers() -> None:
    opsd: Any
    sdft: Any
    opsd, sdft = (run_config(["experiment=shop", f"method={name}"]).method for name in ("opsd", "sdft"))
    sampling: Any = opsd.rollout
    assert (sampling.temperature, sampling.top_p) == (1.1, 0.95)
    assert opsd.objective == AtTemperature(of=JensenShannon(beta=0.5), temperature=1.1)
    assert sdft.objective.max_ratio == 2 and sdft.objective.of.of == JensenShannon(beta=0.5)
