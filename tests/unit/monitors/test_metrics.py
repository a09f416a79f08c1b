"""Metrics and accounting: the right names, the right numbers, and nothing counted twice."""

import itertools
import subprocess
import sys
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from launch.monitors.accounting import Costs, StepTokens, Totals, process_tree_cpu_seconds, step_flops
from launch.monitors.step_metrics import Meter, StepContext, step_metrics
from opd.loop.train import StepRecord
from opd.observability.spans import Span, Stage
from opd.observability.utilization import DeviceCounts
from opd.ports import PublishReport
from opd.types import (
    NO_VERSION,
    AdvantageScores,
    Prompt,
    Scored,
    Scores,
    StepReport,
    StopReason,
    TokenScores,
    Trajectory,
)

OPD = Costs(student_params=10, teacher_params=100, teacher_writes=False, teacher_reads=True)
GRPO = Costs(student_params=10, teacher_params=100, teacher_writes=False, teacher_reads=False)
SFT = Costs(student_params=10, teacher_params=100, teacher_writes=True, teacher_reads=False)
REPEATS = (
    40 / len(zlib.compress(np.arange(10, dtype="<i4"))) + 80 / len(zlib.compress(np.arange(20, dtype="<i4")))
) / 2
SECONDS = {"rollout": 0.2, "score": 0.1, "wait": 0.3, "train": 0.15, "publish": 0.05, "step": 0.5}


def scored(length: int, version: int, scores: Scores, stop: StopReason = StopReason.END, hint: int = 0) -> Scored[Any]:
    prompt = Prompt(id="p", student_ids=np.arange(4, dtype=np.int32), teacher_ids=np.arange(4 + hint, dtype=np.int32))
    trajectory = Trajectory(
        prompt=prompt, sample=0, token_ids=np.arange(length, dtype=np.int32),
        behavior=TokenScores(logprobs=np.full(length, -1.0, dtype=np.float32)),
        loss_mask=np.ones(length, dtype=bool), versions=np.full(length, version, dtype=np.int32), stop=stop,
    )  # fmt: skip
    return Scored(trajectory=trajectory, scores=scores)


def said(length: int) -> TokenScores:
    return TokenScores(logprobs=np.full(length, -0.5, dtype=np.float32))


def graded(length: int, reward: float) -> AdvantageScores:
    return AdvantageScores(
        advantages=np.zeros(length, dtype=np.float32), rewards=np.full(length, reward, dtype=np.float32)
    )


def record(
    *items: Scored[Any], step: int = 5, metrics: Mapping[str, float] | None = None, seconds: Mapping = SECONDS
) -> StepRecord:
    completion = sum(len(item.trajectory) for item in items)
    return StepRecord(
        step=step,
        scored=list(items),
        weights=[np.ones(len(item.trajectory)) for item in items],
        report=StepReport(
            loss=0.7, grad_norm=1.5, lr=2e-3, tokens=completion + 4 * len(items), trained_tokens=completion,
            metrics=metrics or {},
        ),
        published=PublishReport(version=step, gap=1e-6, nbytes=1000),
        ledger={"issued": 10, "trained": 9, "dropped": 1, "dropped/weight 0": 1, "outstanding": 0},
        seconds=seconds,
    )  # fmt: skip


def context() -> StepContext:
    return StepContext(totals=Totals(completion=30, flops=1e6), cpu_s=12.0)


