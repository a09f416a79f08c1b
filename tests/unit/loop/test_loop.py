"""The real loop on a world that fits in a table: methods converge to the teacher, and the bookkeeping is exact.

Only the ports are faked. A model is a table of logits `[V, V]`: the row of the last token predicts the next one. Its
hidden state is that row's number as a one-hot vector, so packing, weighing, chunked losses and objectives are all real.
"""

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opd import ports
from opd.loop.ledger import Ledger
from opd.loop.rollout_buffer import BufferedStep
from opd.loop.staleness import StalenessSchedule
from opd.loop.step_clock import StepClock
from opd.loop.train import StepRecord, train
from opd.loss.chunked import StudentLogits, chunked_loss, read
from opd.method.method import Method
from opd.objectives.sampled import ClippedPolicyGradient, Likelihood, LogprobSource, SampledReverseKL
from opd.objectives.topk import HeadTailDivergence
from opd.objectives.vocabulary import FullForwardKL, FullReverseKL, JensenShannon
from opd.observability.spans import Span, Stage
from opd.rollouts.seeds import sampling_seed
from opd.rollouts.student import StudentRollout, TeacherRollout
from opd.scorers.reward import GroupAdvantage
from opd.scorers.teacher import SampledTokens, StudentTopK, TeacherHidden, TeacherTopK, Unscored
from opd.token_weights.length import SkipTruncated
from opd.types import (
    Batch,
    HiddenScores,
    Prompt,
    RemoteRows,
    Scores,
    StepReport,
    StopReason,
    TokenLoss,
    TokenScores,
    TopKScores,
)

V, GROUP = 4, 10
ONE_HOT = np.eye(V, dtype=np.float32)
Wait = Callable[[str], Any]


async def at_once(place: str) -> None:
    """Nothing has to be waited for."""


def log_softmax(table: Tensor) -> np.ndarray:
    return table.detach().log_softmax(-1).numpy()


@dataclass
class Model:
    """A table behind the ports: it writes, and it reads."""

    table: np.ndarray  # log-probabilities
    version: int = 0
    wait: Wait = at_once

    async def generate(self, requests: Sequence[ports.GenerateRequest]) -> list[ports.Completion]:
        version, table = self.version, self.table
        await self.wait(f"rollout {requests[0].prompt_id}")
        first, sampling = requests[0], requests[0].sampling
        draw = np.random.default_rng(sampling_seed(0, first.prompt_id, 0, version))
        last = np.array([r.context_ids[-1] for r in requests])
        tokens, rows = [], []
        for _ in range(sampling.max_tokens):
            rows.append(table[last])
            last = (np.exp(rows[-1]).cumsum(-1) < draw.random((len(last), 1))).sum(-1).clip(max=V - 1)
            tokens.append(last)
        written, said = np.stack(tokens, axis=1), np.stack(rows, axis=1)
        return [
            ports.Completion(
                token_ids=ids.astype(np.int32),
                behavior=said_about(ids, logprobs, ports.TopK(k=sampling.topk) if sampling.topk else None, ids),
                versions=np.full(len(ids), version, dtype=np.int32),
                stop=StopReason.LENGTH if i % 4 == 0 else StopReason.END,
            )
            for i, (ids, logprobs) in enumerate(zip(written, said, strict=True))
        ]

    async def score(self, requests: Sequence[ports.ScoreRequest]) -> list[ports.ScoreAnswer]:
        await self.wait("scorer")
        read_from = [np.concatenate([r.context_ids[-1:], r.token_ids[:-1]]) for r in requests]
        pairs = zip(requests, read_from, strict=True)
        return [tuple(said_about(r.token_ids, self.table[at], kind, at) for kind in r.kinds) for r, at in pairs]

    async def receive(self, weights: Any) -> float:
        raise NotImplementedError


def said_about(ids: np.ndarray, rows: np.ndarray, kind: Any, contexts: np.ndarray) -> TokenScores:
    """What a model with log-probabilities `rows` says about the written `ids`."""
    rows = rows.astype(np.float32)
    logprobs = rows[np.arange(len(ids)), ids]
    if isinstance(kind, ports.LastHidden):
        return HiddenScores(logprobs=logprobs, hidden=RemoteRows(pieces=((ONE_HOT, contexts),)))
    if isinstance(kind, ports.TopK | ports.AtIds):
        asked = kind.ids if isinstance(kind, ports.AtIds) else np.argsort(-rows, axis=-1)[:, : kind.k]
        at_support = np.take_along_axis(rows, asked.astype(int), -1)
        return TopKScores(logprobs=logprobs, topk_ids=asked.astype(np.int32), topk_logprobs=at_support)
    return TokenScores(logprobs=logprobs)


