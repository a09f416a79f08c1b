"""Gradability of the reference answers: counted when a run is planned, and shown with an example."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from rich.progress import track

from launch.artifacts import terminal
from launch.config.run_config import RunConfig
from launch.config.settings import place_of
from launch.inputs.graders import make_grader
from launch.plan.checks.survey import Survey
from opd.errors import ConfigurationError, DataError
from opd.ports import Answered, NamesAnswers, ReadsReferences, References, Sources

NO_ANSWERS = "no reference answers; accuracy is not measured"
MANY = 5_000  # rows whose reading is shown, because it takes more than a second


def check_answers(config: RunConfig, sources: Sources, held_out: Mapping[str, Survey]) -> dict[str, str]:
    """Remarks about the answers, by the name of the prompts that have them or lack them.

    Raises:
        DataError: more of a file's answers are unreadable than `max_unreadable_answers` allows.
        ConfigurationError: maj@k is asked for where a grader cannot tell which answers are equal.
    """
    _check_votes(config, held_out)
    sentences: dict[str, str] = {}
    for place, source in (("prompts", config.prompts), *config.evaluation.sources.items()):
        found = source.references(replace(sources, place=place)) if isinstance(source, Answered) else ()
        sentences |= {references.place: _sentence(references, config) for references in found}
    for name, found in held_out.items():
        if found.unanswered.count == found.seen and all(needs_answer(config, task) for task in found.tasks):
            sentences[place_of(name)] = NO_ANSWERS
    return sentences


def _check_votes(config: RunConfig, held_out: Mapping[str, Survey]) -> None:
    for name, one in config.evaluation.by_name.items():
        for task, where in held_out[name].tasks.items() if one.maj_at else ():
            part = config.graders.get(task)
            if part is None or not isinstance(make_grader(task, part), NamesAnswers):
                raise ConfigurationError(
                    f"evaluation.sets.{name}.maj_at counts equal answers, but the grader of task {task!r} ({where}) "
                    f"names none ({type(part).__name__ if part else 'an environment'} has no `named`); set "
                    f"evaluation.sets.{name}.maj_at=[]"
                )


def needs_answer(config: RunConfig, task: str) -> bool:
    """Whether completions of this task can be graded only against a reference answer. An environment needs none."""
    return task in config.graders and bool(getattr(make_grader(task, config.graders[task]), "needs_answer", True))


def _sentence(references: References, config: RunConfig) -> str:
    total, found = len(references.answers), unreadable(references, config.graders)
    if not found:
        return f"{total} reference answers, all readable"
    where, answer, why = found[0]
    counted = f"{len(found)} of {total} reference answers cannot be read, e.g. {where}: {answer[:60]!r} ({why})"
    if len(found) > references.allowed * total:
        raise DataError(
            f"{references.place}: {counted}; task {references.task!r} would grade every answer to them 0; correct or "
            f"remove them, or raise {references.place}.max_unreadable_answers (now {references.allowed:g})"
        )
    return counted


def unreadable(references: References, graders: Mapping[str, object]) -> list[tuple[str, str, str]]:
    """Answers that the task's grader cannot read: file and line, answer, reason."""
    if references.task not in graders:  # an environment's
        return []
    grader = make_grader(references.task, graders[references.task])
    try:
        if not isinstance(grader, ReadsReferences):
            return []
        distinct = dict.fromkeys(answer for _, answer in references.answers)
        why = {answer: grader.unreadable(answer) for answer in _shown(distinct)}
    finally:
        grader.close()
    return [(where, answer, why[answer]) for where, answer in references.answers if why[answer]]


def _shown(answers: dict[str, None]) -> Iterable[str]:
    if len(answers) < MANY:
        return answers
    return track(answers, "reading reference answers", console=terminal.console(stderr=True), transient=True)
