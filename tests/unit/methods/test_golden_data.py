"""Golden data: a term about the student's own texts and one about references, each with its own divisor."""

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from launch.config.run_config import run_config
from opd.certify.engines import RequestLog, engines
from opd.certify.sources import with_both_sources, with_one_source
from opd.certify.worlds import make_world
from opd.method.method import Method, scored, weighed
from opd.method.terms import MAIN, Term
from opd.objectives.sampled import Likelihood, LogprobSource, SampledReverseKL
from opd.rollouts.mixed import AnswerRollout, Mixed
from opd.rollouts.student import StudentRollout
from opd.scorers.teacher import SampledTokens, Unscored
from opd.token_weights.sources import Source, WrittenBy
from opd.types import NO_VERSION
from tests.unit.loop.test_loop import Bench

WORLD = make_world(0)
PLAIN = SampledReverseKL(signal=LogprobSource.STUDENT)
MIXED = Mixed(student=StudentRollout(max_tokens=8), fixed=AnswerRollout(max_tokens=8), fraction=0.5)


def shipped() -> Any:
    return run_config(["experiment=shop", "method=golden_data"]).method


def test_each_term_trains_the_texts_of_its_source_and_divides_by_its_own_tokens() -> None:
    method = with_both_sources(shipped())
    context = engines(WORLD, RequestLog())
    items: list[Any] = []
    for number in (0, 1):
        group = [p for p in WORLD.prompts if p.id == f"state/{number}"][:3]
        texts = asyncio.run(method.rollout(group, context))
        items += asyncio.run(scored(method, texts, context))
    terms = weighed(method, items, context)
    fixed = [bool((item.trajectory.versions == NO_VERSION).all()) for item in items]
    assert 0 < sum(fixed) < len(fixed)
    tokens = {name: sum(len(i.trajectory) for i, f in zip(items, fixed, strict=True) if f == of_fixed)
              for name, of_fixed in ((MAIN, False), ("golden", True))}  # fmt: skip
    for name, of_fixed in ((MAIN, False), ("golden", True)):
        weights = terms[name].weights
        assert [bool(w.all()) for w in weights] == [f == of_fixed for f in fixed]
        assert [bool(w.any()) for w in weights] == [f == of_fixed for f in fixed]
        assert terms[name].normalizer(weights) == tokens[name]


@pytest.mark.parametrize("source", list(Source))
def test_a_certificate_of_one_term_has_texts_of_its_source_alone(source: Source) -> None:
    term = "main" if source is Source.STUDENT else "golden"
    method = with_one_source(shipped().one_term(term))
    rollout: Any = method.rollout
    assert rollout.fraction == (1.0 if source is Source.STUDENT else 0.0)
    plain = Method(name="m", rollout=MIXED, scorer=Unscored(), objective=Likelihood())
    assert with_one_source(plain) is plain and with_both_sources(plain) is plain  # which selects no source


def test_without_references_it_is_plain_distillation(make: Any) -> None:
    """Bit for bit where the term of the references is left out, and else up to the rounding of a sum of terms."""
    golden = Term(scorer=Unscored(), objective=Likelihood(), weights={"fixed": WrittenBy(source=Source.FIXED)})
    own: Any = {"rollout": replace(MIXED, fraction=1.0), "weights": {"own": WrittenBy(source=Source.STUDENT)}}
    tables = []
    for parts in (
        {"rollout": MIXED.student},
        {**own, "terms": {"golden": replace(golden, coefficient=0.0)}},
        {**own, "terms": {"golden": golden}},
    ):
        bench = Bench(make)
        method: Any = Method(name="m", scorer=SampledTokens(), objective=PLAIN, **parts)
        asyncio.run(bench.run(method, 3))
        tables.append(bench.learner.table)
    assert torch.equal(tables[0], tables[1])
    torch.testing.assert_close(tables[0], tables[2])


def test_context_that_an_environment_said_is_nobodys_to_train() -> None:
    context = engines(WORLD, RequestLog())
    (text,) = asyncio.run(StudentRollout(max_tokens=8)(WORLD.prompts[:1], context))
    said = replace(text, versions=np.asarray([0, NO_VERSION, 0], dtype=np.int32)[: len(text)])
    (item,) = asyncio.run(
        scored(Method(name="m", rollout=MIXED, scorer=Unscored(), objective=Likelihood()), [said], context)
    )
    assert WrittenBy(source=Source.STUDENT)([item], context)[0].tolist() == [1.0, 0.0, 1.0][: len(text)]
    assert WrittenBy(source=Source.FIXED)([item], context)[0].tolist() == [0.0, 1.0, 0.0][: len(text)]
