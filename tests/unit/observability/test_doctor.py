"""The doctor passes a good teacher and refuses each planted fault with the sentence that names it.

Models are tables of logits behind the ports: the last two tokens predict the next one.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.run.doctor import BFLOAT16, seconds, summary
from opd.doctor.examine import examine, teacher_gain
from opd.doctor.findings import CheckThresholds, Evidence, Finding, Subject, Verdict, ask, fine, refused, warned
from opd.doctor.rollout_checks import method_texts
from opd.doctor.teacher_checks import causality
from opd.loss.chunked import StudentLogits, read
from opd.method.method import Method
from opd.objectives.vocabulary import FullForwardKL
from opd.ports import (
    AtIds,
    Completion,
    Context,
    GenerateRequest,
    LastHidden,
    Layout,
    SampledToken,
    Sampling,
    ScoreAnswer,
    ScoreRequest,
    TopK,
)
from opd.rollouts.selected import GoodTexts, OpenPrompts
from opd.rollouts.student import StudentRollout, TeacherRollout, generate
from opd.scorers.teacher import TeacherHidden
from opd.settings.devices import Device
from opd.types import Batch, HiddenScores, RemoteRows, StopReason, TokenScores, TopKScores
from teacher_service.config import Backend, TeacherConfig
from tests.conftest import Make
from tests.one_kind import answered
from tests.tiny_models import completion_logprobs, tiny_model

V, EOS = 12, 2
ALL = frozenset({SampledToken, TopK, AtIds, LastHidden})
Answers = list[TokenScores]


def log_softmax(rows: np.ndarray) -> np.ndarray:
    return np.asarray(torch.from_numpy(rows).log_softmax(-1), dtype=np.float32)


@dataclass
class Table:
    """Log-probabilities `[V * V, V]` by the last two tokens; it writes, reads, and may be told to lie."""

    logits: np.ndarray
    lie: Callable[[Sequence[ScoreRequest], Answers], Answers] = lambda requests, answers: answers
    head: np.ndarray = field(default_factory=lambda: np.eye(V, dtype=np.float32))

    def rows(self, context: np.ndarray, ids: np.ndarray) -> np.ndarray:
        text = np.concatenate([[0, 0], context, ids]).astype(int)
        return self.logits[text[len(context) : -2] * V + text[len(context) + 1 : -1]]

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreAnswer]:
        return answered(self.lie(requests, [self._answer(r) for r in requests]))

    def _answer(self, request: ScoreRequest) -> TokenScores:
        logits = self.rows(request.context_ids, request.token_ids)
        full = log_softmax(logits)
        logprobs = full[np.arange(len(full)), request.token_ids]
        match request.kinds[0]:
            case TopK(k=k):
                ids = np.argsort(-full, axis=-1)[:, :k].astype(np.int32)
                return TopKScores(logprobs=logprobs, topk_ids=ids, topk_logprobs=np.take_along_axis(full, ids, -1))
            case LastHidden():
                rows = RemoteRows(pieces=((logits.astype(np.float32), np.arange(len(full))),))
                return HiddenScores(logprobs=logprobs, hidden=rows)
            case _:
                return TokenScores(logprobs=logprobs)

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        return [self._write(r, np.random.default_rng(i)) for i, r in enumerate(requests)]

    async def receive(self, weights: Any) -> float:
        raise NotImplementedError

    def _write(self, request: GenerateRequest, draw: np.random.Generator) -> Completion:
        ids, rows = np.zeros(0, dtype=np.int32), []
        while len(ids) < request.sampling.max_tokens and (not len(ids) or ids[-1] != EOS):
            full = log_softmax(self.rows(request.context_ids, np.append(ids, 0).astype(np.int32)))[-1]
            rows.append(full)
            ids = np.append(ids, draw.choice(V, p=np.exp(full) / np.exp(full).sum())).astype(np.int32)
        full = np.stack(rows)
        best = np.argsort(-full, axis=-1)[:, : request.sampling.topk].astype(np.int32)
        behavior = TopKScores(
            logprobs=full[np.arange(len(ids)), ids],
            topk_ids=best,
            topk_logprobs=np.take_along_axis(full, best, -1),
        )
        stop = StopReason.END if ids[-1] == EOS else StopReason.LENGTH
        return Completion(token_ids=ids, behavior=behavior, versions=np.zeros(len(ids), np.int32), stop=stop)


@dataclass
class Reader:
    """The learner's half that a doctor needs: losses of a table at packed positions."""

    logits: np.ndarray
    head: np.ndarray
    layout: Layout = field(default=Layout(ranks=1, tokens_per_microbatch=10_000))

    async def evaluate(self, batches: Sequence[Sequence[Batch[Any]]], objective: Any) -> dict[str, float]:
        sums, count = {"gap": 0.0}, 0
        for batch in (b.to("cpu", lambda handle: handle) for rank in batches for b in rank):
            before = torch.where(batch.position_ids > 0, batch.input_ids.roll(1), 0)
            states = before * V + batch.input_ids
            logits = torch.from_numpy(self.logits)[states][batch.predict_at]
            said = objective(StudentLogits(logits=logits), read(batch, torch.from_numpy(self.head)))
            sums["gap"] += float(said.metrics["gap"].sum())
            count += len(batch)
        return {"gap": sums["gap"] / count}