def test_every_number_of_a_distillation_step() -> None:
    step = record(
        scored(10, 4, said(10)), scored(20, 2, said(20), StopReason.LENGTH),
        metrics={
            "reverse_kl": 0.3, "entropy": 0.2, "ratio": 1.01, "probs_diff": 0.02, "teacher_mass": 0.9,
            "logprob_gap": 0.1, "logprob_gap_max": 0.4,
        },
    )  # fmt: skip
    assert step_metrics(step, context()) == pytest.approx(
        {
            "step": 5,
            "actor/loss": 0.7, "actor/grad_norm": 1.5, "actor/lr": 2e-3, "actor/entropy": 0.2,
            "distill/reverse_kl": 0.3, "distill/teacher_mass": 0.9,
            "training/ratio": 1.01, "training/rollout_probs_diff_mean": 0.02,
            "training/rollout_logprob_gap_mean": 0.1, "training/rollout_logprob_gap_max": 0.4,
            "sample/staleness_mean": 20 * 2 / 30, "sample/staleness_max": 2, "sample/left_out": 0,
            "response_length/mean": 15, "response_length/max": 20, "response_length/clip_ratio": 0.5,
            "repetition/trigram_mean": 0, "repetition/rate": 0,
            "repetition/compression_mean": REPEATS,
            "perf/step_s": 0.5, "perf/throughput": 60, "trainer/idle_ratio": 0.6,
            "timing_s/gen": 0.2, "timing_s/score": 0.1, "timing_s/update_actor": 0.15,
            "timing_s/param_sync": 0.05, "timing_s/wait": 0.3,
            "weights/version": 5, "weights/sentinel_gap": 1e-6, "weights/nbytes": 1000,
            "ledger/issued": 10, "ledger/trained": 9, "ledger/dropped": 1, "ledger/dropped/weight_0": 1,
            "ledger/outstanding": 0,
            "tokens/prompt": 0, "tokens/completion": 30, "tokens/scored": 0, "tokens/trained": 0,
            "tokens/generated": 0, "tokens/learned": 0, "flops/total": 1e6, "cpu/total_s": 12.0,
        }
    )  # fmt: skip


def working(step: int, start: float) -> StepRecord:
    """10 s from `start`: 4 of rollout, 2 of teacher, 3 of learner, 1 of publishing."""
    ends = list(itertools.accumulate([4.0, 2.0, 3.0, 1.0], initial=start))
    spans = [
        Span(role=role, step=step, start=a, end=b) for role, (a, b) in zip(Stage, itertools.pairwise(ends), strict=True)
    ]
    plain = record(scored(10, step - 1, said(10)), step=step, seconds=SECONDS | {"step": 10.0})
    return replace(plain, spans=spans)


def test_who_was_busy_is_a_metric_of_every_step_and_a_sentence_at_the_end() -> None:
    meter = Meter(OPD, read_cpu=lambda: 0.0, limit=lambda record: 2.5)
    assert meter.usage == {} and meter.verdict == ""
    for step in (1, 2, 3):
        metrics = meter(working(step, 100.0 * step))  # 90 s between steps are nobody's
    busy = {name: value for name, value in metrics.items() if name in meter.usage}
    assert busy == pytest.approx(meter.usage)
    assert busy == pytest.approx(
        {
            "perf/utilization_rollout": 0.4, "perf/utilization_teacher": 0.2, "perf/utilization_learner": 0.3,
            "perf/utilization_publish": 0.1, "rollouter/idle_ratio": 0.5, "perf/bubble_frac": 1 - (5 + 2 + 4) / 30,
            "perf/overlap_efficiency": 0.4, "perf/fraction_of_limit": 0.25,
        }
    )  # fmt: skip
    assert meter.verdict.startswith("rollout-bound: the learner waited 60 % of the time")


def test_figures_of_a_run_ahead_wait_until_all_work_is_known() -> None:
    meter = Meter(OPD, read_cpu=lambda: 0.0, staffing=DeviceCounts(ahead=2))
    seen = ["perf/bubble_frac" in meter(working(step, 10.0 * step)) for step in (1, 2, 3)]
    assert seen == [False, False, True]
    assert "perf/fraction_of_limit" not in meter.usage


def test_rewards_count_a_trajectory_once_however_long() -> None:
    metrics = step_metrics(record(scored(1, 4, graded(1, 1.0)), scored(99, 4, graded(99, 0.0))), context())
    assert metrics["reward/mean"] == pytest.approx(0.5)
    assert "distill/reverse_kl" not in metrics


def test_what_does_not_exist_is_absent() -> None:
    metrics = step_metrics(record(scored(10, NO_VERSION, Scores())), context())
    absent = ("sample/staleness", "reward/", "distill/", "training/")
    assert not [name for name in metrics if name.startswith(absent)]


def test_what_a_filter_leaves_out_is_a_share_of_trajectories() -> None:
    step = record(*(scored(3, 4, said(3)) for _ in range(4)))
    weights = [np.ones(3), np.zeros(3), np.array([0.0, 0.5, 0.0]), np.zeros(3)]
    assert step_metrics(replace(step, weights=weights), context())["sample/left_out"] == 0.5