@dataclass
class TableLearner:
    """Real autograd and plain gradient descent on the student's table; two ranks, small micro-batches."""

    table: Tensor
    teacher: Tensor
    lr: float
    wait: Wait = at_once
    layout: ports.Layout = field(default=ports.Layout(ranks=2, tokens_per_microbatch=60))
    steps: int = 0
    published: list[int] = field(default_factory=list)

    async def step(self, batches: Sequence[Sequence[Batch[Scores]]], objective: Any) -> StepReport:
        await self.wait("learner")
        head = self.table.detach().T.clone().requires_grad_()
        total: Tensor = torch.zeros(())
        for batch in [b.to("cpu", lambda handle: handle) for rank in batches for b in rank]:
            hidden = torch.eye(V).double()[batch.input_ids[batch.predict_at]]

            def evaluate(student: StudentLogits, start: int, stop: int, batch: Batch[Any] = batch) -> TokenLoss:
                return objective(student, read(batch.rows(start, stop), self.teacher.T))

            part, _ = chunked_loss(hidden, head, batch.weights, evaluate, chunk=50)
            total = total + part / batch.denominator
        total.backward()
        assert head.grad is not None
        self.table = self.table - self.lr * head.grad.T
        self.steps += 1
        tokens = sum(len(b.input_ids) for rank in batches for b in rank)
        return StepReport(
            loss=total.item(), grad_norm=0.0, lr=self.lr, tokens=tokens, trained_tokens=tokens, metrics={}
        )

    async def publish(self, student: Any, version: int) -> ports.PublishReport:
        await self.wait("publish")
        student.table, student.version = log_softmax(self.table), version
        self.published.append(version)
        return ports.PublishReport(version=version, gap=0.0, nbytes=0)


@dataclass
class Prompts:
    """`GROUP` samples of each of `prompts_per_step` prompts that end in different tokens."""

    make: Any
    prompts_per_step: int = 2
    group_size: int = GROUP
    asked: list[int] = field(default_factory=list)
    breaks: Exception | None = None

    def __call__(self, step: int, sources: ports.Sources) -> list[Prompt]:
        self.asked.append(step)
        if self.breaks and step == 2:
            raise self.breaks
        tokens = [(step * self.prompts_per_step + i) for i in range(self.prompts_per_step)]
        return [p for t in tokens for p in [self.make.prompt([t % V], id=f"{step}/{t}", task="t")] * self.group_size]