class Sum:
    """A task that is solved by a text without token 3."""

    eos_id = EOS

    async def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [float("3" not in text.split()) for text in completions]

    def encode(self, text: str) -> np.ndarray:
        raise NotImplementedError

    def encode_all(self, prompts: Any) -> list[np.ndarray]:
        raise NotImplementedError

    def decode(self, ids: np.ndarray) -> str:
        return " ".join(map(str, ids))


def tables() -> tuple[np.ndarray, np.ndarray]:
    """A student and a teacher that are alike but not the same, and end texts with `EOS`."""
    draw = np.random.default_rng(0)
    student = draw.normal(size=(V * V, V)).astype(np.float32)
    student[:, EOS] += 0.5
    return student, (student + 0.5 * draw.normal(size=student.shape)).astype(np.float32)


def subject(**changes: Any) -> Subject:
    student, teacher = tables()
    engine = changes.pop("student", Table(student))
    reader = changes.pop("teacher", Table(teacher))
    whole: dict[str, Any] = {
        "name": "default",
        "context": Context(
            student=engine, teachers={"default": reader}, writers={}, graders={"t": Sum()}, tokenizer=Sum()
        ),
        "learner": Reader(student, np.eye(V, dtype=np.float32)),
        "replicas": [reader],
        "supports": ALL,
        "vocabulary": V,
        "support": 4,
    }
    return Subject(**(whole | changes))


def examined(make: Any, sick: Subject) -> dict[str, Finding]:
    prompts = [make.prompt([1, 3 + i % 4], id=f"p{i}") for i in range(12)]
    return {f.check: f for f in asyncio.run(examine(sick, prompts, 8))}


def test_a_good_pair_passes_every_check(make: Any) -> None:
    teacher = Table(tables()[1])
    found = examined(make, subject(replicas=[teacher, Table(tables()[1])], reference=Table(tables()[1])))
    assert {f.verdict for f in found.values()} == {Verdict.FINE}, found
    assert len(found) == 12 and all(f.measured and not f.sentence for f in found.values())


def test_what_a_backend_cannot_answer_is_not_asked(make: Any) -> None:
    found = examined(make, subject(supports=frozenset({SampledToken})))
    assert not {"overlap", "full softmax", "hidden states"} & found.keys() and len(found) == 7


def early(requests: Sequence[ScoreRequest], answers: Answers) -> Answers:
    """Says of every token what belongs to the next one."""
    return [replace(a, logprobs=np.append(np.asarray(a.logprobs)[1:], np.float32(-1))) for a in answers]


