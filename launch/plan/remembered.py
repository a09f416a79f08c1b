"""Files and commits that a process remembers, so that all plans and steps of one command see the same content."""

from launch.inputs.few_shot import read_examples
from launch.inputs.prompt_files import reading
from launch.plan import hub
from launch.plan.checks.survey import survey_once
from launch.plan.memory.shapes import read_shape

REMEMBERED = (reading, read_examples, survey_once, read_shape)
"""Functions that keep what they have read of a path."""


def forget() -> None:
    """Forget all of it, for the next command of the same process: a file may have been written anew."""
    for function in REMEMBERED:
        function.cache_clear()
    hub.forget()