class Threes:
    """Pays for every token 3."""

    async def grade(self, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [text.count("3") / len(text) for text in completions]

    def decode(self, ids: np.ndarray) -> str:
        return "".join(map(str, ids))

    def encode_all(self, prompts: Sequence[Any]) -> list[np.ndarray]:
        return [np.asarray([int(c) for c in prompt.text if c.isdecimal()], dtype=np.int32) for prompt in prompts]


@dataclass
class Bench:
    """Everything `train` wants, and all that it told its observers."""

    make: Any
    wait: Wait = at_once
    lr: float = 1.0
    records: list[StepRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        student, teacher = torch.randn(2, V, V, generator=torch.Generator().manual_seed(3)).double() * 1.5
        self.prompts = Prompts(self.make)
        self.learner = TableLearner(table=student, teacher=teacher, lr=self.lr, wait=self.wait)
        self.student = Model(log_softmax(student), wait=self.wait)
        reader = Model(log_softmax(teacher), wait=self.wait)
        self.engines = ports.Context(
            student=self.student,
            teachers={"default": reader},
            writers={"default": reader},
            graders={"t": Threes()},
            tokenizer=Threes(),
        )

    def divergence(self) -> float:
        """The exact KL(student||teacher), averaged over contexts."""
        p, q = self.learner.table.log_softmax(-1), self.learner.teacher.log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    async def observe(self, record: StepRecord) -> None:
        self.records.append(record)

    async def run(
        self, method: Method, steps: int, *observers: Any, start: int = 0, ledger: Any = None, **schedule: Any
    ) -> Ledger:
        sources = ports.Sources(tokenizer=Threes(), rows=lambda path, columns: ())
        told = [self.observe, *observers]
        self.ledger = ledger or Ledger()
        keywords: Any = {"start": start, "steps": steps, "ledger": self.ledger}
        keywords["schedule"] = StalenessSchedule(**({"deterministic": False} | schedule))
        return await train(method, self.prompts, sources, self.engines, self.learner, told, **keywords)


def method(scorer: Any, objective: Any, record_topk: int = 0, **parts: Any) -> Method:
    rollout = StudentRollout(max_tokens=8, record_topk=record_topk)
    return Method(**({"name": "m", "rollout": rollout, "scorer": scorer, "objective": objective} | parts))


class DirectK1:
    """The planted defect: the log-ratio differentiated directly, whose expected gradient is 0."""

    consumes = TokenScores

    def __call__(self, student: StudentLogits, batch: Batch[TokenScores]) -> TokenLoss:
        return TokenLoss(loss=student.at(batch.target_ids) - batch.scores.logprobs, metrics={})


CONVERGING = {  # method, learning rate, staleness
    "sampled": (method(SampledTokens(), SampledReverseKL()), 8.0, 0),
    "sampled, stale": (method(SampledTokens(), SampledReverseKL(signal=LogprobSource.STUDENT)), 8.0, 2),
    "full reverse": (method(TeacherHidden(), FullReverseKL()), 8.0, 0),
    "full forward": (method(TeacherHidden(), FullForwardKL()), 8.0, 0),
    "jensen-shannon": (method(TeacherHidden(), JensenShannon()), 30.0, 0),
    "teacher's top-k": (method(TeacherTopK(k=2), HeadTailDivergence(of=FullReverseKL())), 8.0, 0),
    "student's top-k, stale": (method(StudentTopK(), HeadTailDivergence(of=FullReverseKL()), record_topk=2), 8.0, 1),
    "teacher's text": (method(Unscored(), Likelihood(), rollout=TeacherRollout(max_tokens=8)), 8.0, 0),
}


@pytest.mark.parametrize("name", CONVERGING)
def test_p16_the_student_becomes_the_teacher(make: Any, name: str) -> None:
    chosen, lr, max_staleness = CONVERGING[name]
    bench = Bench(make, lr=lr)
    before = bench.divergence()
    asyncio.run(bench.run(chosen, 30, max_staleness=max_staleness))
    assert bench.divergence() < before / 30


@pytest.mark.parametrize("lr", [1.0, 8.0])
def test_p16_the_planted_direct_k1_does_not(make: Any, lr: float) -> None:
    bench = Bench(make, lr=lr)
    before = bench.divergence()
    asyncio.run(bench.run(method(SampledTokens(), DirectK1()), 30))
    assert bench.divergence() > before / 2


def test_task_rewards_rise_under_grpo(make: Any) -> None:
    bench = Bench(make, lr=4.0)
    asyncio.run(bench.run(method(GroupAdvantage(), ClippedPolicyGradient()), 15))
    first, last = (np.mean([s.scores.rewards.mean() for s in bench.records[i].scored]) for i in (0, -1))
    assert last > first + 0.1
    cut = [s for s in bench.records[0].scored if s.trajectory.stop is StopReason.LENGTH]
    assert cut and not any(s.scores.rewards.any() for s in cut)


class Pause:
    """Gives way to the other tasks a random number of times, at every port."""

    def __init__(self, seed: int = 0, turns: int = 12) -> None:
        self.draw, self.turns = np.random.default_rng(seed), turns

    async def __call__(self, place: str) -> None:
        for _ in range(self.draw.integers(self.turns)):
            await asyncio.sleep(0)


SHORT = method(SampledTokens(), SampledReverseKL())


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_no_token_is_staler_than_allowed_and_the_allowance_is_used(make: Any, max_staleness: int) -> None:
    gaps = []
    for seed in range(3):
        bench = Bench(make, wait=Pause(seed))
        asyncio.run(bench.run(SHORT, 8, max_staleness=max_staleness))
        versions = [np.concatenate([s.trajectory.versions for s in r.scored]) for r in bench.records]
        gaps += [record.step - 1 - said for record, said in zip(bench.records, versions, strict=True)]
    assert min(gap.min() for gap in gaps) >= 0
    assert max(gap.max() for gap in gaps) == max_staleness


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_steps_are_admitted_by_ordinal_and_published_by_number(make: Any, max_staleness: int) -> None:
    finished: list[int] = []

    async def slow_first(place: str) -> None:
        """Later steps finish first."""
        if place.startswith("rollout"):
            step = int(place.split()[1].split("/")[0])
            for _ in range(3 * (6 - step)):
                await asyncio.sleep(0)
            finished.append(step)

    bench = Bench(make, wait=slow_first)
    asyncio.run(bench.run(SHORT, 6, start=2, max_staleness=max_staleness))
    assert (finished != sorted(finished)) == (max_staleness > 0)
    assert bench.prompts.asked == [2, 3, 4, 5]
    assert [record.step for record in bench.records] == [3, 4, 5, 6]
    assert bench.learner.published == [2, 3, 4, 5, 6], "the engines did not repeat the learner before the first token"
    for record in bench.records:
        assert record.published.version == record.step
        assert {s.trajectory.prompt.id.split("/")[0] for s in record.scored} == {str(record.step - 1)}
        assert [s.trajectory.sample for s in record.scored] == [*range(GROUP)] * 2
        assert set(record.seconds) == {"rollout", "score", "wait", "train", "publish", "step"}
        assert all(seconds >= 0 for seconds in record.seconds.values())


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_the_ledger_accounts_for_every_trajectory_at_every_step(make: Any, max_staleness: int) -> None:
    bench = Bench(make, wait=Pause(1))
    chosen = method(Unscored(), Likelihood(), weights={"whole": SkipTruncated()})
    ledger = asyncio.run(bench.run(chosen, 6, max_staleness=max_staleness))
    for record in bench.records:
        said, done = record.ledger, 2 * GROUP * record.step
        cut = sum(s.trajectory.stop is StopReason.LENGTH for s in record.scored)
        assert cut == sum(not weights.any() for weights in record.weights) == 2 * 3
        assert said["issued"] == said["trained"] + said["dropped"] + said["outstanding"]
        assert said["trained"] + said["dropped"] == done <= said["scored"] <= said["generated"] <= said["issued"]
        assert said["dropped"] == said["dropped/weight 0"] == cut * record.step
        assert said["outstanding"] <= 2 * GROUP * max_staleness
    assert ledger.issued == ledger.generated == ledger.scored == 6 * 2 * GROUP
    assert ledger.outstanding == 0 and ledger.trained == 6 * 2 * (GROUP - 3)
    assert bench.learner.steps == 6, "a step in which something counts was taken for an empty one"
    assert {span.step for record in bench.records for span in record.spans if record.step == 4} == {4}


@pytest.mark.parametrize("off", [1, -1])
def test_an_account_that_does_not_add_up_ends_the_run(make: Any, off: int) -> None:
    bench = Bench(make)

    async def lose(record: StepRecord) -> None:
        if record.step == 2:
            bench.ledger.issued += off

    with pytest.raises(BaseExceptionGroup) as caught:
        asyncio.run(bench.run(SHORT, 6, lose))
    assert "the ledger does not add up" in str(leaves(caught.value)[0]) and bench.learner.steps == 3


def test_a_step_counts_where_a_single_token_of_it_does(make: Any) -> None:
    """Not only where all its tokens do, or one of every text."""

    class First:
        consumes, reads_sampled_tokens = Scores, False

        def __call__(self, scored: Sequence[Any], context: Any) -> list[np.ndarray]:
            return [(np.arange(len(s.trajectory)) < (i == 0)).astype(float) for i, s in enumerate(scored)]

    bench = Bench(make)
    chosen = method(SampledTokens(), SampledReverseKL(), weights={"first": First()})
    ledger = asyncio.run(bench.run(chosen, 2))
    assert bench.learner.steps == ledger.trained == 2


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize(
    ("nothing", "broken_off"),
    [
        ((), None),
        ((0, 1), None),
        ((0, 1, 2), 2),
        ((0, 1, 3, 4), None),
        ((2, 3, 4), 4),
        ((1, 3, 4, 5), 5),
        ((5, 6), None),
    ],
    ids=str,
)
def test_three_steps_in_a_row_without_a_token_end_a_run_and_fewer_do_not(
    make: Any, start: int, nothing: Sequence[int], broken_off: int | None
) -> None:
    """Wherever in the run they are, at its begin as well; the student stays as it is in each."""

    class Filtered:
        consumes, reads_sampled_tokens = Scores, False

        def __call__(self, scored: Sequence[Any], context: Any) -> list[np.ndarray]:
            step = int(scored[0].trajectory.prompt.id.split("/")[0]) - start
            return [np.full(len(s.trajectory), float(step not in nothing)) for s in scored]

    bench = Bench(make)
    chosen = method(SampledTokens(), SampledReverseKL(), weights={"filtered": Filtered()})
    if broken_off is None:
        asyncio.run(bench.run(chosen, start + 7, start=start))
        assert bench.learner.steps == 7 - len(nothing) and len(bench.records) == 7
        return
    with pytest.raises(BaseExceptionGroup) as caught:
        asyncio.run(bench.run(chosen, start + 7, start=start))
    assert "no token to train" in str(leaves(caught.value)[0])
    assert len(bench.records) == broken_off


@pytest.mark.parametrize("start", [0, 5])
def test_an_account_names_no_step_when_a_run_has_ended_wherever_it_began(make: Any, start: int) -> None:
    """Steps before it are none of its own, those after it are over: it does not grow with the steps."""
    ledger = asyncio.run(Bench(make).run(SHORT, start + 6, start=start))
    said = json.loads(ledger.to_json())
    assert (said["first"], said["settled"], said["open"]) == (start + 6, [], [])


def test_observers_are_told_of_every_step_in_order_and_awaited(make: Any) -> None:
    told: list[tuple[str, int]] = []
    bench = Bench(make, wait=Pause(2))

    async def slow(record: StepRecord) -> None:
        for _ in range(20):
            await asyncio.sleep(0)
            assert bench.learner.steps == record.step, "the next step was taken while an observer was at work"
        told.append(("slow", record.step))

    async def fast(record: StepRecord) -> None:
        told.append(("fast", record.step))

    asyncio.run(bench.run(SHORT, 3, slow, fast, max_staleness=2))
    assert told == [(name, step) for step in (1, 2, 3) for name in ("slow", "fast")]


class Boom(Exception):
    """What somebody else's code raises."""


def leaves(error: BaseException) -> list[BaseException]:
    return [leaf for e in error.exceptions for leaf in leaves(e)] if isinstance(error, BaseExceptionGroup) else [error]


@pytest.mark.parametrize("place", ["prompts", "rollout 2/4", "scorer", "learner", "publish", "observer"])
def test_a_failure_anywhere_stops_everything_at_once(make: Any, place: str) -> None:
    """Something fails in the third step, while rollouts are under way that would never end by themselves."""
    boom, calls = Boom(place), Counter()

    async def fail(where: str) -> None:
        calls[where] += 1
        if where == place and calls[where] == {"scorer": 5, "learner": 3, "publish": 4}.get(where, 1):
            raise boom
        if where.startswith("rollout 3") or (where == "rollout 2/5" and place == "rollout 2/4"):
            await asyncio.Event().wait()

    async def observe(record: StepRecord) -> None:
        if place == "observer" and record.step == 3:
            raise boom

    async def run() -> set[Any]:
        bench = Bench(make, wait=fail)
        bench.prompts.breaks = boom if place == "prompts" else None
        with pytest.raises(BaseExceptionGroup) as caught:
            await asyncio.wait_for(bench.run(SHORT, 9, observe, max_staleness=2), timeout=20)
        assert all(leaf is boom for leaf in leaves(caught.value)), caught.value
        assert len(bench.records) <= 2 + (place in ("observer", "publish")) and bench.learner.steps <= 3
        nowhere = [record for record in bench.records if not record.live]
        assert place != "publish" or [record.step for record in nowhere] == [3]
        for record in nowhere:  # the student has learned it, and no engine has it
            assert (record.published.version, record.published.nbytes) == (record.step, 0)
            assert np.isnan(record.published.gap)
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(run()) == set()


@pytest.mark.parametrize("place", ["rollout 2/4", "scorer"])
def test_a_part_that_is_cancelled_from_within_ends_the_run(make: Any, place: str) -> None:
    """A task that ends as cancelled is no failure to a group of tasks: the learner waited for its step for ever."""
    calls = Counter[str]()

    async def give_up(where: str) -> None:
        calls[where] += 1
        if where == place and calls[where] == (5 if place == "scorer" else 1):
            raise asyncio.CancelledError

    async def run() -> None:
        with pytest.raises(BaseExceptionGroup) as caught:
            await asyncio.wait_for(Bench(make, wait=give_up).run(SHORT, 9, max_staleness=2), timeout=20)
        assert all("was cancelled while it generated or scored" in str(leaf) for leaf in leaves(caught.value))

    asyncio.run(run())


@dataclass
class Nothing:
    """No token counts in the calls named by `calls` (from 0)."""

    calls: Sequence[int]
    called: int = -1
    consumes = Scores
    reads_sampled_tokens = False

    def __call__(self, scored: Sequence[Any], context: Any) -> list[np.ndarray]:
        self.called += 1
        return [np.full(len(s.trajectory), float(self.called not in self.calls)) for s in scored]


def test_a_step_without_a_trainable_token_is_skipped_and_accounted_for(make: Any) -> None:
    chosen = method(SampledTokens(), SampledReverseKL(), weights={"nothing": Nothing([0, 2, 3, 5])})
    bench = Bench(make)
    tables = [bench.learner.table]

    async def look(record: StepRecord) -> None:
        tables.append(bench.learner.table)

    ledger = asyncio.run(bench.run(chosen, 6, look))
    assert [r.report.trained_tokens > 0 for r in bench.records] == [False, True, False, False, True, False]
    assert bench.learner.steps == 2 and bench.learner.published == [0, 1, 2, 3, 4, 5, 6]
    moved = [not torch.equal(old, new) for old, new in itertools.pairwise(tables)]
    assert moved == [False, True, False, False, True, False]
    assert ledger.trained == 2 * 2 * GROUP and ledger.dropped["weight 0"] == 4 * 2 * GROUP


def test_a_skipped_step_reports_that_nothing_was_done(make: Any) -> None:
    bench = Bench(make)
    asyncio.run(bench.run(method(SampledTokens(), SampledReverseKL(), weights={"nothing": Nothing([1])}), 3))
    report = bench.records[1].report
    assert report == StepReport(loss=0.0, grad_norm=0.0, lr=0.0, tokens=0, trained_tokens=0, metrics={})


@pytest.mark.parametrize(("read", "score"), [(6.0, 2.0), (4.0, 0.0), (2.5, 0.0)])
def test_the_seconds_of_a_step_are_those_of_its_spans(read: float, score: float) -> None:
    """Reading that ended before the last text was written took no time of its own."""
    spans = [
        Span(role=Stage.ROLLOUT, step=8, start=1.0, end=4.0),
        Span(role=Stage.TEACHER, step=8, start=2.0, end=read),
    ]
    rollouts = BufferedStep(step=7, began=1.0, prompts=[], spans=spans)
    clock = StepClock(began=3.0, waited=7.0, updated=12.0, drained=14.0, ended=17.0)
    assert clock.seconds(rollouts) == {
        "rollout": 3.0, "score": score, "wait": 4.0 + 2.0, "train": 5.0, "publish": 3.0, "step": 14.0
    }  # fmt: skip
    of_the_learner, of_publishing = clock.spans(rollouts)[2:]
    assert of_the_learner == Span(role=Stage.LEARNER, step=8, start=7.0, end=12.0)
    assert of_publishing == Span(role=Stage.PUBLISH, step=8, start=14.0, end=17.0)


def test_several_steps_without_a_trainable_token_are_an_error_that_says_so(make: Any) -> None:
    chosen = method(SampledTokens(), SampledReverseKL(), weights={"nothing": Nothing([1, 2, 3])})
    bench = Bench(make)
    with pytest.raises(BaseExceptionGroup) as caught:
        asyncio.run(bench.run(chosen, 9))
    assert "no token to train" in str(leaves(caught.value)[0]) and len(bench.records) == 3
