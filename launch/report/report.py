"""A run as one page: results at the start and now, curves, and sample completions."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from markupsafe import Markup
from matplotlib.figure import Figure

from launch.artifacts.evaluation_point import NOT_MEASURED, EvaluationPoint
from launch.artifacts.run_data import RunData
from launch.artifacts.run_directory import RunDirectory, write_bytes, write_text
from launch.artifacts.samples import Sample
from launch.monitors.step_metrics import UTILIZATION
from launch.report.curves import draw_sheet, panels
from launch.report.figures import Margins, Panel, short_number, to_png, to_svg
from launch.report.next_steps import next_steps
from launch.report.page import render_report
from launch.report.set_tables import set_tables
from opd.observability.alerts import first_raised

STRONGLY = 2.0  # nats from which a token's gap is underlined
_VISIBLE = 0.05  # nats below which a token is not colored
_SHOWN = 4  # samples of the first and of the last recorded step
_ABSENT = "–"
_SIZE = (5.0, 2.8)  # inches of a picture with letters of 9 points: on a phone, where it is 350 pixels wide, 9 pixels
_MARGINS = Margins(left=0.095, right=0.725, bottom=0.17, top=0.96)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    name: str
    cells: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Picture:
    title: str
    note: str
    svg: Markup


@dataclass(frozen=True, slots=True, kw_only=True)
class _Token:
    text: str
    space: str = ""
    side: str = ""
    alpha: str = "0"
    title: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _ShownSample:
    step: int
    version: int
    length: int
    ending: str
    answer: str
    verdict: str
    verdict_class: str
    prompt: str
    tokens: tuple[_Token, ...]
    cut: bool


def write_report(directory: RunDirectory, notes: Sequence[str] = ()) -> None:
    """Write `report.html` and `curves.png` from the contents of the directory; same content, same files.

    Works on a run that is still going or was killed. `notes` are shown before those of the summary.
    """
    data = RunData.read(directory)
    drawn = panels(data)
    if drawn:
        rows = -(-len(drawn) // 2)
        write_bytes(directory.curves, to_png(partial(draw_sheet, drawn), 12.5, 3.1 * rows))
    pictures = [
        # One axes per picture. Markup: our own drawing, in which matplotlib has escaped every text.
        _Picture(
            title=panel.title,
            note=panel.note,
            svg=Markup(to_svg(partial(_draw_alone, panel), *_SIZE, f"panel{i}", _MARGINS)),
        )
        for i, panel in enumerate(drawn)
    ]
    summary = data.summary
    first, last = (data.student[0], data.student[-1]) if data.student else (None, None)
    samples = _chosen(data.samples)
    page = render_report(
        {
            "title": data.name,
            "outcome": summary.outcome.value if summary else "running",
            "subtitle": _subtitle(data),
            "error": summary.error if summary else "",
            "notes": [*notes, *(summary.notes if summary else ()), *_alerts(data)],
            "columns": _columns(first, last, data.teacher),
            "rows": _rows(first, last, data.teacher),
            "sets": set_tables(data),
            "facts": list(summary.facts.items()) if summary else [],
            "pictures": pictures,
            "samples": [_shown(sample) for sample in samples],
            "has_gaps": any(sample.gaps for sample in samples),
            "strongly": f"{STRONGLY:g}",
            "verdict": summary.verdict if summary else "",
            "busy": _busy(data),
            "spent": _spent(data),
            "ledger": _ledger(data),
            "versions": list(summary.versions.items()) if summary else [],
            "next_steps": next_steps(directory, summary),
            "command": directory.command.read_text().strip() if directory.command.exists() else "",
            "config": data.config,
        }
    )
    write_text(directory.report, page)


def _alerts(data: RunData) -> list[str]:
    """Alerts, from the metrics and not the summary, so that a run that was killed shows them too."""
    return [f"Alert at step {step}: {alert.sentence}." for step, alert in first_raised(data.metrics)]


def _draw_alone(panel: Panel, figure: Figure) -> None:
    panel.draw(figure.subplots())


def _subtitle(data: RunData) -> str:
    steps = len(data.metrics)
    if data.summary is None:
        return f"{steps} steps so far; this page was written while the run was going or after it was killed"
    return f"{data.summary.method}, {data.summary.steps} steps in {_duration(data.summary.wall_s)}"


def _columns(first: EvaluationPoint | None, last: EvaluationPoint | None, teacher: EvaluationPoint | None) -> list[str]:
    if first is None or last is None:
        return []
    if first is last:
        return [f"step {last.step}", *(["teacher"] if teacher else [])]
    return [f"step {first.step}", f"step {last.step}", *(["teacher", "gap closed"] if teacher else [])]


def _rows(first: EvaluationPoint | None, last: EvaluationPoint | None, teacher: EvaluationPoint | None) -> list[_Row]:
    """Rows of start, end and teacher, with the share of the gap that was closed; or of the only evaluation."""
    if first is None or last is None:
        return []
    alone = first is last
    wanted = (  # +1: more is better, -1: less is, 0: neither
        ("greedy", "Solved, greedy", ".1%", 1),
        ("mean_at_k", "Solved, sampled", ".1%", 1),
        *([("pass_at_k", f"Solved by any of {last.k} samples", ".1%", 1)] if first.k == last.k > 1 else []),
        ("reverse_kl", "Reverse KL (nats per token)", ".4f", -1),
        ("length_mean", "Completion length (tokens)", ".1f", 0),
        ("truncation_rate", "Cut by the token limit", ".1%", 0),
    )
    rows = []
    tasks = [
        (f"{field}_by_task.{task}", f"{name}: {task}", ".1%", 1)
        for field, name in (("greedy", "Solved, greedy"), ("mean_at_k", "Solved, sampled"))
        for task in last.greedy_by_task
    ]
    for field, name, form, sign in (*wanted, *tasks):
        start, end = _value(first, field), _value(last, field)
        goal = None if teacher is None else _value(teacher, field)
        if start is None and end is None:
            if field in ("greedy", "mean_at_k"):
                rows.append(_Row(name=name, cells=(NOT_MEASURED,) * len(_columns(first, last, teacher))))
            continue
        cells = [_format(value, form) for value in ([end] if alone else [start, end])]
        if teacher is not None:
            cells += [_format(goal, form), *([] if alone else [_closed(start, end, goal, sign) if sign else ""])]
        rows.append(_Row(name=name, cells=tuple(cells)))
    return rows


def _value(point: EvaluationPoint, field: str) -> float | None:
    """A field, or one task's share: `greedy`, `greedy_by_task.shop`."""
    name, _, task = field.partition(".")
    return getattr(point, name).get(task) if task else getattr(point, name)


