"""Checks of teachers against the method and the student."""

from hf.embeddings import find_embeddings
from hf.tokenizer_check import check_checkpoint, check_same_tokens, tokenizer_identity
from launch.config.run_config import DEFAULT, RunConfig, teacher_key
from launch.plan.checks.devices import writers_here
from launch.plan.checks.models import parameter_count, vocabulary_rows
from opd.errors import ConfigurationError
from opd.method.needs import needed
from opd.ports import LastHidden, Role
from opd.types import VocabularyScores
from teacher_service.config import REMOTE, Backend, TeacherConfig, check_supports


def check_adapters(config: RunConfig) -> None:
    """Refuse adapters beside a teacher that follows the student's whole weights."""
    following = [name for name, teacher in config.teachers.items() if teacher.mixup]
    if config.learner.lora.r and following:
        raise ConfigurationError(
            f"teacher {following[0]!r} follows the student's weights (mixup), but with learner.lora.r="
            f"{config.learner.lora.r} only adapters are published; set its mixup to 0, or learner.lora.r=0"
        )


def check_names(config: RunConfig) -> None:
    """Refusal of a term that is named like a teacher: metrics of both are `NAME/metric`."""
    if same := sorted(config.method.terms.keys() & config.teachers.keys()):
        raise ConfigurationError(
            f"method.terms.{same[0]} needs a name that no teacher has, since metrics of terms and of teachers are both "
            f"{same[0]}/reverse_kl and the like, but teacher {same[0]!r} has it; name the term otherwise"
        )


def check_embeddings(config: RunConfig) -> None:
    """Refuse a student's folder without the input embeddings that a part of the method compares tokens by."""
    if needed(config.method, Role.EMBEDDINGS):
        find_embeddings(config.student.path)


def _check_teacher(config: RunConfig, name: str, teacher: TeacherConfig) -> None:
    """The method's questions can be answered, and the weights are here if a part of the run reads them here."""
    requires, remote = config.method.requires, teacher.backend in REMOTE
    check_supports(teacher, requires, f"method {config.method.name}")
    if not remote or LastHidden in requires or name in writers_here(config):
        check_checkpoint(teacher.path, teacher_key(name))


def unread_notes(config: RunConfig) -> list[str]:
    """That a teacher is started which no part of the method reads."""
    if needed(config.method, Role.READER):
        return []
    return [
        f"note: no part of method {config.method.name} reads a teacher; {', '.join(config.teachers)} is started for "
        "the evaluations' reverse KL and the doctor"
    ]


def unmeasured_notes(config: RunConfig) -> list[str]:
    """That teachers are to be measured of which one cannot write: no weights are here, and its server only reads."""
    if not config.evaluation.teacher:
        return []
    mute = [
        name
        for name, teacher in config.teachers.items()
        if teacher.backend is Backend.HTTP and not parameter_count(teacher.path)
    ]
    return [
        f"note: teacher {name!r} at {config.teachers[name].url} scores and does not write, and its weights are not in "
        f"{config.teachers[name].path}, so no teacher is measured at the end; an endpoint that completes "
        "(teacher.backend=OPENAI) can be, evaluation.teacher=false leaves it out"
        for name in mute[:1]
    ]


def check_teachers(config: RunConfig) -> bool:
    """Refuse a teacher whose tokens are not the student's; whether all have the student's vocabulary of logits."""
    student, rows = tokenizer_identity(config.student.path), vocabulary_rows(config.student.path)
    whole = [t for t in config.method.every_term.values() if t.objective.consumes is VocabularyScores]
    made_here = all(issubclass(term.scorer.produces, VocabularyScores) for term in whole)
    exact = True
    for name, teacher in config.teachers.items():
        _check_teacher(config, name, teacher)
        check_same_tokens(student, tokenizer_identity(teacher.path))
        theirs = vocabulary_rows(teacher.path)
        exact &= theirs == rows and LastHidden in teacher.supports and parameter_count(teacher.path) > 0
        if theirs != rows and not made_here:
            whose = "the teacher's" if name == DEFAULT else f"that of teacher {name!r}"
            raise ConfigurationError(
                f"method {config.method.name} compares whole vocabularies, but the student's output has {rows} rows "
                f"and {whose} {theirs} (padded differently); use a top-k method such as method=topk_reverse_kl"
            )
    return exact