def test_a_loss_among_the_metrics_does_not_hide_the_loss() -> None:
    metrics = step_metrics(record(scored(3, 4, said(3)), metrics={"loss": 9.0}), context())
    assert metrics["actor/loss"] == 0.7
    assert "distill/loss" not in metrics


def test_a_step_that_took_no_time_divides_by_nothing() -> None:
    metrics = step_metrics(record(scored(3, 4, said(3)), seconds=dict.fromkeys(SECONDS, 0.0)), context())
    assert metrics["perf/step_s"] == 0
    assert "perf/throughput" not in metrics


@pytest.mark.parametrize(("costs", "per_token"), [(OPD, 8 * 10 + 2 * 100), (GRPO, 8 * 10), (SFT, 6 * 10 + 2 * 100)])
def test_operations_per_token(costs: Costs, per_token: int) -> None:
    scored_tokens, student = 50 * costs.teacher_reads, 50 * (not costs.teacher_writes)
    tokens = StepTokens(
        prompt=20, completion=30, generated=30, student=student, scored=scored_tokens, learned=50, trained=30
    )
    assert step_flops(tokens, costs) == 50 * per_token


def test_of_mixed_text_only_the_student_s_is_written_by_it_and_ages() -> None:
    mixed = record(scored(10, 2, said(10)), scored(30, NO_VERSION, said(30)), step=5)
    assert step_metrics(mixed, context())["sample/staleness_mean"] == 2
    for costs, others in ((OPD, 0), (replace(OPD, teacher_writes=True), 34 * 2 * 100)):
        meter = Meter(costs, read_cpu=lambda: 0.0)
        meter(mixed)
        assert meter.totals.flops == 14 * 2 * 10 + others + 48 * 2 * 100 + 48 * 6 * 10


def test_a_privileged_teacher_reads_its_own_context() -> None:
    meter = Meter(OPD, read_cpu=lambda: 0.0)
    meter(record(scored(10, 4, said(10), hint=6)))
    assert meter.totals == Totals(
        prompt=4,
        completion=10,
        scored=20,
        trained=10,
        generated=10,
        learned=14,
        flops=14 * 2 * 10 + 20 * 2 * 100 + 14 * 6 * 10,
    )


def test_the_meter_counts_a_step_once_however_many_ask() -> None:
    meter = Meter(OPD, read_cpu=lambda: 3.0)
    first = record(scored(10, 0, said(10)), step=1)
    assert meter(first) is meter(first)
    assert meter.totals.completion == 10
    meter(record(scored(10, 1, said(10)), step=2))
    assert meter.totals.completion == 20


def test_a_resumed_run_goes_on_counting() -> None:
    meter = Meter(OPD, read_cpu=lambda: 3.0)
    before = meter(record(scored(10, 0, said(10)), step=1))
    resumed = Meter(OPD, before=before, read_cpu=lambda: 5.0)
    after = resumed(record(scored(10, 1, said(10)), step=2))
    assert after["tokens/completion"] == 20
    assert after["flops/total"] == 2 * before["flops/total"]
    assert after["cpu/total_s"] == 8.0


def test_processor_seconds_never_go_back() -> None:
    readings = iter([5.0, 4.0, 6.0])
    meter = Meter(OPD, read_cpu=lambda: next(readings))
    assert [meter.cpu_seconds() for _ in range(3)] == [5.0, 5.0, 6.0]


def test_processor_seconds_of_children_count_also_when_they_have_ended() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    before = process_tree_cpu_seconds()
    subprocess.run([sys.executable, "-c", burn], check=True)
    assert process_tree_cpu_seconds() - before >= 0.25


def test_a_completion_that_loops_is_counted_as_repetitive() -> None:
    looping = scored(400, 4, said(400))
    object.__setattr__(looping.trajectory, "token_ids", np.tile(np.arange(4, dtype=np.int32), 100))
    metrics = step_metrics(record(looping, scored(100, 4, said(100)), scored(90, 4, said(90))), context())
    assert metrics["repetition/rate"] == pytest.approx(1 / 3)
    assert metrics["repetition/trigram_mean"] == pytest.approx((1 - 4 / 398) / 3)
