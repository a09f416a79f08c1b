"""Checks of what is put around prompts: system messages and keywords against the chat templates that write them."""

from collections.abc import Iterator, Mapping
from typing import Any

from hf.tokenizer import HuggingFaceTokenizer
from launch.config.run_config import DEFAULT, RunConfig, teacher_key
from opd.errors import ConfigurationError, DataError
from opd.method.needs import named
from opd.ports import Role
from opd.prompts.conversations import ChatTemplate, Conversations, conversations_of

_LISTED = 12  # keywords that an error names


def conversations(config: RunConfig) -> Iterator[tuple[str, Conversations]]:
    """Every source of a run that asks its prompts in conversations, with the place of its settings."""
    yield from conversations_of("prompts", config.prompts)
    for place, source in config.evaluation.sources.items():
        yield from conversations_of(place, source)


def own_templates(config: RunConfig) -> bool:
    """Whether a teacher reads what its own chat template writes."""
    return any(source.teacher_chat_template is ChatTemplate.OWN for _, source in conversations(config))


def teachers_tokenizers(config: RunConfig) -> Mapping[str, HuggingFaceTokenizer]:
    """Tokenizers of the teachers, where prompts are to be written by their own chat templates; else none."""
    if not own_templates(config):
        return {}
    return {name: HuggingFaceTokenizer(t.path, teacher_key(name)) for name, t in config.teachers.items()}


def check_conversations(
    config: RunConfig, student: HuggingFaceTokenizer, teachers: Mapping[str, HuggingFaceTokenizer]
) -> None:
    """Refuse what a chat template would not read: an unknown keyword, a system message; and a missing template."""
    for place, source in conversations(config):
        _check(f"{place}.template_kwargs", source.template_kwargs, f"{place}.system", source.system, student)
        own = source.teacher_chat_template is ChatTemplate.OWN
        given, system = source.teacher_keywords, source.system_of_teacher
        for reader in teachers.values() if own else [student]:
            if own and not reader.converses:
                raise ConfigurationError(
                    f"{place}.teacher_chat_template=OWN needs a chat template, but {reader.part} {reader.path!r} has "
                    f"none; copy one there, or set {place}.teacher_chat_template=STUDENT"
                )
            _check(f"{place}.teacher_template_kwargs", given, f"{place}.teacher_system", system, reader)
        if own:
            _check_one_reader(config, place, source)


def check_openings(config: RunConfig, student: HuggingFaceTokenizer, first_chat: str) -> None:
    """Refuse a template whose prompts end before the answer begins; `first_chat` is a row of messages, "" for none."""
    readers = [student, *teachers_tokenizers(config).values()] if first_chat else []
    for reader in readers:
        if left_out := reader.opening():
            raise DataError(
                f"the chat template of {reader.part} {reader.path!r} writes {left_out!r} before an answer, but not "
                f"where a prompt ends ({first_chat}), so that the model would have to write it first; let it read "
                "add_generation_prompt, or ask plain prompts"
            )


def _check(key: str, given: Mapping[str, Any], system_key: str, system: str, reader: HuggingFaceTokenizer) -> None:
    whose = f"that of {reader.part} {reader.path!r}"
    if (given or system) and not reader.converses:
        raise ConfigurationError(
            f"{key if given else system_key} needs a chat template, but {reader.part} {reader.path!r} has none; clear "
            "it, or use a checkpoint with a template"
        )
    reads = reader.template_keywords() if given else frozenset[str]()
    if unknown := sorted(given.keys() - reads):
        names = ", ".join(sorted(reads)[:_LISTED]) or "no keyword at all"
        raise ConfigurationError(
            f"{key}.{unknown[0]} is no keyword that the chat template reads ({whose} reads {names}); correct the name, "
            "or leave it out"
        )
    if system and (why := reader.why_no_system(given)):
        raise ConfigurationError(
            f"{system_key} needs a chat template that takes a system message, but {whose} {why}; clear it, and say it "
            "in the question (prompts.suffix, of plain prompts)"
        )


def _check_one_reader(config: RunConfig, place: str, source: Conversations) -> None:
    """Refuse further teachers that would read a prompt written by another one's template."""
    if others := sorted(set(named(config.method, Role.READER)) - {getattr(source, "teacher", DEFAULT)}):
        raise ConfigurationError(
            f"{place}.teacher_chat_template=OWN writes what a prompt's one teacher reads, but method "
            f"{config.method.name} asks teacher {others[0]!r} about it, too; set {place}.teacher_chat_template=STUDENT"
        )
