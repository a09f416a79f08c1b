"""A finished step as named numbers; where other trainers have a name for a number, it is kept."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from launch.monitors.accounting import Costs, Totals, process_tree_cpu_seconds, step_tokens
from opd.loop.train import StepRecord
from opd.loss.metrics import compression, repetition
from opd.observability.alerts import Alert, AlertThresholds, raised
from opd.observability.spans import Stage
from opd.observability.utilization import DeviceCounts, Utilization, UtilizationLog, verdict
from opd.types import NO_VERSION, AdvantageScores, StopReason, Trajectory

OBJECTIVE_NAMES = {
    "entropy": "actor/entropy",
    "pg_clipfrac": "actor/pg_clipfrac",
    "ratio": "training/ratio",
    "ratio_truncated": "training/ratio_truncated",
    "probs_diff": "training/rollout_probs_diff_mean",
    "probs_diff_max": "training/rollout_probs_diff_max",
    "logprob_gap": "training/rollout_logprob_gap_mean",
    "logprob_gap_max": "training/rollout_logprob_gap_max",
}
"""Metrics of an objective that have a well-known name; any other `x` becomes `distill/x`."""

REPETITIVE = 10.0
"""The compression ratio above which a completion counts as repetitive (StableOPD, arXiv 2604.08527)."""

PHASE_NAMES = {
    "rollout": "timing_s/gen",
    "score": "timing_s/score",
    "train": "timing_s/update_actor",
    "publish": "timing_s/param_sync",
    "wait": "timing_s/wait",
}

UTILIZATION = {role: f"perf/utilization_{role.value}" for role in Stage}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """Context that a step's own record lacks: totals up to and including it, and processor seconds."""

    totals: Totals
    cpu_s: float


def step_metrics(record: StepRecord, context: StepContext) -> dict[str, float]:
    """All metrics of a step. A quantity that does not exist for the method at hand is absent, never 0."""
    trajectories = [item.trajectory for item in record.scored]
    return {
        "step": record.step,
        **_learning(record),
        **_staleness(record.step, trajectories),
        **_left_out(record),
        **_lengths(trajectories),
        **_repetition(trajectories),
        **_rewards(record),
        **_speed(record.seconds, sum(len(t) for t in trajectories)),
        "weights/version": record.published.version,
        "weights/sentinel_gap": record.published.gap,
        "weights/nbytes": record.published.nbytes,
        **{f"ledger/{name.replace(' ', '_')}": count for name, count in record.ledger.items()},
        **context.totals.as_metrics(),
        "cpu/total_s": context.cpu_s,
    }


def _learning(record: StepRecord) -> dict[str, float]:
    report = record.report
    if not report.trained_tokens:  # the step was skipped
        return {}
    named = {OBJECTIVE_NAMES.get(n, f"distill/{n}"): v for n, v in report.metrics.items()}
    # Where an objective reports `loss`, it is the unweighted mean; what is minimized is `report.loss`.
    named.pop("distill/loss", None)
    learned = {"actor/loss": report.loss, "actor/grad_norm": report.grad_norm, "actor/lr": report.lr, **named}
    return learned | {"actor/skipped": 1.0} if report.skipped else learned


