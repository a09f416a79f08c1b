"""A run in the terminal: one panel that is redrawn, or plain lines where the terminal cannot be redrawn."""

from collections import deque
from collections.abc import Mapping, Sequence
from math import isfinite
from time import monotonic
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launch.artifacts.evaluation_point import NOT_MEASURED, EvaluatedModel, EvaluationPoint
from launch.monitors.step_metrics import PHASE_NAMES, UTILIZATION, Meter
from opd.loop.train import StepRecord

SIGNALS = {"distill/reverse_kl": "reverse KL", "reward/mean": "reward", "actor/loss": "loss"}
"""What tells best whether a run learns: the first of these that the method has."""

NOTHING = "nothing trained"

PHASES = {
    "rollout": ("rollout", "blue"),
    "score": ("score", "yellow"),
    "train": ("train", "green"),
    "publish": ("publish", "magenta"),
}
_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 36  # characters of the progress bar, the phase bar and the curve


class LiveView:
    """Terminal view: step, signal, accuracy, speed, seconds per phase and time left.

    On a terminal it is a panel that stays at the bottom while other output scrolls above it. Elsewhere (a log
    file, a pipe) it prints a line every `print_every` steps, at the first and last one and per evaluation. Alerts
    (`opd.observability.alerts`) stand in the panel while they last, elsewhere as a line when they begin.
    """

    def __init__(self, *, title: str, steps: int, meter: Meter, console: Console, print_every: int = 10) -> None:
        self._title, self._steps, self._meter = title, steps, meter
        self._console, self._print_every = console, print_every
        self._live = Live(self, console=console, refresh_per_second=2) if console.is_terminal else None
        self._metrics: Mapping[str, float] = {}
        self._signal: deque[float] = deque(maxlen=_WIDTH)
        self._students: dict[str, EvaluationPoint] = {}  # the newest on each evaluation set
        self._teachers: dict[str, EvaluationPoint] = {}
        self._began = self._last = monotonic()
        self._seen = 0

    async def __call__(self, record: StepRecord) -> None:
        if not self._seen:
            # Steps only: what came before the first one (loading, evaluating) does not come again.
            self._began = monotonic() - record.seconds["step"]
        self._metrics = self._meter(record)
        self._seen += 1
        self._last = monotonic()
        if name := _signal_name(self._metrics):
            self._signal.append(self._metrics[name])
        if self._live is not None:
            self._live.update(self)
        elif record.step in (1, self._steps) or record.step % self._print_every == 0:
            self._print(self._line())
        if self._live is None:
            for alert in self._meter.news:
                self._print(f"alert at step {record.step}: {alert.sentence}")

    def evaluated(self, result: EvaluationPoint) -> None:
        """Show the newest accuracies on each set (the teacher's stay beside them)."""
        (self._teachers if result.examinee is EvaluatedModel.TEACHER else self._students)[result.set] = result
        if self._live is None:
            where = "teacher" if result.examinee is EvaluatedModel.TEACHER else f"student at step {result.step}"
            where += f" on {result.set}" if result.set else ""
            self._print(f"evaluated {where}: {_results(result)}")

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state on the screen."""
        if self._live is not None:
            self._live.stop()

    def __rich__(self) -> Panel:
        body = Group(self._progress(), Text(), self._figures()) if self._metrics else self._waiting()
        return Panel(body, title=Text(self._title, style="bold"), title_align="left", padding=(1, 2), expand=False)

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)

    def _waiting(self) -> Text:
        seconds = monotonic() - self._began
        return Text(f"waiting for the first of {self._steps} steps, {_clock(seconds)}", style="dim")

    def _progress(self) -> Table:
        step = int(self._metrics["step"])
        row = Table.grid(padding=(0, 2))
        row.add_row(
            Text.assemble("step ", (str(step), "bold"), f" / {self._steps}"),
            ProgressBar(total=self._steps, completed=step, width=_WIDTH, complete_style="cyan", finished_style="green"),
            Text.assemble((f"{_clock(self._left())} left", "bold"), f"  {_clock(monotonic() - self._began)} so far"),
        )
        return row

    def _figures(self) -> Table:
        metrics = self._metrics
        name = _signal_name(metrics)
        rows = Table.grid(padding=(0, 2))
        rows.add_column(style="dim", justify="right")
        rows.add_column(min_width=58)
        label, value = (SIGNALS[name], _number(metrics[name])) if name else ("loss", NOTHING)
        rows.add_row(label, Text.assemble((value, "bold"), "  ", (_sparkline(self._signal), "cyan")))
        rows.add_row("accuracy", self._accuracies())
        rows.add_row(
            "completions",
            f"{metrics.get('perf/throughput', 0.0):,.0f} tokens/s, mean length "
            f"{metrics.get('response_length/mean', 0.0):.1f}, "
            f"{metrics.get('response_length/clip_ratio', 0.0):.0%} cut by the limit",
        )
        rows.add_row("a step", _phase_bar(metrics))
        rows.add_row("", _phase_words(metrics))
        if busy := busy_words(metrics):
            rows.add_row("busy", busy)
        rows.add_row(
            "so far",
            f"{_si(metrics['tokens/completion'])} tokens, {_si(metrics['flops/total'])}FLOP, "
            f"{metrics['cpu/total_s']:,.0f} cpu s",
        )
        for alert in self._meter.alerts:
            rows.add_row(Text("alert", style="bold red"), Text(alert.sentence, style="red"))
        return rows

    def _accuracies(self) -> Text:
        text = Text()
        for name, point in self._students.items():
            text.append("\n" if text else "")
            text.append(f"{name}: " if name else "", style="dim")
            text.append(_accuracy(point), style="bold").append(f"  at step {point.step}", style="dim")
            if name in self._teachers:
                text.append(f"\nteacher: {_accuracy(self._teachers[name])}", style="dim")
        return text or Text("not evaluated yet", style="dim")

    def _line(self) -> str:
        metrics = self._metrics
        name = _signal_name(metrics)
        parts = [
            f"step {int(metrics['step'])}/{self._steps}",
            f"{SIGNALS[name]} {_number(metrics[name])}" if name else NOTHING,
            *self._graded(),
            f"{metrics.get('perf/throughput', 0.0):,.0f} tokens/s",
            f"{_phase_words(metrics).plain}",
            f"{_clock(self._left())} left",
            f"{metrics['cpu/total_s']:,.0f} cpu s",
        ]
        return " | ".join(parts)

    def _graded(self) -> list[str]:
        """Accuracies of the set that stands for the run, where there are any."""
        first = next(iter(self._students.values()), None)
        return [] if first is None or (first.greedy is None and first.mean_at_k is None) else [_accuracy(first)]

    def _left(self) -> float:
        """Time left, from the mean pace so far, evaluations included."""
        return (self._last - self._began) / max(1, self._seen) * (self._steps - int(self._metrics["step"]))


def _signal_name(metrics: Mapping[str, float]) -> str:
    """Name of the metric shown as the signal; "" for a step in which no token had a weight."""
    return next((name for name in SIGNALS if name in metrics), "")


def _accuracy(result: EvaluationPoint) -> str:
    if result.set:  # a sampler of its own: every measure under its full name
        shares = [f"{name.replace('_at_', '@')} {estimate.value:.1%}" for name, estimate in result.estimates.items()]
        return ", ".join(shares) or NOT_MEASURED
    shares = [
        f"{label} {value:.1%}"
        for label, value in (("greedy", result.greedy), ("sampled", result.mean_at_k))
        if value is not None
    ]
    shares += [f"{task} {value:.1%}" for task, value in result.mean_at_k_by_task.items()]
    return ", ".join(shares) or NOT_MEASURED


def _results(result: EvaluationPoint) -> str:
    """Accuracy of the newest evaluation, or else its other measurements."""
    if result.greedy is not None or result.mean_at_k is not None:
        return _accuracy(result)
    return f"accuracy {NOT_MEASURED}" + ("" if result.reverse_kl is None else f", reverse KL {result.reverse_kl:.4f}")


def _phases(metrics: Mapping[str, float]) -> dict[str, float]:
    return {phase: metrics.get(PHASE_NAMES[phase], 0.0) for phase in PHASES}


def _phase_bar(metrics: Mapping[str, float]) -> Text:
    """One colored block per phase, as wide as its share."""
    seconds = _phases(metrics)
    total = sum(seconds.values()) or 1.0
    edges, sofar = [0], 0.0
    for value in seconds.values():
        sofar += value
        edges.append(round(sofar / total * _WIDTH))
    blocks = zip(PHASES.values(), edges, edges[1:], strict=False)
    return Text.assemble(*[("█" * (stop - start), color) for (_, color), start, stop in blocks])


def _phase_words(metrics: Mapping[str, float]) -> Text:
    seconds = _phases(metrics)
    text = Text(f"{metrics['perf/step_s']:.2f} s: ")
    for position, (phase, (label, color)) in enumerate(PHASES.items()):
        text.append(", " if position else "")
        text.append(f"{label} {seconds[phase]:.2f}", style=color)
    return text


def busy_words(metrics: Mapping[str, float]) -> str:
    """Utilization in words, e.g. `rollout 97 %, teacher 41 %, publish 2 %, bubbles 34 %`; "" where it is not known."""
    shares = {role.value: metrics[name] for role, name in UTILIZATION.items() if name in metrics}
    if "perf/bubble_frac" in metrics:
        shares["bubbles"] = metrics["perf/bubble_frac"]
    if "perf/fraction_of_limit" in metrics:
        shares["of the limit"] = metrics["perf/fraction_of_limit"]
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())


def _sparkline(values: Sequence[float] | deque[float]) -> str:
    """One character per value; `!` where it is not a number, so that it is seen."""
    numbers = [value for value in values if isfinite(value)]
    low = min(numbers, default=0.0)
    step = (max(numbers, default=0.0) - low) / (len(_BARS) - 1) or 1.0
    return "".join(_BARS[round((value - low) / step)] if isfinite(value) else "!" for value in values)


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _si(value: float) -> str:
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} "
