"""Consoles of the program: names, paths and sentences that are printed are text, never markup or emoji codes."""

import io
import sys
from typing import Any

from rich.console import Console


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console that prints `[red]x` and `:smile:` as they are; style is given by `rich.text.Text` alone.

    In a notebook it prints plain lines: each would be an output of its own there otherwise, and its kernel asks for
    colors by the environment, as if a terminal could be redrawn.
    """
    plain = False if in_notebook() else None
    return Console(stderr=stderr, quiet=quiet, markup=False, emoji=False, force_jupyter=False, force_terminal=plain)


def unseen(*, quiet: bool = False, record: bool = False, colored: bool = False, width: int | None = None) -> Console:
    """A console whose text goes nowhere: for what is rendered, or recorded and shown otherwise."""
    return Console(
        file=io.StringIO(),
        quiet=quiet,
        record=record,
        width=width,
        markup=False,
        emoji=False,
        force_terminal=colored,
        force_jupyter=False,
    )


def in_notebook() -> bool:
    """Whether this program is a notebook's kernel."""
    shell: Any = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None