def _staleness(step: int, trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Staleness: step `s` trains version `s - 1`; a token the student wrote at an earlier version is stale by the
    difference.
    """
    versions = np.concatenate([t.versions for t in trajectories]) if trajectories else np.zeros(0)
    gaps = (step - 1) - versions[versions != NO_VERSION]
    if not len(gaps):
        return {}
    return {"sample/staleness_mean": float(gaps.mean()), "sample/staleness_max": float(gaps.max())}


def _left_out(record: StepRecord) -> dict[str, float]:
    """Share of the step's trajectories of which no token is trained: a filter's, or of weight 0."""
    if not record.weights:
        return {}
    return {"sample/left_out": float(np.mean([not np.any(w) for w in record.weights]))}


def _lengths(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    if not trajectories:
        return {}
    lengths = [len(t) for t in trajectories]
    return {
        "response_length/mean": float(np.mean(lengths)),
        "response_length/max": float(max(lengths)),
        "response_length/clip_ratio": float(np.mean([t.stop is StopReason.LENGTH for t in trajectories])),
    }


def _repetition(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Means over completions, and the share of them that a compressor calls repetitive."""
    written = [t.token_ids for t in trajectories if len(t)]
    if not written:
        return {}
    ratios = [compression(ids) for ids in written]
    return {
        "repetition/trigram_mean": float(np.mean([repetition(ids) for ids in written])),
        "repetition/compression_mean": float(np.mean(ratios)),
        "repetition/rate": float(np.mean([ratio > REPETITIVE for ratio in ratios])),
    }


def _rewards(record: StepRecord) -> dict[str, float]:
    """The mean over trajectories (a long one counts once); only where the scorer or an environment gave rewards."""
    rewards = [
        float(np.mean(item.scores.rewards))
        for item in record.scored
        if isinstance(item.scores, AdvantageScores) and len(item.scores.rewards)
    ] or [item.trajectory.reward for item in record.scored if item.trajectory.reward is not None]
    return {"reward/mean": float(np.mean(rewards))} if rewards else {}


def _speed(seconds: Mapping[str, float], completion_tokens: int) -> dict[str, float]:
    step_s = seconds["step"]
    phases = {PHASE_NAMES[name]: value for name, value in seconds.items() if name in PHASE_NAMES}
    if step_s <= 0:
        return {"perf/step_s": step_s, **phases}
    return {
        "perf/step_s": step_s,
        "perf/throughput": completion_tokens / step_s,
        "trainer/idle_ratio": seconds["wait"] / step_s,
        **phases,
    }


def usage_metrics(usage: Utilization, staffing: DeviceCounts) -> dict[str, float]:
    """Metrics of `opd.observability.utilization`; empty before the first step."""
    if usage.wall_s <= 0:
        return {}
    return {
        **{name: usage.utilization(role) for role, name in UTILIZATION.items()},
        "rollouter/idle_ratio": usage.idle(Stage.ROLLOUT),
        "perf/bubble_frac": usage.bubble(staffing.actors),
        "perf/overlap_efficiency": usage.overlap_efficiency,
        **({"perf/fraction_of_limit": usage.fraction_of_limit} if usage.limit_s else {}),
    }


class Meter:
    """Metrics of every step, computed once for all trackers, with the totals between steps.

    Share one meter among the trackers of a run. A resumed run passes the last kept line of its metrics file
    as `before`, so that totals and processor seconds go on from there. `read_cpu` decides what counts as the
    run's processor time; by default it is all that this process and its descendants have used.

    It also watches for the patterns of `opd.observability.alerts`: `alerts` are those of the last step read (each also
    the metric `alert/<name>` = 1), `news` those that were not raised at the step before, `ever` all of the run with
    their step.

    It also tracks utilization: every step has the figures of the last 20 settled steps, `usage` those of all, with
    `verdict` as a sentence. `limit` says how many seconds a step takes at least, where that is known. A resumed run
    begins anew here: its clock is another.
    """

    def __init__(
        self,
        costs: Costs,
        before: Mapping[str, float] | None = None,
        read_cpu: Callable[[], float] = process_tree_cpu_seconds,
        thresholds: AlertThresholds | None = None,
        staffing: DeviceCounts | None = None,
        limit: Callable[[StepRecord], float] | None = None,
    ) -> None:
        self._costs = costs
        self._read_cpu = read_cpu
        self._totals = Totals.from_metrics(before) if before else Totals()
        # What this process has used so far (imports, loading) belongs to the run; a resumed run adds to it.
        self._cpu_before = before["cpu/total_s"] if before else 0.0
        self._cpu_s = self._cpu_before
        self._step: int | None = None
        self._metrics: dict[str, float] = {}
        self._thresholds = thresholds or AlertThresholds()
        self._staffing = staffing or DeviceCounts()
        self._limit = limit
        self._usage = UtilizationLog(self._staffing.ahead)
        self._history: deque[Mapping[str, float]] = deque(maxlen=2 * self._thresholds.window)
        self.alerts: Sequence[Alert] = ()
        self.news: Sequence[Alert] = ()
        self.ever: dict[str, str] = {}

    def recall(self, lines: Sequence[Mapping[str, float]]) -> None:
        """Restore the alerts of a resumed run from its kept lines of metrics."""
        for line in lines:
            self._metrics, self._step = dict(line), int(line["step"])
            self._watch()

    def as_before(self) -> dict[str, float]:
        """State that a later meter takes as `before`."""
        return {**self._totals.as_metrics(), "cpu/total_s": self.cpu_seconds()}

    @property
    def totals(self) -> Totals:
        """Totals up to the last step read."""
        return self._totals

    @property
    def usage(self) -> dict[str, float]:
        """Utilization over all steps so far, under the names of the metrics; empty before the first."""
        return usage_metrics(self._usage.whole(), self._staffing)

    @property
    def verdict(self) -> str:
        """Verdict of all steps so far about the schedule, in a sentence; "" before the first."""
        return verdict(self._usage.whole(), self._staffing)

    def cpu_seconds(self) -> float:
        """Processor seconds of the run so far; never decreases."""
        self._cpu_s = max(self._cpu_s, self._cpu_before + self._read_cpu())
        return self._cpu_s

    def __call__(self, record: StepRecord) -> Mapping[str, float]:
        """The step's metrics. A second call for the same step counts nothing twice."""
        if record.step != self._step:
            costs = self._costs.of([item.trajectory for item in record.scored])
            self._totals = self._totals.plus(step_tokens(record, costs), costs)
            context = StepContext(totals=self._totals, cpu_s=self.cpu_seconds())
            self._clock(record)
            self._metrics = step_metrics(record, context) | usage_metrics(self._usage.recent, self._staffing)
            self._step = record.step
            self._watch()
        return self._metrics

    def _clock(self, record: StepRecord) -> None:
        """Update the clock of the log: a step ends when its weights are live, which is the end of its publish span."""
        if record.spans:
            end = max(span.end for span in record.spans)
            self._usage.add(
                end - record.seconds["step"], end, record.spans, self._limit(record) if self._limit else 0.0
            )

    def _watch(self) -> None:
        self._history.append(self._metrics)
        before = {alert.name for alert in self.alerts}
        self.alerts = raised(list(self._history), self._thresholds)
        self.news = [alert for alert in self.alerts if alert.name not in before]
        for alert in self.alerts:
            self.ever.setdefault(alert.name, f"step {self._step}: {alert.sentence}")
            self._metrics[f"alert/{alert.name}"] = 1.0
