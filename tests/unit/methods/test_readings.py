"""The reading pass: values are those of the current student, whatever the layout, and nothing is read unasked."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.certify.engines import RequestLog, engines
from opd.certify.worlds import World, make_world
from opd.errors import ConfigurationError, DataError
from opd.loss.chunked import StudentLogits
from opd.loss.chunked import read as read_teacher
from opd.loss.readings import (
    Compatibility,
    StudentEntropy,
    StudentTopEntropy,
    SupportReverseKL,
    TeacherEntropy,
    UnionForwardKL,
    VocabularyReverseKL,
    token_readings,
)
from opd.method.method import Method, readings_of, scored, weigh, weighed
from opd.method.readings import StepReadings, read_step, reading_pass
from opd.method.terms import Term
from opd.objectives.sampled import SampledReverseKL
from opd.objectives.vocabulary import FullForwardKL, FullReverseKL
from opd.ports import Context, Layout, Reading
from opd.rollouts.student import StudentRollout
from opd.scorers.ensemble import ContextIds, Ensemble
from opd.scorers.teacher import SampledTokens, TeacherHidden, TeacherTopK
from opd.token_weights.selection import ByReading, TopFraction
from opd.token_weights.teachers import TeacherBalance
from opd.types import Batch, HiddenScores, Scored, Scores, VocabularyScores

ROLLOUT = StudentRollout(max_tokens=8)
EVERY = (StudentEntropy(), StudentTopEntropy(k=3), TeacherEntropy(), VocabularyReverseKL(), UnionForwardKL(k=3),
         Compatibility(k=3))  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Asks:
    """A weight that declares readings, and is 1 everywhere."""

    readings: Sequence[Reading]
    consumes: ClassVar[type[Scores]] = Scores
    reads_sampled_tokens: ClassVar[bool] = False

    def __call__(self, scored: Sequence[Scored[Any]], context: Context) -> list[np.ndarray]:
        return [np.ones(len(s.trajectory)) for s in scored]


@dataclass
class Reader:
    """The student of a world behind the one verb that a reading pass asks."""

    world: World
    layout: Layout
    chunk: int = 0
    asked: int = 0

    async def read(
        self, batches: Sequence[Sequence[Batch[Any]]], readings: Sequence[Reading]
    ) -> list[list[np.ndarray]]:
        self.asked += 1
        return [[self._read(batch, readings) for batch in rank] for rank in batches]

    def _read(self, batch: Batch[Any], readings: Sequence[Reading]) -> np.ndarray:
        here, student = batch.to("cpu", lambda rows: rows), self.world.student
        hidden = student.hidden(here.input_ids, here.position_ids)[here.predict_at]
        heads = self.world.heads()
        found = token_readings(
            hidden, student.head, lambda *rows: read_teacher(here.rows(*rows), heads), readings, chunk=self.chunk
        )
        return found.numpy()


def method_of(readings: Sequence[Reading], **parts: Any) -> Method:
    fields = {"name": "m", "rollout": ROLLOUT, "scorer": TeacherHidden(), "objective": FullReverseKL()}
    return Method(**({**fields, "weights": {"asks": Asks(readings=readings)}} | parts))


def step_of(method: Method, world: World) -> tuple[list[Scored[Any]], Context]:
    """Trajectories of a world of several teachers, in which some tokens are context."""
    box = engines(world, RequestLog())

    async def collect() -> list[Scored[Any]]:
        found = []
        for name in dict.fromkeys(p.id for p in world.prompts):
            group = [p for p in world.prompts if p.id == name]
            found += await scored(method, await method.rollout(group, box), box)
        return found

    items = asyncio.run(collect())[::5]
    for i, item in enumerate(items):
        item.trajectory.loss_mask[i % 3 : i % 3 + 1] = False
    items[2].trajectory.loss_mask[:] = False
    return items, box


def read(method: Method, items: list[Scored[Any]], world: World, layout: Layout, chunk: int = 0) -> StepReadings:
    return asyncio.run(read_step(method, items, Reader(world=world, layout=layout, chunk=chunk)))  # type: ignore[arg-type]


WORLD = make_world(0, names=("default", "second"))
WHOLE = Layout(ranks=1, tokens_per_microbatch=10_000)


def exactly(item: Scored[Any], reading: Reading) -> np.ndarray:
    """A reading of one trajectory that is read alone, from whole distributions in float64."""
    t = item.trajectory
    (student,) = WORLD.student.logprobs([(t.prompt.student_ids, t.token_ids)])
    (teacher,) = WORLD.teachers[t.prompt.teacher].logprobs([(t.prompt.teacher_ids, t.token_ids)])
    scores = VocabularyScores(logprobs=np.zeros(len(t)), vocabulary_logprobs=teacher)
    batch: Any = replace(_BLANK, scores=scores)
    return reading(StudentLogits(logits=student), batch).numpy()


_IDS, _NUMBERS = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.float32)
_BLANK: Batch[Any] = Batch(
    input_ids=_IDS, position_ids=_IDS, cu_seqlens=_IDS, predict_at=_IDS, target_ids=_IDS, behavior_logprobs=_NUMBERS,
    weights=_NUMBERS, depth=_IDS, scores=Scores(), denominator=1.0,
)  # fmt: skip


def test_readings_are_those_of_each_text_read_alone_and_nan_at_context() -> None:
    method = method_of(EVERY)
    items, _ = step_of(method, WORLD)
    assert {i.trajectory.prompt.teacher for i in items} == {"default", "second"}
    found = read(method, items, WORLD, WHOLE)
    for item, values in zip(items, found.by_term["main"], strict=True):
        assert [*values] == [*EVERY]
        for reading, got in values.items():
            mask = item.trajectory.loss_mask
            assert got.dtype == np.float32 and np.isnan(got[~mask]).all()
            np.testing.assert_allclose(got[mask], exactly(item, reading)[mask], atol=2e-6)


@settings(deadline=None, max_examples=10)
@given(
    ranks=st.integers(1, 5),
    tokens=st.sampled_from([7, 9, 30, 10_000]),
    chunk=st.sampled_from([0, 1, 5]),
    seed=st.integers(0, 99),
)
def test_values_do_not_depend_on_micro_batches_ranks_chunks_or_order(
    ranks: int, tokens: int, chunk: int, seed: int
) -> None:
    method = method_of(EVERY)
    items, _ = step_of(method, WORLD)
    expected = read(method, items, WORLD, WHOLE).by_term["main"]
    order = np.random.default_rng(seed).permutation(len(items))
    layout = Layout(ranks=ranks, tokens_per_microbatch=tokens)
    found = read(method, [items[i] for i in order], WORLD, layout, chunk).by_term["main"]
    for place, i in enumerate(order):
        for reading in EVERY:
            np.testing.assert_allclose(found[place][reading], expected[i][reading], atol=1e-6)


def test_every_term_is_read_with_its_own_scores() -> None:
    anchor = Ensemble(shares={"second": 1.0}, contexts={"second": ContextIds.STUDENT})
    asks = (TeacherEntropy(), StudentEntropy())
    terms = {
        "anchor": Term(scorer=anchor, objective=FullForwardKL(), weights={"w": Asks(readings=asks)}),
        "silent": Term(scorer=anchor, objective=FullForwardKL()),
    }
    both = method_of(asks[:1], terms=terms)
    items, box = step_of(both, WORLD)
    found = read(both, items, WORLD, Layout(ranks=2, tokens_per_microbatch=20))
    assert {name: [*values[0]] for name, values in found.by_term.items()} == {"main": [asks[0]], "anchor": [*asks]}
    for name in found.by_term:
        alone = both.one_term(name)
        single = [replace(i, scores=i.terms.get(name, i.scores), terms={}) for i in items]
        expected = read(alone, single, WORLD, WHOLE).by_term["main"]
        for got, value in zip(found.by_term[name], expected, strict=True):
            assert all(np.allclose(got[r], value[r], atol=1e-6, equal_nan=True) for r in value)
    seen: list[Mapping[Any, Any]] = []

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Sees(Asks):
        def __call__(self, scored: Sequence[Scored[Any]], context: Context) -> list[np.ndarray]:
            seen.extend(s.readings for s in scored)
            return [np.ones(len(s.trajectory)) for s in scored]

    watched = replace(terms["anchor"], weights={"w": Sees(readings=asks)})
    weighed(replace(both, terms={**terms, "anchor": watched}), items, box, found.by_term)
    assert all(s is v for s, v in zip(seen, found.by_term["anchor"], strict=True))


def test_a_method_without_readings_never_asks_the_learner() -> None:
    for weights in ({}, {"balance": TeacherBalance()}):
        method = method_of((), weights=weights)
        items, box = step_of(method, WORLD)
        reader: Any = Reader(world=WORLD, layout=WHOLE)
        assert asyncio.run(read_step(method, items, reader)) == StepReadings()
        assert reader.asked == 0
        assert all(not item.readings for item in items)
        plain, read_ = weighed(method, items, box), weighed(method, items, box, {})
        assert all(np.array_equal(a, b) for a, b in zip(plain["main"].weights, read_["main"].weights, strict=True))


def test_a_step_without_a_sampled_token_is_not_read_and_has_no_weight() -> None:
    method = method_of((), weights={"top": TopFraction(by=ByReading(reading=StudentEntropy()))})
    items, box = step_of(method, WORLD)
    for item in items:
        item.trajectory.loss_mask[:] = False
    assert reading_pass(method, items, WHOLE) is None
    assert not any(w.any() for w in weigh(method.weights, items, box))


def test_readings_of_parts_within_a_part_are_read_once() -> None:
    top = TopFraction(by=ByReading(reading=StudentEntropy()))
    assert readings_of(TeacherBalance(filters={"top": top}), top) == (StudentEntropy(),)
    nested = replace(top, by=ByReading(reading=TeacherEntropy()), filters={"top": top})
    assert readings_of(nested) == (TeacherEntropy(), StudentEntropy())


def test_a_reading_of_scores_that_nobody_makes_is_refused_when_a_method_is_composed() -> None:
    with pytest.raises(
        ConfigurationError, match=r"reading of weight 'asks' TeacherEntropy needs VocabularyScores, but"
    ):
        method_of((TeacherEntropy(),), scorer=SampledTokens(), objective=SampledReverseKL())
    with pytest.raises(ConfigurationError, match=r"reading of weight 'asks' SupportReverseKL needs TopKScores"):
        method_of((SupportReverseKL(),))
    with pytest.raises(ConfigurationError, match=r"weight 'hidden' Wants needs VocabularyScores"):
        method_of((), weights={"hidden": Wants(readings=())})
    assert issubclass(TeacherHidden().produces, HiddenScores)


class Wants(Asks):
    consumes = VocabularyScores


def test_a_reading_that_is_not_finite_names_itself_and_the_prompt() -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Broken:
        consumes: ClassVar[type[Scores]] = Scores

        def __call__(self, student: StudentLogits, batch: Batch[Any]) -> Any:
            return torch.full((len(batch),), torch.inf)

    method = method_of((StudentEntropy(), Broken()))
    items, _ = step_of(method, WORLD)
    with pytest.raises(DataError, match=r"prompt 'state/0': reading .*Broken\(\) is not finite"):
        read(method, items, WORLD, WHOLE)


def test_a_support_as_large_as_the_vocabulary_but_one_gives_the_whole_reverse_kl() -> None:
    found = {}
    for reading, scorer in ((SupportReverseKL(), TeacherTopK(k=11)), (VocabularyReverseKL(), TeacherHidden())):
        method = method_of((reading,), scorer=scorer, objective=SampledReverseKL())
        items, _ = step_of(method, WORLD)
        values = read(method, items, WORLD, WHOLE).by_term["main"]
        found[type(reading)] = np.concatenate([v[reading] for v in values])
    np.testing.assert_allclose(found[SupportReverseKL], found[VocabularyReverseKL], atol=1e-5)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 9), vocabulary=st.integers(2, 9))
def test_disagreement_is_a_divergence_on_the_union_and_compatibility_a_mass(seed: int, k: int, vocabulary: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    p, q = (3 * torch.randn(2, 4, vocabulary, generator=draw, dtype=torch.float64)).log_softmax(-1)
    batch = replace(_BLANK, scores=VocabularyScores(logprobs=q[:, 0], vocabulary_logprobs=q))
    student = StudentLogits(logits=p)
    d, c = UnionForwardKL(k=k)(student, batch), Compatibility(k=k)(student, batch)
    for row in range(4):
        own, taught = ({*x[row].topk(min(k, vocabulary)).indices.tolist()} for x in (p, q))
        union = sorted(own | taught)
        q_, p_ = q[row, union].log_softmax(-1), p[row, union].log_softmax(-1)
        assert float(d[row]) == pytest.approx(float((q_.exp() * (q_ - p_)).sum()), abs=1e-9)
        assert float(c[row]) == pytest.approx(float(q[row, sorted(own)].exp().sum()), abs=1e-9)
        assert float(q[row, sorted(own & taught)].exp().sum()) <= float(c[row]) + 1e-12 <= 1 + 1e-9
    same = replace(_BLANK, scores=VocabularyScores(logprobs=p[:, 0], vocabulary_logprobs=p))
    assert UnionForwardKL(k=k)(student, same).abs().max() < 1e-12
    assert VocabularyReverseKL()(student, same).abs().max() < 1e-12
