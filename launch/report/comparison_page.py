"""A comparison as a page, a picture, JSON, Markdown, and a table in the terminal."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from markupsafe import Markup
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from launch.artifacts.run_directory import write_bytes, write_json, write_text
from launch.report.comparison import Arm, Goal, SideBySide, read_arms
from launch.report.comparison_figure import draw
from launch.report.comparison_table import Cells, arms_table, as_json, as_markdown, runs_table
from launch.report.figures import SERIES, short_number, to_png, to_svg
from launch.report.page import render_comparison


def write_comparison(root: Path, arms: Sequence[Arm], goal: Goal, console: Console, notes: Sequence[str] = ()) -> None:
    """Write `comparison.html`, `.png`, `.json` and `.md` into `root`, and print the table.

    Can be repeated at any time: it reads nothing but the run directories.
    """
    sides = read_arms(arms, goal, notes)
    picture = partial(draw, sides=sides)
    write_bytes(root / "comparison.png", to_png(picture, 13.0, 4.3))
    write_json(root / "comparison.json", as_json(root.name, sides))
    write_text(root / "comparison.md", as_markdown(root.name, sides))
    tables = [arms_table(sides), runs_table(sides)]
    page = render_comparison(
        {
            "title": root.name,
            "subtitle": _subtitle(sides),
            "notes": sides.notes,
            # Markup: our own drawing, in which matplotlib has escaped every text.
            "svg": Markup(to_svg(picture, 11.6, 4.0, "comparison")),
            "tall": Markup(to_svg(partial(picture, tall=True), 5.0, 9.0, "tall")),
            "caption": _caption(sides),
            "tables": tables,
        }
    )
    write_text(root / "comparison.html", page)
    show_table(tables[0], console)
    for note in sides.notes:
        console.print(note, soft_wrap=True, markup=False, highlight=False)
    console.print(f"page: {root / 'comparison.html'}", soft_wrap=True, markup=False, highlight=False)


def _subtitle(sides: SideBySide) -> str:
    seeds = {len(sides.of(label)) for label in sides.labels}
    goal = sides.goal
    budget = f"; {short_number(goal.amount)} {goal.axis.title} for every run" if goal.amount else ""
    return f"{', '.join(sides.labels)}; {' or '.join(map(str, sorted(seeds)))} seeds each{budget}"


def _caption(sides: SideBySide) -> str:
    reference = sides.goal.reference
    target = f"where {reference} ended on average" if sides.goal.target is None else "the accuracy to reach"
    band = "; shaded: from the least to the greatest seed" if len(sides.labels) <= len(SERIES) else ""
    return (
        f"Held-out accuracy of samples at temperature 1. Lines: mean over seeds{band}. Dotted: {target}. "
        "Dashed: the teacher, if it was measured. Horizontal axes are logarithmic, with the start apart."
    )


_LEAST = 5  # letters of a folded column that stay beside each other


def show_table(cells: Cells, console: Console) -> None:
    """Print a table."""
    printed = Table(
        title=cells.title,
        caption=cells.note,
        caption_justify="left",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for i, column in enumerate(cells.columns):
        least = min(_LEAST, max(len(row[i]) for row in (cells.columns, *cells.rows)))
        side = "left" if i == 0 else "right"
        printed.add_column(column, justify=side, no_wrap=i in cells.whole, overflow="fold", min_width=least)
    for row in cells.rows:
        printed.add_row(*row)
    console.print(printed)