def _format(value: float | None, form: str) -> str:
    if value is None:
        return _ABSENT
    text = format(value, form)
    return text.removeprefix("-") if not text.strip("-0.%") else text  # -0.0000 is 0


def _closed(start: float | None, end: float | None, goal: float | None, sign: int) -> str:
    """Share of the way from the start to the teacher, where the teacher is better."""
    if start is None or end is None or goal is None or sign * (goal - start) <= 0:
        return ""
    return f"{(end - start) / (goal - start):.0%}"


def _chosen(samples: Sequence[Sample]) -> list[Sample]:
    """Samples of the first and of the last recorded step."""
    if not samples:
        return []
    first, last = samples[0].step, samples[-1].step
    early = [s for s in samples if s.step == first][:_SHOWN]
    late = [s for s in samples if s.step == last][:_SHOWN]
    return early if first == last else early + late


def _shown(sample: Sample) -> _ShownSample:
    gaps: Sequence[float] = sample.gaps or [0.0] * len(sample.tokens)
    return _ShownSample(
        step=sample.step,
        version=sample.version,
        length=sample.length,
        ending="ended by itself" if sample.stop == "end" else "cut by the limit",
        answer=sample.answer,
        verdict="" if sample.reward is None else f"reward {sample.reward:g}",
        verdict_class="good" if sample.reward else "bad",
        prompt=sample.prompt,
        tokens=tuple(_token(text, gap) for text, gap in zip(sample.tokens, gaps, strict=True)),
        cut=sample.length > len(sample.tokens),
    )


def _token(text: str, gap: float) -> _Token:
    if abs(gap) < _VISIBLE:
        return _Token(text=text)
    side = "up" if gap > 0 else "down"
    word = text.lstrip()
    return _Token(
        space=text[: len(text) - len(word)],  # not colored: the color must stand on the word
        text=word,
        side=f"{side} strongly" if abs(gap) > STRONGLY else side,
        alpha=f"{min(1.0, abs(gap) / 3) * 0.6:.2f}",
        title=f"teacher minus student: {gap:+.2f} nats",
    )


def _spent(data: RunData) -> list[tuple[str, str]]:
    wanted = (
        ("completion tokens written", "tokens/completion", ""),
        ("prompt tokens", "tokens/prompt", ""),
        ("tokens read by the teacher", "tokens/scored", ""),
        ("tokens trained on", "tokens/trained", ""),
        ("operations (model)", "flops/total", "FLOP"),
        ("processor time", "cpu/total_s", "s"),
    )
    spent = [(label, data.last(name), unit) for label, name, unit in wanted]
    return [
        (label, f"{short_number(value)}{unit if value >= 1000 else ' ' + unit}".strip())
        for label, value, unit in spent
        if value is not None
    ]


def _busy(data: RunData) -> list[tuple[str, str]]:
    """Utilization over the run; while it goes on, over its last steps."""
    known = data.summary.utilization if data.summary else {}
    wanted = (
        *((f"{role.value} busy", name) for role, name in UTILIZATION.items()),
        ("bubbles", "perf/bubble_frac"),
        ("overlap efficiency", "perf/overlap_efficiency"),
        ("of the limit", "perf/fraction_of_limit"),
    )
    found = [(label, known.get(name, data.last(name))) for label, name in wanted]
    return [(label, f"{value:.1%}") for label, value in found if value is not None]


def _ledger(data: RunData) -> list[tuple[str, str]]:
    if data.summary is not None:
        return [(name, f"{count:,}") for name, count in data.summary.ledger.items()]
    names = [name for name in (data.metrics[-1] if data.metrics else {}) if name.startswith("ledger/")]
    return [(name.removeprefix("ledger/"), f"{data.last(name) or 0:,.0f}") for name in names]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
