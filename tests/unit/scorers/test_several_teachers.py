"""Several teachers in one step: each row is read by its own matrix, a mixture is a mixture, budgets are equal."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.certify.certify import certify
from opd.certify.checks.scorers import ASKED
from opd.errors import ConfigurationError
from opd.loss.chunked import StudentLogits, read
from opd.loss.metric_sums import MetricSums
from opd.loss.packing import TokenMean, pack
from opd.loss.per_teacher import by_teacher
from opd.method.method import Method
from opd.objectives.vocabulary import FullForwardKL, FullReverseKL, JensenShannon
from opd.ports import AtIds, Context, LastHidden, Layout, ScoreAnswer, ScoreRequest
from opd.rollouts.student import StudentRollout
from opd.scorers.ensemble import ContextIds, Ensemble
from opd.scorers.teacher import SampledTokens, StudentTopK, TeacherHidden, TeacherTopK
from opd.token_weights.length import SkipTruncated
from opd.token_weights.teachers import PromptWeight, TeacherBalance
from opd.types import (
    Batch,
    EnsembleScores,
    HiddenScores,
    Prompt,
    RemoteRows,
    Scored,
    Scores,
    StopReason,
    TokenLoss,
    TokenScores,
    TopKScores,
    Trajectory,
)
from tests.one_kind import answered

V = 7
WIDTHS = (5, 3, 4)
GENERATOR = torch.Generator().manual_seed(1)
HEADS = [torch.randn(V, width, generator=GENERATOR, dtype=torch.float64) for width in WIDTHS]
STATES = [torch.randn(6, width, generator=GENERATOR).numpy() for width in WIDTHS]  # what each teacher stored
LAYOUT = Layout(ranks=2, tokens_per_microbatch=40)
counts = st.integers(1, 5)


def trajectory(
    name: str = "a", tokens: int = 3, teacher: str = "default", context: int = 2, hint: int = 0
) -> Trajectory:
    ids = np.arange(context, dtype=np.int32)
    prompt = Prompt(id=name, student_ids=ids, teacher_ids=np.arange(context + hint, dtype=np.int32), teacher=teacher)
    written = (np.arange(tokens) % V).astype(np.int32)
    support = np.stack([written, (written + 1) % V], axis=1)
    behavior = TopKScores(
        logprobs=np.full(tokens, -1.0, dtype=np.float32),
        topk_ids=support,
        topk_logprobs=np.full((tokens, 2), -1.0, dtype=np.float32),
    )
    return Trajectory(
        prompt=prompt, sample=0, token_ids=written, behavior=behavior, loss_mask=np.ones(tokens, dtype=bool),
        versions=np.zeros(tokens, dtype=np.int32), stop=StopReason.END,
    )  # fmt: skip


def hidden(teacher: int, rows: Sequence[int]) -> HiddenScores:
    return HiddenScores(
        logprobs=np.full(len(rows), -1.0, dtype=np.float32),
        hidden=RemoteRows(pieces=((str(teacher), np.asarray(rows)),)),
        head=np.full(len(rows), teacher, dtype=np.int32),
    )


def fetch(handle: str) -> np.ndarray:
    return STATES[int(handle)]


def batch_of(scores: Scores, rows: int) -> Batch[Any]:
    every = torch.arange(rows)
    return Batch(
        input_ids=every, position_ids=every, cu_seqlens=torch.tensor([0, rows]), predict_at=every,
        target_ids=every % V, behavior_logprobs=-torch.ones(rows), weights=torch.ones(rows), depth=every, scores=scores,
        denominator=1.0,
    )  # fmt: skip


def exact(teacher: int, row: int) -> torch.Tensor:
    return (HEADS[teacher] @ torch.from_numpy(STATES[teacher][row]).double()).log_softmax(-1)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), min_size=1, max_size=9), st.data())
def test_every_row_is_read_by_the_matrix_of_its_teacher(rows: list[tuple[int, int]], data: st.DataObject) -> None:
    """Widths differ, teachers alternate, and the rows are taken in any order."""
    joined = HiddenScores.concat([hidden(teacher, [row]) for teacher, row in rows])
    order = data.draw(st.permutations(range(len(rows))))
    scores = joined.take(np.array(order)).to("cpu", fetch)
    got = read(batch_of(scores, len(rows)), HEADS).scores.vocabulary_logprobs
    expected = torch.stack([exact(*rows[i]) for i in order])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_teachers_of_different_widths_and_dtypes_meet_in_one_array() -> None:
    narrow = torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16)
    arrays = {"wide": np.array([[1 / 3, 2.0, 3.0]], dtype=np.float32), "16 bit": narrow.view(torch.uint16).numpy()}
    rows = RemoteRows(pieces=(("16 bit", np.array([0])), ("wide", np.array([0, 0]))))
    got = rows.fetch(arrays.__getitem__)
    wide = arrays["wide"][0].tolist()
    assert got.dtype == torch.float32 and got.tolist() == [[1.5, -2.0, 0.0], wide, wide]


def test_a_matrix_that_is_missing_is_an_error_and_no_other_is_taken() -> None:
    scores = HiddenScores.concat([hidden(0, [1]), hidden(2, [1])]).to("cpu", fetch)
    with pytest.raises(ConfigurationError, match=r"output matrix 2, but the learner was given 2"):
        read(batch_of(scores, 2), HEADS[:2])


shares = st.lists(st.floats(0.05, 5.0), min_size=1, max_size=3)


@settings(max_examples=40)
@given(shares, st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_an_ensemble_is_the_mixture_of_its_members(weights: list[float], rows: list[int]) -> None:
    mix = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    scores = EnsembleScores(
        logprobs=np.full(len(rows), -1.0, dtype=np.float32),
        members=tuple(hidden(teacher, rows) for teacher in range(len(weights))),
        shares=mix.expand(len(rows), -1),
    ).to("cpu", fetch)  # fmt: skip
    got = read(batch_of(scores, len(rows)), HEADS).scores.vocabulary_logprobs
    probabilities = [sum(mix[m] * exact(m, row).exp() for m in range(len(weights))) for row in rows]
    torch.testing.assert_close(got.exp(), torch.stack(probabilities), rtol=0, atol=1e-12)
    torch.testing.assert_close(got.exp().sum(-1), torch.ones(len(rows)).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "objective", [FullReverseKL(), FullForwardKL(), JensenShannon()], ids=lambda o: type(o).__name__
)
def test_a_student_that_is_the_mixture_has_nothing_to_learn(objective: Any) -> None:
    """... while one that is the mean of the log-probabilities has."""
    mix = torch.tensor([[0.7, 0.3]], dtype=torch.float64)
    members = (hidden(0, [2]), hidden(1, [2]))
    scores = EnsembleScores(logprobs=np.array([-1.0], dtype=np.float32), members=members, shares=mix)
    batch = read(batch_of(scores.to("cpu", fetch), 1), HEADS)
    product = 0.7 * exact(0, 2) + 0.3 * exact(1, 2)
    losses = []
    for logits in (batch.scores.vocabulary_logprobs, product[None]):
        leaf = logits.clone().requires_grad_()
        loss = objective(StudentLogits(logits=leaf), batch).loss.sum()
        losses.append((loss.item(), torch.autograd.grad(loss, leaf)[0].abs().max().item()))
    assert losses[0] == pytest.approx((0, 0), abs=1e-12)
    assert losses[1][0] > 1e-3 and losses[1][1] > 1e-3


@dataclass
class Table:
    """A teacher with one distribution; what it says also tells which contexts it was shown."""

    number: int
    seen: list[ScoreRequest]

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreAnswer]:
        self.seen += requests
        table = exact(self.number, 0).float().numpy()
        answers = []
        for r in requests:
            at, (kind,) = table[r.token_ids], r.kinds
            if isinstance(kind, LastHidden):
                rows = RemoteRows(pieces=((str(self.number), np.zeros(len(at), dtype=int)),))
                answers.append(HiddenScores(logprobs=at, hidden=rows))
            elif isinstance(kind, AtIds):
                answers.append(TopKScores(logprobs=at, topk_ids=kind.ids, topk_logprobs=table[kind.ids]))
            else:
                answers.append(TokenScores(logprobs=at))
        return answered(answers)


class Nobody:
    """A student and a tokenizer that no test here asks anything."""

    eos_id = 0

    async def generate(self, requests: Sequence[Any]) -> list[Any]:
        raise NotImplementedError

    async def receive(self, weights: Any) -> float:
        raise NotImplementedError

    def encode(self, text: str) -> np.ndarray:
        raise NotImplementedError

    def encode_all(self, prompts: Any) -> list[np.ndarray]:
        raise NotImplementedError

    def decode(self, ids: np.ndarray) -> str:
        raise NotImplementedError


def engines() -> Context:
    teachers = {"default": Table(0, []), "b": Table(1, []), "c": Table(2, [])}
    return Context(student=Nobody(), teachers=teachers, writers={}, graders={}, tokenizer=Nobody())


def test_all_readers_of_an_ensemble_tell_of_the_same_mixture() -> None:
    mixture = (3 * exact(1, 0).exp() + exact(2, 0).exp()) / 4
    ours = [trajectory("x", 4), trajectory("y", 2, teacher="c")]
    for reader in (SampledTokens(), StudentTopK(), TeacherHidden()):
        scorer = Ensemble(shares={"b": 3.0, "c": 1.0}, reader=reader)
        said = asyncio.run(scorer(ours, engines()))
        assert all(isinstance(s, scorer.produces) for s in said)
        for t, s in zip(ours, said, strict=True):
            np.testing.assert_allclose(s.logprobs, mixture.log()[t.token_ids], atol=1e-6)
            if isinstance(s, TopKScores):
                np.testing.assert_allclose(s.topk_logprobs, mixture.log()[np.asarray(t.behavior.topk_ids)], atol=1e-6)
            if isinstance(s, EnsembleScores):
                got = read(batch_of(s.to("cpu", fetch), len(t)), HEADS).scores.vocabulary_logprobs
                torch.testing.assert_close(got, mixture.log().expand(len(t), -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("reader", [SampledTokens(), StudentTopK(), TeacherHidden()], ids=str)
def test_an_ensemble_of_one_says_what_that_one_says(reader: Any) -> None:
    """Whatever its share; for hidden states as well, read through the head."""
    ours = [trajectory("x", 4, teacher="c"), trajectory("y", 2, teacher="c")]
    alone = asyncio.run(reader(ours, engines()))
    for share in (1.0, 0.25):
        said = asyncio.run(Ensemble(shares={"c": share}, reader=reader)(ours, engines()))
        for t, one, mixed in zip(ours, alone, said, strict=True):
            np.testing.assert_allclose(mixed.logprobs, one.logprobs, atol=1e-6)
            if isinstance(one, TopKScores):
                assert np.array_equal(mixed.topk_ids, one.topk_ids)
                np.testing.assert_allclose(mixed.topk_logprobs, one.topk_logprobs, atol=1e-6)
                np.testing.assert_allclose(mixed.rest, one.rest, atol=1e-6)
            if isinstance(mixed, EnsembleScores):
                got = read(batch_of(mixed.to("cpu", fetch), len(t)), HEADS).scores.vocabulary_logprobs
                torch.testing.assert_close(got, exact(2, 0).expand(len(t), -1), rtol=0, atol=1e-6)


def test_an_ensemble_without_a_mixture_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="TeacherTopK, whose ids differ between teachers"):
        Ensemble(shares={"b": 1.0}, reader=TeacherTopK(k=2))
    for wrong in ({}, {"b": 0.0}, {"b": -1.0}):
        with pytest.raises(ConfigurationError, match=r"Ensemble\.shares.* needs"):
            Ensemble(shares=wrong)


MEMBERS = ("default", "b", "c")


@settings(max_examples=40)
@given(
    contexts=st.dictionaries(st.sampled_from(MEMBERS), st.sampled_from(ContextIds)),
    reader=st.sampled_from([SampledTokens(), StudentTopK(), TeacherHidden()]),
    hints=st.lists(st.integers(0, 3), min_size=1, max_size=3),
)
def test_each_member_reads_the_context_that_is_chosen_for_it(contexts: Any, reader: Any, hints: list[int]) -> None:
    """Without a choice the teacher's; the student's of an anchor, which was trained to read no other."""
    ours, school = [trajectory(str(i), hint=hint) for i, hint in enumerate(hints)], engines()
    asyncio.run(Ensemble(shares=dict.fromkeys(MEMBERS, 1.0), reader=reader, contexts=contexts)(ours, school))
    for name in MEMBERS:
        own = contexts.get(name) is ContextIds.STUDENT
        expected = [(t.prompt.student_ids if own else t.prompt.teacher_ids).tolist() for t in ours]
        assert [r.context_ids.tolist() for r in school.teachers[name].seen] == expected  # type: ignore[attr-defined]
        assert [r.token_ids.tolist() for r in school.teachers[name].seen] == [t.token_ids.tolist() for t in ours]  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True, kw_only=True)
class Deaf(Ensemble):
    """An ensemble that does not listen to `contexts`."""

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        return await Ensemble.__call__(replace(self, contexts={}), trajectories, context)


@pytest.mark.parametrize(("scorer", "fails"), [(Ensemble, False), (Deaf, True)], ids=["right", "wrong"])
def test_the_certificate_knows_which_context_a_member_reads(scorer: Any, fails: bool) -> None:
    ours = scorer(shares={"default": 2.0, "start": 1.0}, contexts={"start": ContextIds.STUDENT})
    method = Method(name="m", rollout=StudentRollout(max_tokens=8), scorer=ours, objective=FullReverseKL())
    failures = set(certify(method).failures)
    assert ({"gradient of the promise", ASKED} <= failures) if fails else not failures


def test_a_context_of_no_member_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"teachers \['b'\], but scorer\.contexts names \['start'\]"):
        Ensemble(shares={"b": 1.0}, contexts={"start": ContextIds.STUDENT})


def test_the_scorer_notes_whose_matrix_reads_a_row() -> None:
    for name, number in (("default", 0), ("b", 1), ("c", 2)):
        (said,) = asyncio.run(TeacherHidden()([trajectory(teacher=name)], engines()))
        assert isinstance(said, HiddenScores) and set(said.head) == {number}


def test_a_privileged_teacher_reads_its_own_prompt_and_the_student_never_does() -> None:
    """Whatever the hint's length, testimony about a token stays with that token, and inputs are the student's."""
    ours = [trajectory("x", 4, hint=3), trajectory("y", 2, context=5, hint=1), trajectory("z", 3)]
    school = engines()
    said = asyncio.run(SampledTokens()(ours, school))
    shown = school.teachers["default"].seen  # type: ignore[attr-defined]
    for t, request in zip(ours, shown, strict=True):
        assert request.context_ids.tolist() == t.prompt.teacher_ids.tolist()
        assert request.token_ids.tolist() == t.token_ids.tolist()
    marked = [TokenScores(logprobs=-100 * i - np.arange(len(t), dtype=np.float32)) for i, t in enumerate(ours)]
    assert len(said) == len(ours)
    scored = [Scored(trajectory=t, scores=s) for t, s in zip(ours, marked, strict=True)]
    batches = [b for r in pack(scored, [np.ones(len(t)) for t in ours], LAYOUT, TokenMean()) for b in r]
    seen = {}
    for batch in batches:
        if not batch.weights.any():
            continue
        for target, place, said_here in zip(batch.target_ids, batch.predict_at, batch.scores.logprobs, strict=True):
            owner, token = divmod(int(-said_here), 100)
            seen[owner, token] = int(target)
            start = batch.cu_seqlens[np.searchsorted(batch.cu_seqlens, place, "right") - 1]
            assert place - start == len(ours[owner].prompt.student_ids) - 1 + token
    assert seen == {(i, j): int(token) for i, t in enumerate(ours) for j, token in enumerate(t.token_ids)}


cases = st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(1, 6), st.booleans()), min_size=1, max_size=9)


@settings(max_examples=40)
@given(cases, st.data())
def test_each_teacher_gets_its_share_of_the_trained_tokens(case: list, data: st.DataObject) -> None:
    """Also where completions are left out; the weights of the step still add up to its trained tokens."""
    relative = {name: data.draw(st.floats(0.1, 9)) for name in "abc"}
    scored = [
        Scored(
            trajectory=replace(trajectory(str(i), n, name), stop=StopReason.LENGTH if cut else StopReason.END),
            scores=Scores(),
        )
        for i, (name, n, cut) in enumerate(case)
    ]
    weights = TeacherBalance(shares=relative, filters={"whole": SkipTruncated()})(scored, engines())
    kept = {name: sum(n for other, n, cut in case if other == name and not cut) for name, _, _ in case}
    present = {name: relative[name] for name, n in kept.items() if n}
    total = sum(kept.values())
    for name, n in kept.items():
        got = sum(w.sum() for w, (other, _, _) in zip(weights, case, strict=True) if other == name)
        assert got == pytest.approx(total * relative[name] / sum(present.values()) if n else 0)
    assert all((w == 0).all() for w, (_, _, cut) in zip(weights, case, strict=True) if cut)
    backwards = TeacherBalance(shares=relative, filters={"whole": SkipTruncated()})(scored[::-1], engines())
    assert all(np.allclose(a, b) for a, b in zip(weights, backwards[::-1], strict=True))


def test_one_teacher_is_always_in_balance_and_an_unknown_one_is_refused() -> None:
    scored = [Scored(trajectory=trajectory(n, 3), scores=Scores()) for n in "xy"]
    assert all((w == 1).all() for w in TeacherBalance()(scored, engines()))
    with pytest.raises(ConfigurationError, match=r"no share for teacher 'default' \(has \['b'\]\)"):
        TeacherBalance(shares={"b": 1.0})(scored, engines())
    with pytest.raises(ConfigurationError, match=r"TeacherBalance\.shares\.b needs"):
        TeacherBalance(shares={"b": 0.0})


def test_a_prompt_counts_what_it_says() -> None:
    light = trajectory("x", 2)
    scored = [
        Scored(trajectory=replace(light, prompt=replace(light.prompt, weight=w)), scores=Scores()) for w in (0.25, 2.0)
    ]
    assert [w.tolist() for w in PromptWeight()(scored, engines())] == [[0.25, 0.25], [2.0, 2.0]]


@settings(max_examples=40)
@given(cases, st.integers(1, 3), st.integers(12, 40))
def test_the_metric_of_a_teacher_is_the_mean_over_its_own_tokens(case: list, ranks: int, budget: int) -> None:
    """However the step is cut into micro-batches and ranks."""
    rng = np.random.default_rng(0)
    scored, values = [], {}
    for i, (name, n, _) in enumerate(case):
        said = -rng.random(n, dtype=np.float32) - 1
        scored.append(Scored(trajectory=trajectory(str(i), n, name), scores=TokenScores(logprobs=said)))
        values.setdefault(name, []).append(said)
    layout = Layout(ranks=ranks, tokens_per_microbatch=budget)
    tallies: list[MetricSums] = []
    for batch in [b for r in pack(scored, [np.ones(n) for _, n, _ in case], layout, TokenMean()) for b in r]:
        here = batch.to("cpu", fetch)
        result = TokenLoss(loss=-here.scores.logprobs, metrics={"reverse_kl": here.scores.logprobs})
        for half in (0, 1):  # and in chunks
            cut = (half * len(here) // 2, (half + 1) * len(here) // 2)
            rows = here.rows(*cut)
            part = TokenLoss(
                loss=result.loss[slice(*cut)], metrics={k: v[slice(*cut)] for k, v in result.metrics.items()}
            )
            tallies.append(MetricSums.of(by_teacher(part, rows).metrics, rows.weights > 0))
    total = sum(n for _, n, _ in case)
    means = reduce(MetricSums.plus, tallies).means()
    for name, said in values.items() if len(values) > 1 else ():
        assert means[f"{name}/reverse_kl"] == pytest.approx(float(np.concatenate(said).mean()), rel=1e-5)
        assert means[f"{name}/share"] == pytest.approx(sum(map(len, said)) / total)
    if len(values) == 1:
        assert set(means) == {"reverse_kl"}