def late(requests: Sequence[ScoreRequest], answers: Answers) -> Answers:
    """Says of every token what belongs to the one before."""
    return [replace(a, logprobs=np.insert(np.asarray(a.logprobs)[:-1], 0, np.float32(-1))) for a in answers]


def renormalized(requests: Sequence[ScoreRequest], answers: Answers) -> Answers:
    """Logprobs among the k alone, of the written token too: each answer is at one with itself."""

    def among(answer: TokenScores) -> TokenScores:
        if not isinstance(answer, TopKScores):
            return answer
        mass = torch.from_numpy(np.asarray(answer.topk_logprobs)).logsumexp(-1, keepdim=True).numpy()
        written = np.minimum(np.asarray(answer.logprobs) - mass[:, 0], 0)
        whole = np.full(len(written), -80.0, dtype=np.float32)  # nothing is left
        return replace(answer, topk_logprobs=answer.topk_logprobs - mass, logprobs=written, rest=whole)

    return [among(answer) for answer in answers]


def unordered(requests: Sequence[ScoreRequest], answers: Answers) -> Answers:
    """The right answers, in the order of the written text: swapped whenever the caller's order is another."""
    return [replace(a, logprobs=np.asarray(a.logprobs) - 0.01 * i) for i, a in enumerate(answers)]


def other_ids(requests: Sequence[ScoreRequest], answers: Answers) -> Answers:
    return [replace(a, topk_ids=(np.asarray(a.topk_ids) + 1) % V) if isinstance(a, TopKScores) else a for a in answers]


def poisoned(requests: Sequence[ScoreRequest], answers: Answers) -> Answers:
    return [replace(answers[0], logprobs=np.full_like(answers[0].logprobs, np.nan)), *answers[1:]]


def lying(lie: Callable[[Sequence[ScoreRequest], Answers], Answers]) -> Subject:
    return subject(teacher=Table(tables()[1], lie))


def biased(column: int, by: float, rows: slice = slice(None)) -> np.ndarray:
    logits = tables()[1].copy()
    logits[rows, column] += by
    return logits


def hot() -> Subject:
    """A student that was sampled at another temperature than the learner's."""
    return subject(student=Table(tables()[0] / 0.7))


def stranger_among_replicas() -> Subject:
    return subject(replicas=[Table(tables()[1]), Table(tables()[0])])


def unending() -> Subject:
    return subject(teacher=Table(biased(EOS, -30.0)))


def other_template() -> Subject:
    """After the prompt's last tokens (context states 1, 3..6) the teacher expects only token 9."""
    logits = tables()[1].copy()
    for last in range(3, 7):
        logits[V + last] = np.where(np.arange(V) == 9, 40.0, logits[V + last])
    return subject(teacher=Table(logits))


def padded() -> Subject:
    """Tokens 10 and 11 are padding, and the teacher writes them."""
    return subject(vocabulary=10, teacher=Table(biased(11, 4.0)))


