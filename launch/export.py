"""The trained student as a Hugging Face folder with a model card that states the run's facts."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from launch.evaluation_point import EvaluationPoint
from launch.learner_restart import RestartingLearner
from launch.run_directory import RunDirectory, write_text
from opd.errors import ConfigurationError
from teacher_service.identity import check_checkpoint


async def export_student(
    learner: RestartingLearner, directory: RunDirectory, facts: Mapping[str, str], end: EvaluationPoint | None
) -> None:
    """Write `export/` of a run: weights, config, tokenizer, and the card."""
    await learner.export(directory.export)
    write_card(directory, facts, end)


def write_card(directory: RunDirectory, facts: Mapping[str, str], end: EvaluationPoint | None) -> None:
    """The card of the export; written again when the last evaluation is there."""
    write_text(directory.export / "README.md", _card(directory.name, facts, end))


def _card(name: str, facts: Mapping[str, str], end: EvaluationPoint | None) -> str:
    measured = {} if end is None else {k: v for k, v in end.as_json().items() if v not in (None, {})}
    lines = ["---", "library_name: transformers", "tags:", "- on-policy-distillation", "---", "", f"# {name}", ""]
    lines += ["A student trained by on-policy distillation with `opd`.", "", "| fact | value |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in facts.items()]
    if measured:
        lines += ["", "Held-out results at the end of training:", "", "| measure | value |", "|---|---|"]
        lines += [f"| {key} | {value} |" for key, value in measured.items()]
    return "\n".join(lines) + "\n"


def export_run(run: str, output: str) -> str:
    """`opd export`: copy a finished run's student to a new folder; an existing folder is never overwritten."""
    source = RunDirectory.open(Path(run)).export
    check_checkpoint(str(source), f"the export of run {run}")
    target = Path(output)
    if target.exists():
        raise ConfigurationError(f"output {output} exists and is never overwritten; choose another output=...")
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source, part)
    part.rename(target)
    return str(target)
