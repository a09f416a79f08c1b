"""Asynchrony on the real loop: bounded per token, repeatable if asked, and nothing is lost when an engine lags."""

import asyncio
import gc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from opd import ports
from opd.errors import ConfigurationError
from opd.loop.ledger import Ledger
from opd.loop.rollout_buffer import BufferedStep, RolloutBuffer
from opd.loop.staleness import StalenessSchedule, WeightUpdate
from opd.objectives.sampled import LogprobSource, SampledReverseKL
from opd.objectives.vocabulary import FullReverseKL
from opd.observability.spans import Span, Stage
from opd.rollouts.student import StudentRollout, TeacherRollout
from opd.scorers.teacher import SampledTokens, TeacherHidden, Unscored
from opd.types import NO_VERSION, nbytes
from tests.unit.loop.test_loop import GROUP, SHORT, Bench, Likelihood, Model, Pause, TableLearner, log_softmax, method

FULL = method(TeacherHidden(), FullReverseKL())


@given(
    staleness=st.integers(0, 5), start=st.integers(0, 9), every=st.integers(0, 7), step=st.integers(0, 60),
    deterministic=st.booleans(),
)  # fmt: skip
def test_the_schedule_is_bounded_and_never_waits_for_itself(
    staleness: int, start: int, every: int, step: int, deterministic: bool
) -> None:
    schedule = StalenessSchedule(max_staleness=staleness, deterministic=deterministic, barrier_every=every)
    step += start
    min_version = schedule.min_version(step, start)
    assert start <= min_version <= step and step - min_version <= staleness
    assert min_version <= schedule.min_version(step + 1, start)
    if (
        deterministic and every
    ):  # no text is written across a checkpoint, and what is written does not depend on `start`
        last = max(step - step % every, start)
        assert min_version >= last
        assert min_version == schedule.min_version(step, last)
    elif step - staleness >= start:
        assert min_version == step - staleness


def test_a_schedule_without_room_is_refused() -> None:
    wrongs: list[Any] = [{"max_staleness": -1}, {"max_buffer_bytes": 0}, {"barrier_every": -1}]
    for wrong in wrongs:
        with pytest.raises(ConfigurationError, match="the staleness schedule needs"):
            StalenessSchedule(**wrong)


@pytest.mark.parametrize(
    ("versions", "why"),
    [
        ([7, 7, 7], ""),
        ([5, 7, 7], "stale"),  # the newest token is young enough, the oldest is not
        ([7, 7, 5], "stale"),
        ([6, 7, NO_VERSION], ""),
        ([NO_VERSION] * 3, ""),
        ([6, 7, 9], "unknown weights"),  # never published
        ([6, 6, 8], "unknown weights"),  # published, but with other weights
    ],
)
def test_the_bound_holds_for_every_token_and_every_version_must_be_known(
    make: Any, versions: list[int], why: str
) -> None:
    published = {v: f"w{v}" for v in range(5, 9)}
    text = make.trajectory(
        [1],
        [2, 3, 4],
        versions=np.array(versions, np.int32),
        digests=published | {8: "others", 9: "w9", NO_VERSION: ""},
    )
    assert StalenessSchedule(max_staleness=2).reject_reason(text, 8, published | {NO_VERSION: ""}) == why


def gaps(bench: Bench) -> list[int]:
    """How far behind every token was when it was trained."""
    return [
        record.step - 1 - int(version)
        for record in bench.records
        for item in record.scored
        for version in item.trajectory.versions
    ]


