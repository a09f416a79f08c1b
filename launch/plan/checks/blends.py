"""Teacher inside the student's engine, for methods that sample from blends, and checks that there can be one."""

from actors.config import InnerTeacher
from hf.folder import text_config
from hf.quantized import quantization
from launch.config.run_config import RunConfig, teacher_key
from launch.plan.checks.models import vocabulary_rows
from launch.plan.checks.survey import Survey
from opd.errors import ConfigurationError, DataError
from opd.method.needs import named, needed
from opd.ports import Role
from teacher_service.config import REMOTE


def inner_teacher(config: RunConfig) -> InnerTeacher | None:
    """The teacher that every engine of the student must hold; None where no part of the method asks for blends."""
    if not needed(config.method, Role.BLENDED):
        return None
    (name,) = _candidates(config)
    return InnerTeacher(name=name, path=config.teachers[name].path)


def _candidates(config: RunConfig) -> list[str]:
    """Teachers that parts name for blends, or all where the prompts say which."""
    return sorted(named(config.method, Role.BLENDED) or config.teachers)


def check_blends(config: RunConfig) -> None:
    """Refuse a teacher that cannot stand inside the student's engine."""
    if not needed(config.method, Role.BLENDED):
        return
    needs = f"method {config.method.name} writes blends of the student and a teacher inside the student's engine, which"
    name, *others = _candidates(config)
    if others:
        raise ConfigurationError(
            f"{needs} holds a single teacher, but this may be any of {[name, *others]}; set "
            f"method.rollout.teacher={name}, or choose rollout StudentRollout"
        )
    if name not in config.teachers:
        raise ConfigurationError(
            f"{needs} holds teacher {name!r}, but the run has {sorted(config.teachers)}; name one of those, or add it "
            f"with teachers.{name}.path=..."
        )
    teacher = config.teachers[name]
    key = teacher_key(name)
    if teacher.backend in REMOTE:
        raise ConfigurationError(
            f"{needs} needs the teacher's weights beside the student's, but {key}.backend={teacher.backend.name} is a "
            "server elsewhere; choose TORCH or VLLM, or rollout StudentRollout"
        )
    if teacher.mixup:
        raise ConfigurationError(
            f"{needs} needs a teacher that stays as it is, but {key}.mixup={teacher.mixup} lets it follow the student; "
            f"set {key}.mixup=0, or choose rollout StudentRollout"
        )
    if quantization(text_config(teacher.path, key), key):
        raise ConfigurationError(
            f"{needs} computes with plain weights, but {key}.path={teacher.path!r} has quantized ones; choose the "
            "unquantized model, or rollout StudentRollout"
        )
    mine, its = vocabulary_rows(config.student.path), vocabulary_rows(teacher.path)
    if mine != its:
        raise ConfigurationError(
            f"{needs} needs equal vocabularies of logits, but the student's output has {mine} rows and the teacher's "
            f"{its} (padded differently); choose a teacher with as many, or rollout StudentRollout"
        )


def check_one_context(config: RunConfig, training: Survey) -> None:
    """Refuse prompts that student and teacher read differently, where an engine reads one text with both."""
    if needed(config.method, Role.BLENDED) and training.privileged.count:
        raise DataError(
            f"method {config.method.name} needs prompts that student and teacher read alike, since an engine reads one "
            f"text with both, but for {training.privileged.first} they differ; leave prompts.teacher_template out, or "
            "choose rollout StudentRollout"
        )
