"""A sweep as a page, a picture, JSON, Markdown, and a table in the terminal."""

from functools import partial
from pathlib import Path

from markupsafe import Markup
from rich.console import Console

from launch.artifacts.run_directory import write_bytes, write_json, write_text
from launch.report.comparison_page import show_table
from launch.report.comparison_table import markdown
from launch.report.figures import SERIES, to_png, to_svg
from launch.report.page import render_comparison
from launch.report.sweep_figure import draw
from launch.report.sweep_table import Sweep, as_json, notes, read_sweep, tables


def write_sweep(root: Path, console: Console) -> None:
    """Write `sweep.html`, `.png`, `.json` and `.md` into the directory of a sweep, and print its table.

    Can be repeated at any time, also while it goes on: it reads nothing but the directories of the runs.
    """
    sweep = read_sweep(root)
    picture, cells, sentences = partial(draw, sweep=sweep), tables(sweep), notes(sweep)
    write_bytes(root / "sweep.png", to_png(picture, 13.0, 4.3))
    write_json(root / "sweep.json", as_json(sweep))
    write_text(root / "sweep.md", markdown(sweep.name, sentences, cells))
    page = render_comparison(
        {
            "title": sweep.name,
            "subtitle": f"sweep of {', '.join(sweep.settings)}; {len(sweep.runs)} runs",
            "notes": sentences,
            # Markup: our own drawing, in which matplotlib has escaped every text.
            "svg": Markup(to_svg(picture, 11.6, 4.0, "sweep")),
            "tall": Markup(to_svg(partial(picture, tall=True), 5.0, 9.0, "tall")),
            "caption": _caption(sweep),
            "tables": cells,
        }
    )
    write_text(root / "sweep.html", page)
    show_table(cells[0], console)
    for sentence in sentences:
        console.print(sentence, soft_wrap=True, markup=False, highlight=False)
    console.print(f"page: {root / 'sweep.html'}", soft_wrap=True, markup=False, highlight=False)


def _caption(sweep: Sweep) -> str:
    seeds = "Lines: mean over seeds, shaded from the least to the greatest. " if sweep.seeded else ""
    many = f"In color: the {len(SERIES)} that ended best. " if len(sweep.arms) > len(SERIES) else ""
    numbers = "Numbers: those of the table. " if sweep.numbered else ""
    teacher = "Dashed: the teacher. " if sweep.teacher is not None else ""
    return f"Held-out problems; accuracy is that of samples at temperature 1. {seeds}{many}{numbers}{teacher}".strip()