FAULTS: dict[str, tuple[Callable[[], Subject], str, str]] = {
    "one position early": (lambda: lying(early), "alignment", "one position early"),
    "one position late": (lambda: lying(late), "alignment", "teacher 'default' is late"),
    "company changes answers": (lambda: lying(unordered), "steadiness", "in another order or alone"),
    "renormalized top-k": (lambda: lying(renormalized), "full softmax", "renormalizes its top-k"),
    "ids mixed up": (lambda: lying(other_ids), "full softmax", "another in its support"),
    "not a number": (lambda: lying(poisoned), "answers", "NaN"),
    "another replica": (stranger_among_replicas, "replicas", "replica 1 serves another checkpoint"),
    "another backend says otherwise": (
        lambda: subject(reference=Table(tables()[1] / 0.7)),
        "backends",
        "does not say what its checkpoint says under a plain forward pass",
    ),
    "another output matrix": (
        lambda: subject(learner=Reader(tables()[0], 0.8 * np.eye(V, dtype=np.float32))),
        "hidden states",
        "another checkpoint, a temperature or a final norm",
    ),
    "engine hotter than learner": (hot, "engine and learner", "sampling is not at temperature 1"),
    "template ends elsewhere": (other_template, "first token", "chat template or thinking mode"),
    "another end of text": (unending, "end of text", "would learn never to stop"),
    "padding that speaks": (padded, "padding", "ids that are no tokens"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_planted_fault_is_refused_with_its_sentence(make: Any, fault: str) -> None:
    sick, check, sentence = FAULTS[fault]
    found = examined(make, sick())
    assert found[check].verdict is Verdict.REFUSED, found
    assert sentence in found[check].sentence and found[check].measured


def flattened(scale: float) -> np.ndarray:
    """A teacher of which only `scale` of its opinions is left."""
    return (tables()[1] * scale).astype(np.float32)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-3, 0.02, 0.1])
def test_a_flat_teacher_is_called_flat_and_not_late(make: Any, scale: float) -> None:
    found = examined(make, subject(teacher=Table(flattened(scale))))
    assert found["alignment"].verdict is Verdict.WARNING and "is flat" in found["alignment"].sentence
    assert Verdict.REFUSED not in {f.verdict for f in found.values()}, found


