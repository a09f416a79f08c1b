"""The learning rate of a run in two lines of text."""

from collections.abc import Sequence

from learner.config import LearnerConfig, learning_rate

BLOCKS, PLAIN = "▁▂▃▄▅▆▇█", "_.-=+*#@"  # lowest to highest; the second where a terminal has no blocks
WIDEST = 72  # characters of a curve


def rate_curve(config: LearnerConfig, steps: int, width: int, levels: str = BLOCKS) -> tuple[str, str]:
    """First, largest and last rate, and the curve in at most `width` characters.

    Example: `("learning rate: LINEAR, first 0, greatest 0.001 at update 3, last 0.00025", "▁▅█▆▄▂")` of 6 steps.
    """
    count = max(1, min(steps, width, WIDEST))
    shown = [i * (steps - 1) // max(1, count - 1) for i in range(count)]
    turns = [min(steps - 1, max(0, turn)) for turn in (0, config.warmup_steps - 1, config.warmup_steps, steps - 1)]
    rates = {update: learning_rate(config, update, steps) for update in sorted({*shown, *turns})}
    top = max(rates, key=lambda update: rates[update])
    first, most, last = (f"{rates[update]:.3g}" for update in (0, top, steps - 1))
    caption = f"learning rate: {config.schedule.name}, first {first}, greatest {most} at update {top + 1}, last {last}"
    return caption, sparkline([rates[update] for update in shown], levels)


def sparkline(values: Sequence[float], levels: str = BLOCKS) -> str:
    """A character for each of `values` (none negative), as high as it is. Example: `sparkline([0, 1, 2])` is `▁▅█`."""
    most = max(values, default=0.0) or 1.0
    return "".join(levels[round(value / most * (len(levels) - 1))] for value in values)
