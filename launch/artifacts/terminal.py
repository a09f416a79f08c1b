"""Consoles of the program: names, paths and sentences that are printed are text, never markup or emoji codes."""

from rich.console import Console


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console that prints `[red]x` and `:smile:` as they are; style is given by `rich.text.Text` alone.

    In a notebook it prints plain lines: each would be an output of its own there otherwise.
    """
    return Console(stderr=stderr, quiet=quiet, markup=False, emoji=False, force_jupyter=False)
