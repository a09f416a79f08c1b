"""Alerts: known failure patterns of a run, recognized from its metrics.

Pure functions of the history of step metrics (the newest last, under their logged names). The patterns are
published; the thresholds are ours, chosen to be quiet on healthy runs, and fields of `AlertThresholds`. A pattern whose
metrics a method does not log is never raised.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from opd.errors import ConfigurationError

Line = Mapping[str, float | int | None]

_OVERLAP = ("distill/overlap_ratio", "distill/support_overlap")


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertThresholds:
    """Thresholds of the alerts. All defaults are ours; only `truncation` has been used elsewhere (5 %).

    Means of the last `window` steps are compared with the `window` steps before them. `overlap_fall` is absolute
    (0.05: from 0.90 to 0.85), `*_rise` are factors; so is `departure`, of the reverse KL. Floors keep small numbers
    from counting: `length_floor` in tokens, `gap_floor`, `entropy_floor` and `reverse_kl_floor` in nats per token. A
    truncation rate below `still_falling` times that of before is mending itself. `certainty` is a reverse KL over the
    student's entropy. `repetition` is the share of repetitive completions.
    """

    window: int = 20
    overlap_fall: float = 0.05
    entropy_rise: float = 1.2
    grad_norm_rise: float = 1.5
    length_rise: float = 1.3
    length_floor: float = 16.0
    truncation: float = 0.05
    still_falling: float = 0.8
    repetition: float = 0.05
    gap_rise: float = 2.0
    gap_floor: float = 0.02
    entropy_floor: float = 0.02
    reverse_kl_rise: float = 1.2
    reverse_kl_floor: float = 0.1
    certainty: float = 10.0
    departure: float = 1.5

    def __post_init__(self) -> None:
        rises = self.entropy_rise, self.grad_norm_rise, self.length_rise, self.gap_rise, self.departure
        if self.window < 1 or min(rises) <= 1:
            raise ConfigurationError(f"alerts need window >= 1 and rises above 1 (they are factors), but got {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """A pattern in the newest metrics. `sentence`: the observation, its usual meaning, and advice."""

    name: str
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    before: float
    now: float

    @property
    def factor(self) -> float:
        return self.now / self.before if self.before > 0 else 1.0


def raised(history: Sequence[Line], thresholds: AlertThresholds | None = None) -> list[Alert]:
    """The alerts at the newest step of `history`, of which the last `2 * window` steps are read."""
    thresholds = thresholds or AlertThresholds()
    seen = history[-2 * thresholds.window :]
    found = [(name, pattern(seen, thresholds)) for name, pattern in _PATTERNS.items()]
    return [Alert(name=name, sentence=sentence) for name, sentence in found if sentence is not None]


def first_raised(history: Sequence[Line], thresholds: AlertThresholds | None = None) -> list[tuple[int, Alert]]:
    """Every alert of a whole run with the step at which it was first raised."""
    thresholds, found = thresholds or AlertThresholds(), dict[str, tuple[int, Alert]]()
    for end in range(1, len(history) + 1):
        for alert in raised(history[max(0, end - 2 * thresholds.window) : end], thresholds):
            found.setdefault(alert.name, (int(history[end - 1].get("step") or end), alert))
    return list(found.values())


def _values(lines: Sequence[Line], name: str) -> list[float]:
    return [value for line in lines if (value := line.get(name)) is not None and isfinite(value)]


def _change(history: Sequence[Line], name: str, window: int) -> _Change | None:
    """Means of the older and the newer window; None unless both are known at half of their steps at least."""
    older, newer = _values(history[:-window], name), _values(history[-window:], name)
    if len(history) < 2 * window or 2 * min(len(older), len(newer)) < window:
        return None
    return _Change(before=sum(older) / len(older), now=sum(newer) / len(newer))


def _mean(history: Sequence[Line], name: str, window: int) -> float | None:
    """The mean of the last window; None before it is full."""
    values = _values(history[-window:], name)
    return sum(values) / window if len(values) == window else None


def _collapse(history: Sequence[Line], thresholds: AlertThresholds) -> str | None:
    """Alert on late collapse (arXiv 2604.13016): falling overlap, rising entropy and gradient norm."""
    changes = (_change(history, name, thresholds.window) for name in _OVERLAP)
    overlap = next((change for change in changes if change is not None), None)
    entropy = _change(history, "actor/entropy", thresholds.window)
    norm = _change(history, "actor/grad_norm", thresholds.window)
    if overlap is None or entropy is None or norm is None:
        return None
    fell = overlap.before - overlap.now >= thresholds.overlap_fall
    if not fell or entropy.factor < thresholds.entropy_rise or norm.factor < thresholds.grad_norm_rise:
        return None
    return (
        f"student and teacher come apart: the overlap of their likeliest tokens fell from {overlap.before:.2f} to "
        f"{overlap.now:.2f} while entropy rose {entropy.factor:.1f}-fold and the gradient norm {norm.factor:.1f}-fold; "
        "this usually precedes a collapse on long completions: stop, go back to an earlier checkpoint, shorten "
        "max_tokens or lower learner.lr"
    )


def _inflation(history: Sequence[Line], thresholds: AlertThresholds) -> str | None:
    """Alert on abrupt length inflation, then truncation, then repetition (StableOPD, arXiv 2604.08527)."""
    length = _change(history, "response_length/mean", thresholds.window)
    if length is None or length.factor < thresholds.length_rise or length.now - length.before < thresholds.length_floor:
        return None
    return (
        f"completions grow: from {length.before:.0f} to {length.now:.0f} tokens in {2 * thresholds.window} steps; "
        "length inflation usually ends in truncated and repetitive text: look at samples.jsonl, mix in reference "
        "completions or keep the student close to its start, and do not let long answers dilute the loss"
    )


def _truncation(history: Sequence[Line], thresholds: AlertThresholds) -> str | None:
    """Alert on a share above the threshold that does not fall: a student that has yet to learn to stop is normal."""
    cut = _change(history, "response_length/clip_ratio", thresholds.window)
    if cut is None or cut.now <= thresholds.truncation or cut.now < thresholds.still_falling * cut.before:
        return None
    return (
        f"{cut.now:.0%} of the completions are cut by the token limit (alert above {thresholds.truncation:.0%}); the "
        "student then learns from texts without an end: raise max_tokens, shorten the prompts' task, or give cut "
        "completions weight 0"
    )


def _repetition(history: Sequence[Line], thresholds: AlertThresholds) -> str | None:
    rate = _mean(history, "repetition/rate", thresholds.window)
    if rate is None or rate <= thresholds.repetition:
        return None
    return (
        f"{rate:.0%} of the completions repeat themselves; teachers often find repetition likely, so the loss will not "
        "punish it: look at samples.jsonl, filter such completions, train from an earlier checkpoint"
    )


def _mismatch(history: Sequence[Line], thresholds: AlertThresholds) -> str | None:
    gap = _change(history, "training/rollout_logprob_gap_mean", thresholds.window)
    if gap is None or gap.factor < thresholds.gap_rise or gap.now < thresholds.gap_floor:
        return None
    return (
        f"engine and learner drift apart: the mean |log p - log mu| of sampled tokens grew from {gap.before:.3g} to "
        f"{gap.now:.3g} nats; weights may be stale or the engine's numerics differ where the student now is: check "
        "weights/version and weights/sentinel_gap, lower max_staleness, or use the same dtype in both"
    )


def _determinism(history: Sequence[Line], thresholds: AlertThresholds) -> str | None:
    """Alert on a student that always writes the same and is wrong: too high a learning rate does it (docs/log.md)."""
    entropy = _change(history, "actor/entropy", thresholds.window)
    divergence = _change(history, "distill/reverse_kl", thresholds.window)
    if entropy is None or divergence is None:
        return None
    wrong = divergence.now >= thresholds.reverse_kl_floor and divergence.factor >= thresholds.reverse_kl_rise
    rises = entropy.now <= thresholds.entropy_floor and wrong
    # A student that learns is certain where it agrees; of 41 healthy runs of the demo none had more than 6.8 times.
    apart = divergence.now >= max(thresholds.reverse_kl_floor, thresholds.certainty * entropy.now)
    if entropy.factor >= 1 or not (rises or apart):
        return None
    verb = "rose" if divergence.factor >= 1 else "went"
    return (
        f"the student becomes deterministic and wrong: entropy fell from {entropy.before:.3g} to {entropy.now:.3g} "
        f"nats per token while the reverse KL {verb} from {divergence.before:.3g} to {divergence.now:.3g}; lower "
        "learner.lr, warm up longer, or use a mass-covering loss (forward KL, JSD)"
    )


def _departure(history: Sequence[Line], thresholds: AlertThresholds) -> str | None:
    """Alert on a student that moves away from what it is to become: biased gradients do it (arXiv 2605.11182)."""
    divergence = _change(history, "distill/reverse_kl", thresholds.window)
    if divergence is None or divergence.now < thresholds.reverse_kl_floor or divergence.factor < thresholds.departure:
        return None
    if _determinism(history, thresholds) is not None:
        return None
    return (
        f"the student moves away from its teacher: the reverse KL rose from {divergence.before:.3g} to "
        f"{divergence.now:.3g} nats per token; unless a reward is what it is trained for, go back to an earlier "
        "checkpoint, lower learner.lr, and ask `opd certify` whether the gradient is that of the divergence"
    )


def _skipped(history: Sequence[Line], thresholds: AlertThresholds) -> str | None:
    """Alert on a step without a token to train, which has no loss."""
    recent = history[-thresholds.window :]
    count = sum("actor/loss" not in line for line in recent)
    if not count:
        return None
    return (
        f"{count} of the last {len(recent)} steps trained nothing, because no token had a weight above 0; generation "
        "and scoring were spent for nothing: loosen the filter in method.weights or ask more prompts per step"
    )


_PATTERNS: Mapping[str, Callable[[Sequence[Line], AlertThresholds], str | None]] = {
    "collapse": _collapse,
    "length_inflation": _inflation,
    "truncation": _truncation,
    "repetition": _repetition,
    "engine_learner_gap": _mismatch,
    "determinism": _determinism,
    "departure": _departure,
    "skipped_steps": _skipped,
}