@dataclass
class InFlight(Model):
    """Writes a few tokens, gives way, and goes on with whatever weights it has then, as an engine does."""

    async def generate(self, requests: Sequence[ports.GenerateRequest]) -> list[ports.Completion]:
        pieces: list[list[ports.Completion]] = []
        sampling, left = requests[0].sampling, requests[0].sampling.max_tokens
        for _ in range(4):
            now = [replace(r, sampling=replace(sampling, max_tokens=left // 4)) for r in requests]
            pieces.append(await super().generate(now))
            requests = [
                replace(r, context_ids=np.append(r.context_ids, c.token_ids))
                for r, c in zip(requests, pieces[-1], strict=True)
            ]
        return [
            replace(
                parts[-1],
                token_ids=np.concatenate([p.token_ids for p in parts]),
                versions=np.concatenate([p.versions for p in parts]),
                behavior=type(parts[0].behavior).concat([p.behavior for p in parts]),
            )
            for parts in zip(*pieces, strict=True)
        ]


@pytest.mark.parametrize(
    ("steps", "update"),
    [
        (60, WeightUpdate.DRAIN),
        (250, WeightUpdate.IN_FLIGHT),
        pytest.param(1000, WeightUpdate.IN_FLIGHT, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("max_staleness", [0, 1, 2, 4])
def test_over_steps_of_random_delays_no_token_is_staler_than_allowed(
    make: Any, steps: int, max_staleness: int, update: WeightUpdate
) -> None:
    bench = Bench(make, wait=Pause(max_staleness, turns=6), lr=0.0)
    bench.prompts.prompts_per_step, bench.prompts.group_size = 2, 2
    if update is WeightUpdate.IN_FLIGHT:
        student = InFlight(bench.student.table, wait=Pause(7, turns=4))
        bench.engines = replace(bench.engines, student=student)
    ledger = asyncio.run(bench.run(SHORT, steps, max_staleness=max_staleness, update=update))
    found = gaps(bench)
    assert min(found) >= 0 and max(found) == max_staleness
    mixed = [len(set(i.trajectory.versions.tolist())) > 1 for r in bench.records for i in r.scored]
    assert any(mixed) == (update is WeightUpdate.IN_FLIGHT and max_staleness > 0), "drained text has one version"
    assert ledger.trained == 2 * 2 * steps and not ledger.requeued and not ledger.dropped


def losses(bench: Bench) -> list[float]:
    return [record.report.loss for record in bench.records]


@pytest.mark.parametrize("every", [0, 3])
@pytest.mark.parametrize("max_staleness", [0, 1, 2, 4])
def test_deterministic_runs_are_bit_equal_whatever_the_speeds(make: Any, max_staleness: int, every: int) -> None:
    runs = []
    for seed in range(4):
        bench = Bench(make, wait=Pause(seed, turns=40), lr=4.0)
        asyncio.run(bench.run(SHORT, 12, deterministic=True, max_staleness=max_staleness, barrier_every=every))
        runs.append((losses(bench), bench.learner.table))
        assert max(gaps(bench)) == min(max_staleness, every - 1 if every else max_staleness)
        versions = [{int(v) for i in r.scored for v in i.trajectory.versions} for r in bench.records]
        assert all(len(of_step) == 1 for of_step in versions)
    for other, table in runs[1:]:
        assert other == runs[0][0]
        assert bool((table == runs[0][1]).all())


@dataclass
class FollowedLearner(TableLearner):
    """Its teacher takes every version in, too, which changes what it says (as `teacher.mixup` does)."""

    reader: Any = None

    async def publish(self, student: Any, version: int) -> ports.PublishReport:
        report = await super().publish(student, version)
        self.reader.table = log_softmax(0.5 * torch.as_tensor(self.reader.table) + 0.5 * self.table)
        return report


@pytest.mark.parametrize("follows", [True, False])
@pytest.mark.parametrize("max_staleness", [1, 2])
def test_what_a_teacher_says_that_follows_the_student_does_not_depend_on_speeds(
    make: Any, max_staleness: int, follows: bool
) -> None:
    """`follows=False` is the witness: the pipeline is not told, and text is read before or after the teacher moves."""
    runs = set()
    for seed in range(4):
        bench = Bench(make, wait=Pause(seed, turns=40), lr=4.0)
        own, reader = bench.learner, bench.engines.teachers["default"]
        bench.learner = FollowedLearner(own.table, own.teacher, own.lr, own.wait, reader=reader)
        chosen = method(SampledTokens(), SampledReverseKL(signal=LogprobSource.STUDENT))
        options = {"max_staleness": max_staleness, "teacher_follows": follows}
        asyncio.run(bench.run(chosen, 12, deterministic=True, **options))
        runs.add(tuple(losses(bench)))
    assert (len(runs) == 1) == follows


def test_without_it_they_differ(make: Any) -> None:
    """The witness of the test above: the same delays do change an asynchronous run that is not deterministic."""
    runs = set()
    for seed in range(6):
        bench = Bench(make, wait=Pause(seed, turns=40), lr=4.0)
        student = InFlight(bench.student.table, wait=Pause(seed, turns=40))
        bench.engines = replace(bench.engines, student=student)
        asyncio.run(bench.run(SHORT, 12, deterministic=False, max_staleness=2))
        runs.add(tuple(losses(bench)))
    assert len(runs) > 1


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_run_that_is_stopped_at_any_step_and_resumed_is_the_uninterrupted_run(make: Any, max_staleness: int) -> None:
    every, steps = 2, 12
    options = {"deterministic": True, "max_staleness": max_staleness, "barrier_every": every}
    whole = Bench(make, wait=Pause(0), lr=4.0)
    ledger = asyncio.run(whole.run(FULL, steps, **options))
    for kill in range(1, steps + 1):
        first, saved = Bench(make, wait=Pause(kill), lr=4.0), {}

        async def save(record: Any, first: Bench = first, saved: dict = saved, kill: int = kill) -> None:
            if record.step % every == 0:
                saved[0] = (record.step, first.learner.table.clone(), first.ledger.to_json())
            if record.step == kill:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            asyncio.run(first.run(FULL, steps, save, **options))
        second = Bench(make, wait=Pause(100 + kill), lr=4.0)
        start, account = 0, Ledger()
        if saved:
            start, second.learner.table, text = saved[0]
            second.student.table = log_softmax(second.learner.table)
            account = Ledger.from_json(text)
            account.reopen()
        end = asyncio.run(second.run(FULL, steps, start=start, ledger=account, **options))
        assert losses(first)[:start] + losses(second) == losses(whole), f"killed after step {kill}"
        assert bool((second.learner.table == whole.learner.table).all())
        assert (end.issued, end.trained, end.outstanding) == (ledger.issued, ledger.trained, 0)


@dataclass
class Laggard(Model):
    """An engine that says it took the new weights and did not: it serves those of `behind` updates ago."""

    behind: int = 0
    until: int = 10**9
    asked: int = 0

    async def generate(self, requests: Sequence[ports.GenerateRequest]) -> list[ports.Completion]:
        self.asked += 1
        behind = self.behind if self.asked <= self.until and self.version else 0  # there is none before the first
        return [replace(c, versions=c.versions - behind) for c in await super().generate(requests)]


def bench_with(make: Any, student: Callable[[Bench], Model]) -> Bench:
    bench = Bench(make)
    bench.engines = replace(bench.engines, student=student(bench))
    return bench


def test_text_of_an_engine_that_missed_an_update_is_written_again(make: Any) -> None:
    def lagging_for_a_while(bench: Bench) -> Laggard:
        return Laggard(bench.student.table, behind=1, until=5)

    bench = bench_with(make, lagging_for_a_while)
    ledger = asyncio.run(bench.run(SHORT, 5))
    assert max(gaps(bench)) == 0
    assert ledger.requeued["stale"] == 2 * GROUP  # the second step's two groups ...
    assert ledger.dropped["stale"] == 1 * GROUP  # ... of which one came back stale once more
    assert ledger.trained == 5 * 2 * GROUP - GROUP and ledger.outstanding == 0


@dataclass
class LaggingInPart(Model):
    """An engine that missed the newest update for some samples of step 1: those of `old`, by prompt and attempt."""

    old: Mapping[str, Sequence[set[int]]] = field(default_factory=dict)
    attempts: Counter[str] = field(default_factory=Counter)

    async def generate(self, requests: Sequence[ports.GenerateRequest]) -> list[ports.Completion]:
        prompt = requests[0].prompt_id
        old = self.old[prompt][self.attempts[prompt]] if prompt in self.old else set()
        self.attempts[prompt] += 1
        return [replace(c, versions=c.versions - (i in old)) for i, c in enumerate(await super().generate(requests))]


SOME = st.sets(st.integers(0, GROUP - 1))


@settings(max_examples=40, deadline=None)
@given(first=st.tuples(SOME, SOME), second=st.tuples(SOME, SOME))
@example(first=({3}, set()), second=({3}, set()))
@example(first=(set(), {0}), second=(set(), set()))
@example(first=({0}, {9}), second=(set(range(GROUP)), set(range(GROUP))))
def test_a_group_is_written_again_whole_if_any_sample_of_it_is_too_old(
    make: Any, first: tuple[set[int], set[int]], second: tuple[set[int], set[int]]
) -> None:
    """... and what is too old once more is dropped sample by sample."""
    old = {f"1/{2 + i}": [once, again] for i, (once, again) in enumerate(zip(first, second, strict=True))}
    bench = bench_with(make, lambda bench: LaggingInPart(bench.student.table, old=old))
    ledger = asyncio.run(bench.run(SHORT, 3))
    again = {prompt: bool(sets[0]) for prompt, sets in old.items()}
    dropped = sum(len(sets[1]) for prompt, sets in old.items() if again[prompt])
    assert max(gaps(bench)) == 0
    assert {prompt: bench.engines.student.attempts[prompt] == 2 for prompt in old} == again
    assert ledger.requeued.get("stale", 0) == GROUP * sum(again.values())
    assert ledger.dropped.get("stale", 0) == dropped and ledger.outstanding == 0
    assert ledger.trained == 3 * 2 * GROUP - dropped
    assert [len(record.scored) for record in bench.records] == [2 * GROUP, 2 * GROUP - dropped, 2 * GROUP]


def test_text_that_comes_back_stale_is_dropped_with_the_reason_and_never_trained(make: Any) -> None:
    bench = bench_with(make, lambda bench: Laggard(bench.student.table, behind=1))
    with pytest.raises(BaseExceptionGroup):  # three steps without anything to train are an error
        asyncio.run(bench.run(SHORT, 5))
    assert bench.learner.steps == 1, "the first step, before which there was nothing to miss"
    assert bench.ledger.dropped["stale"] == bench.ledger.requeued["stale"] == 3 * 2 * GROUP


def test_text_of_weights_that_nobody_published_is_dropped(make: Any) -> None:
    bench = bench_with(make, lambda bench: Laggard(bench.student.table, behind=-7))
    with pytest.raises(BaseExceptionGroup):
        asyncio.run(bench.run(SHORT, 5))
    assert bench.learner.steps == 1 and bench.ledger.dropped["unknown weights"] == 3 * 2 * GROUP


def test_a_teacher_s_text_has_no_age(make: Any) -> None:
    bench = Bench(make)
    asyncio.run(bench.run(method(Unscored(), Likelihood(), rollout=TeacherRollout(max_tokens=8)), 4))
    assert {int(v) for r in bench.records for i in r.scored for v in i.trajectory.versions} == {NO_VERSION}
    assert bench.learner.steps == 4


def test_backpressure_holds_back_what_staleness_would_allow(make: Any) -> None:
    asked = {}
    for limit in (1, 4 << 30):
        bench = Bench(make, wait=Pause(1))
        ahead: list[int] = []

        async def look(record: Any, bench: Bench = bench, ahead: list[int] = ahead) -> None:
            for _ in range(60):
                await asyncio.sleep(0)
            ahead.append(max(bench.prompts.asked) + 1 - record.step)

        asyncio.run(bench.run(SHORT, 12, look, max_staleness=4, max_buffer_bytes=limit))
        asked[limit] = max(ahead[5:8])  # before, the size of a step was not known
    assert asked == {1: 0, 4 << 30: 4}


def test_a_step_is_begun_while_less_than_the_bound_is_held_or_expected(make: Any) -> None:
    """All steps are alike large, so that what is expected is known to the byte."""
    most = {}
    for spare in (-1, 0, 1):
        bench = Bench(make)
        held: list[int] = []

        async def look(record: Any, bench: Bench = bench, held: list[int] = held) -> None:
            await asyncio.sleep(0.01)
            held.append(max(bench.prompts.asked) + 2 - record.step)  # this one, and those that wait for it

        size = 2 * _nbytes_of_a_step(make) + spare
        asyncio.run(bench.run(SHORT, 24, look, max_staleness=9, max_buffer_bytes=size))
        most[spare] = max(held[14:18])
    assert most == {-1: 2, 0: 2, 1: 3}


def _nbytes_of_a_step(make: Any) -> int:
    bench = Bench(make)
    asyncio.run(bench.run(SHORT, 1))
    return sum(nbytes(item) for item in bench.records[0].scored)


@pytest.mark.parametrize("prompts", [1, 3])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{"deterministic": True}, {"update": WeightUpdate.DRAIN}, {}], ids=str)
def test_draining_finishes_all_text_of_a_step_before_new_weights_arrive(
    make: Any, options: Any, seed: int, prompts: int
) -> None:
    """Of an engine that goes on with whatever weights it has; without draining its text is of several versions."""
    bench = Bench(make, wait=Pause(seed), lr=0.0)
    bench.prompts.prompts_per_step = prompts
    student = InFlight(bench.student.table, wait=Pause(seed, turns=9))
    bench.engines = replace(bench.engines, student=student)

    async def run() -> None:
        await asyncio.wait_for(bench.run(SHORT, 30, max_staleness=2, **options), 60)  # it could wait for ever

    asyncio.run(run())
    mixed = [len(set(item.trajectory.versions.tolist())) > 1 for record in bench.records for item in record.scored]
    assert any(mixed) is (not options) and len(bench.records) == 30


@pytest.mark.parametrize("options", [{"deterministic": True}, {"update": WeightUpdate.DRAIN}, {}], ids=str)
def test_a_step_without_prompts_holds_up_nothing(make: Any, options: Any) -> None:
    bench = Bench(make, wait=Pause(1))
    bench.prompts = _Without(bench.prompts, {1, 4})

    async def run() -> Ledger:
        return await asyncio.wait_for(bench.run(SHORT, 6, max_staleness=2, **options), 60)  # it could wait for ever

    ledger = asyncio.run(run())
    assert [len(record.scored) for record in bench.records] == [2 * GROUP, 0, 2 * GROUP, 2 * GROUP, 0, 2 * GROUP]
    assert (ledger.issued, ledger.trained, bench.learner.steps) == (4 * 2 * GROUP, 4 * 2 * GROUP, 4)


class _Without:
    """A source of prompts that has none for some steps."""

    def __init__(self, of: Any, empty: set[int]) -> None:
        self.of, self.empty, self.group_size = of, empty, GROUP

    def __call__(self, step: int, sources: Any) -> list[Any]:
        return [] if step in self.empty else self.of(step, sources)


@dataclass(frozen=True, kw_only=True)
class Lazy(StudentRollout):
    """Leaves out samples 1 and 4 of every group."""

    async def __call__(self, group: Sequence[Any], context: Any) -> list[Any]:
        return [t for t in await StudentRollout.__call__(self, group, context) if t.sample not in (1, 4)]


@pytest.mark.parametrize("deterministic", [True, False])
def test_what_a_rollout_was_asked_for_and_did_not_write_is_dropped_with_that_reason(
    make: Any, deterministic: bool
) -> None:
    bench = Bench(make)
    lazy = method(SampledTokens(), SampledReverseKL(), rollout=Lazy(max_tokens=8))
    ledger = asyncio.run(bench.run(lazy, 3, deterministic=deterministic))
    assert ledger.dropped == {"not written": 3 * 2 * 2} and ledger.outstanding == 0
    assert ledger.generated == ledger.trained == 3 * 2 * (GROUP - 2)


def test_nothing_new_is_begun_between_draining_and_new_weights(make: Any) -> None:
    bench = Bench(make)

    async def look() -> list[bool]:
        schedule = StalenessSchedule(deterministic=False, update=WeightUpdate.DRAIN, max_staleness=5)
        sources = ports.Sources(tokenizer=bench.engines.tokenizer, rows=lambda path, columns: ())
        collector = RolloutBuffer(
            SHORT, bench.prompts, sources, ports.Context.of(bench.engines, step=0, steps=9, seed=0), Ledger(), schedule
        )
        seen = [collector._may_begin(3)]
        await collector.drained(1)
        seen.append(collector._may_begin(3))
        await collector.advance(1, BufferedStep(step=0, began=0.0, prompts=[]))
        return [*seen, collector._may_begin(3), collector._may_begin(7)]

    assert asyncio.run(look()) == [True, False, True, False]


def test_what_was_trained_is_let_go(make: Any) -> None:
    def collected() -> int:
        return sum(type(one) is BufferedStep for one in gc.get_objects())

    bench = Bench(make)
    gc.collect()
    held, of_others = list[int](), collected()

    async def look(record: Any) -> None:
        bench.records.clear()  # they hold the text as well
        if record.step % 4 == 0:  # looking at every object of a process takes a second
            held.append(collected() - of_others)

    asyncio.run(bench.run(SHORT, 12, look, max_staleness=1))
    assert len(held) == 3 and max(held) <= 4


@pytest.mark.parametrize(
    ("staleness", "deterministic", "every", "repeating"),
    [
        (0, True, 0, range(10)),
        (0, False, 0, range(10)),
        (2, False, 3, ()),
        (2, True, 0, ()),
        (2, True, 3, (0, 3, 6, 9)),
        (2, True, 4, (0, 4, 8)),
    ],
)
def test_which_checkpoints_a_run_goes_on_from_as_if_it_had_not_stopped(
    staleness: int, deterministic: bool, every: int, repeating: Sequence[int]
) -> None:
    schedule = StalenessSchedule(max_staleness=staleness, deterministic=deterministic, barrier_every=every)
    assert [step for step in range(10) if schedule.resumes_exactly(step)] == list(repeating)
    assert schedule.min_version(0) == 0
    anywhere = not (deterministic and every)
    assert [step for step in range(10) if schedule.may_checkpoint(step)] == [
        step for step in range(10) if anywhere or step in repeating
    ]


def test_when_a_step_was_generated_and_scored() -> None:
    """The last of all groups counts, in whatever order they came; a step without any took no time."""
    spans = [
        Span(role=role, step=1, start=1.0, end=end)
        for role, end in [(Stage.ROLLOUT, 4.0), (Stage.TEACHER, 9.0), (Stage.ROLLOUT, 3.0), (Stage.TEACHER, 7.0)]
    ]
    rollouts = BufferedStep(step=0, began=1.0, prompts=[], spans=spans)
    assert (rollouts.generated_at, rollouts.scored_at) == (4.0, 9.0)
    nothing = BufferedStep(step=0, began=1.0, prompts=[])
    assert (nothing.generated_at, nothing.scored_at) == (1.0, 1.0)