@dataclass
class Untrained:
    """A random-initialized model, as transformers makes one, behind the port of a teacher."""

    model: Any

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreAnswer]:
        return answered(self._answer(r, completion_logprobs(self.model, r)) for r in requests)

    def _answer(self, request: ScoreRequest, full: torch.Tensor) -> TokenScores:
        logprobs = full.gather(1, torch.from_numpy(request.token_ids).long()[:, None])[:, 0].numpy()
        (kind,) = request.kinds
        if not isinstance(kind, TopK):
            return TokenScores(logprobs=logprobs)
        best = full.topk(kind.k)
        return TopKScores(logprobs=logprobs, topk_ids=best.indices.int().numpy(), topk_logprobs=best.values.numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_random_initialized_teacher_is_warned_of_and_can_be_used(make: Any, dtype: torch.dtype) -> None:
    teacher = Untrained(tiny_model(3, tied=True, std=0.02, vocab_size=V).to(dtype))
    thresholds = CheckThresholds() if dtype is torch.float32 else BFLOAT16
    found = examined(make, subject(teacher=teacher, supports=frozenset({SampledToken, TopK}), thresholds=thresholds))
    assert "is flat" in found["alignment"].sentence
    assert Verdict.REFUSED not in {f.verdict for f in found.values()}, found


@given(
    shift=st.sampled_from([-2, -1, 0, 1, 2]),
    scale=st.sampled_from([0.01, 0.3, 1.0, 4.0]),
    noise=st.sampled_from([0.0, 1e-4, 0.02]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_alignment_is_told_whatever_the_teachers_sharpness_and_noise(
    shift: int, scale: float, noise: float, seed: int
) -> None:
    """Early, late or right is never taken for another; where noise hides it, it is called flat."""
    draw = np.random.default_rng(seed)

    def shifted(requests: Sequence[ScoreRequest], answers: Answers) -> Answers:
        moved = [np.asarray(a.logprobs) + noise * draw.normal(size=len(a.logprobs)) for a in answers]
        moved = [np.concatenate([np.full(max(shift, 0), -1.0), m, np.full(max(-shift, 0), -1.0)]) for m in moved]
        moved = [m[max(-shift, 0) :][: len(a.logprobs)] for m, a in zip(moved, answers, strict=True)]
        return [TokenScores(logprobs=np.minimum(m, 0).astype(np.float32)) for m in moved]

    sick = subject(teacher=Table(flattened(scale), shifted))
    prompts = [Make.prompt([1, 3 + i % 4], id=f"p{i}") for i in range(12)]
    written = asyncio.run(generate(prompts, sick.context.student, Sampling(max_tokens=8, topk=4)))
    said = asyncio.run(ask(sick.teacher, written, SampledToken()))
    found = asyncio.run(causality(sick, Evidence(written=written, scores=said)))
    if shift == 0:
        assert found.verdict is not Verdict.REFUSED, found
        assert scale < 1 or found.verdict is Verdict.FINE, found
    elif scale >= 1:
        assert found.verdict is Verdict.REFUSED, found
        assert ("early" if shift < 0 else "late") in found.sentence


def test_a_flat_teacher_of_a_large_vocabulary_is_not_said_to_have_another_template(make: Any) -> None:
    """log 2^18 is 12.5 nats: what a constant took for surprise is what such a teacher says of everything."""

    def wide(requests: Sequence[ScoreRequest], answers: Answers) -> Answers:
        return [TokenScores(logprobs=np.full_like(a.logprobs, -12.5)) for a in answers]

    sick = subject(
        student=Table(tables()[0] * 30), teacher=Table(tables()[1], wide), supports=frozenset({SampledToken})
    )
    found = examined(make, sick)
    assert found["first token"].verdict is Verdict.FINE, found
    assert found["end of text"].verdict is not Verdict.REFUSED, found


def test_a_probe_in_which_nothing_ended_is_a_warning(make: Any) -> None:
    endless = tables()[0].copy()
    endless[:, EOS] = -40
    found = examined(make, subject(student=Table(endless)))["end of text"]
    assert found.verdict is Verdict.WARNING and "none of 12 completions ended" in found.measured
    assert "generation_config.json" in found.sentence


def test_what_was_found_is_counted() -> None:
    good = fine("a", "m")
    assert summary([good] * 11) == "11 checks, none against training"
    assert summary([warned("b", "m", "s"), *[good] * 10]) == "1 warning of 11 checks, none against training"
    both = [warned("b", "m", "s")] * 2 + [refused("c", "m", "s"), good]
    assert summary(both) == "2 warnings of 4 checks, 1 against training"


def test_strangers_are_advised_a_cold_start(make: Any) -> None:
    other = np.random.default_rng(9).normal(size=(V * V, V)).astype(np.float32)
    other[:, EOS] += 0.5
    found = examined(make, subject(teacher=Table(other)))
    assert found["overlap"].verdict is Verdict.WARNING and "method=sft" in found["overlap"].sentence
    assert {f.verdict for f in found.values()} == {Verdict.FINE, Verdict.WARNING}


def test_a_student_is_its_own_teacher_or_the_backend_is_refused(make: Any) -> None:
    same = examined(make, subject(twin=Table(tables()[0])))
    assert same["own teacher"].verdict is Verdict.FINE
    other = examined(make, subject(twin=Table(tables()[0] * 0.9)))
    assert other["own teacher"].verdict is Verdict.REFUSED and "its own teacher" in other["own teacher"].sentence


def test_a_teacher_that_ends_no_better_is_a_warning(make: Any) -> None:
    prompts = [make.prompt([1, 4], id=f"p{i}", task="t", answer="-") for i in range(100)]
    better, worse = Table(biased(3, -30.0)), Table(biased(3, 5.0))
    found = [asyncio.run(teacher_gain(subject().context, writer, prompts, 8)) for writer in (better, worse)]
    assert [f.verdict for f in found] == [Verdict.FINE, Verdict.WARNING], found
    assert "little to learn" in found[1].sentence


def texts_found(make: Any, rollout: Any, writer: Table, **of_prompts: Any) -> list[Finding]:
    """The finding about a method's texts, whose teacher writes as `writer`: one group, since tables draw by place."""
    prompts = [make.prompt([1, 4], id="p", **{"task": "t", "answer": "-"} | of_prompts) for _ in range(60)]
    context = replace(subject().context, writers={"default": writer})
    method = Method(name="m", rollout=rollout, scorer=TeacherHidden(), objective=FullForwardKL())
    return asyncio.run(method_texts(context, method, prompts, 8))


def test_a_method_whose_texts_are_worse_than_the_students_own_is_a_warning(make: Any) -> None:
    better, worse, writes = Table(biased(3, -30.0)), Table(biased(3, 5.0)), TeacherRollout(max_tokens=8)
    (good,), (bad,) = texts_found(make, writes, better), texts_found(make, writes, worse)
    assert (good.verdict, bad.verdict) == (Verdict.FINE, Verdict.WARNING), (good, bad)
    assert "of 60 texts TeacherRollout brings" in bad.measured and "worse than the student's own" in bad.sentence
    (same,) = texts_found(make, writes, Table(tables()[0]))
    assert same.verdict is Verdict.FINE, "as good as the student's own"


def test_a_methods_texts_are_judged_only_where_others_write_them_and_a_grader_can(make: Any) -> None:
    worse = Table(biased(3, 5.0))
    own = StudentRollout(max_tokens=8)
    for rollout in (own, OpenPrompts(of=own), GoodTexts(of=own)):
        assert texts_found(make, rollout, worse) == []
    for unknown in ({"answer": ""}, {"task": "other"}):
        (found,) = texts_found(make, TeacherRollout(max_tokens=8), worse, **unknown)
        assert found.verdict is Verdict.FINE and "not measured" in found.measured
    (cut,) = texts_found(make, TeacherRollout(max_tokens=1), Table(biased(3, 50.0)))
    assert cut.verdict is Verdict.FINE and "not measured" in cut.measured, "cut on purpose"


@dataclass
class Listening(Table):
    """A table that keeps the contexts in which it was asked to write."""

    contexts: list[list[int]] = field(default_factory=list)

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        self.contexts += [r.context_ids.tolist() for r in requests]
        return await super().generate(requests)


def test_a_privileged_teacher_writes_on_in_its_own_context(make: Any) -> None:
    knows = np.array([5, 1, 4], dtype=np.int32)
    prompts = [make.prompt([1, 4], id=f"p{i}", task="t", answer="-", teacher_ids=knows) for i in range(4)]
    student, writer = Listening(tables()[0]), Listening(tables()[1])
    asyncio.run(teacher_gain(subject(student=student).context, writer, prompts, 8))
    own, theirs = student.contexts[len(prompts) :], writer.contexts
    assert any(len(context) > 2 for context in own), "no text was half-written"
    assert theirs == [[5, *context] for context in own]


@pytest.mark.parametrize(
    ("backend", "weights", "plain", "twin"),
    [
        (Backend.TORCH, 9, False, True),
        (Backend.VLLM, 9, True, True),
        (Backend.HTTP, 9, True, False),
        (Backend.OPENAI, 0, False, False),
    ],
)
def test_a_teacher_is_compared_only_with_what_is_here(backend: Backend, weights: int, plain: bool, twin: bool) -> None:
    """An endpoint whose weights are elsewhere can be examined, too."""
    teacher = TeacherConfig(path="t", backend=backend, url="http://127.0.0.1:1", model="m", replicas=2)
    cluster = SimpleNamespace(gpus_per_teacher=1.0)
    plan: Any = SimpleNamespace(
        config=SimpleNamespace(teachers={"default": teacher}, student=SimpleNamespace(path="s"), cluster=cluster),
        teacher_params={"default": weights},
    )
    reference, own = seconds(plan, "default")
    assert (reference is not None, own is not None) == (plain, twin)
    assert reference is None or (reference.backend, reference.path, reference.replicas) == (Backend.TORCH, "t", 1)
    assert reference is None or reference.device is Device.GPU, (
        "also of a remote teacher's weights, whose client has none"
    )
    assert own is None or (own.backend, own.path, own.replicas) == (backend, "s", 1)
