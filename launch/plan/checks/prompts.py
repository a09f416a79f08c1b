"""Checks of all prompts against the run: lengths, graders, teachers, templates."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf.tokenizer_check import TokenizerIdentity
from launch.config.run_config import DEFAULT, RunConfig, teacher_key
from launch.config.settings import place_of
from launch.inputs.prompt_files import reading
from launch.plan.checks.conversations import conversations, own_templates
from launch.plan.checks.survey import Survey
from opd.errors import ConfigurationError, DataError
from opd.method.needs import asks_prompts_teacher, named, needed, questions
from opd.ports import Listed, Role, Routed, Sources, Tokenizer
from opd.prompts.dataset import AT_ONCE, DatasetPrompts
from opd.prompts.generated import GeneratedPrompts
from opd.rollouts.mixed import AnswerRollout
from opd.settings.auto import Auto

JOINTS = 8  # tokens that texts may lose where they meet, and special ones
HeldOut = Mapping[str, Survey]
"""Surveys of the evaluation sets, by name."""


def check_routes(config: RunConfig, sources: Sources, training: Survey, held_out: HeldOut) -> None:
    """Refuse a teacher that a prompt names and the run does not have, and one that nothing names."""
    places = {name: where for found in held_out.values() for name, where in found.teachers.items()}
    places |= dict(training.teachers)
    for place, source in (("prompts", config.prompts), *config.evaluation.sources.items()):
        if isinstance(source, Routed) and not isinstance(source, Listed):
            places = dict.fromkeys(source.routes(sources), place) | places
    for role, part in ((Role.READER, "a scorer of the method"), (Role.WRITER, "method.rollout")):
        places |= dict.fromkeys(named(config.method, role), part)
    unknown = sorted(places.keys() - config.teachers.keys())
    if unknown:
        raise ConfigurationError(
            f"{places[unknown[0]]} asks for teacher {unknown[0]!r}, but the run has {sorted(config.teachers)}; name "
            f"one of those, or add it with teachers.{unknown[0]}.path=..."
        )
    idle = sorted(config.teachers.keys() - places.keys() - {DEFAULT})
    if idle and isinstance(config.prompts, Listed):
        raise ConfigurationError(
            f"no prompt asks for teacher {idle[0]!r}, so it would be started and never teach; name it in a column with "
            f"prompts.teacher_column=..., or leave teachers.{idle[0]} out"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of the longest sequence: of all, of those that learner and teachers read, and of a teacher's own too."""

    all: int
    scored: int
    of_teachers: int


def check_lengths(config: RunConfig, training: Survey, held_out: HeldOut, tokenizer: Tokenizer) -> Lengths:
    """Lengths of the longest sequences that a run may have.

    Refuses one that fits neither the engine, nor, where it is read, a teacher or a micro-batch whose size is told.
    """
    written = max(config.max_tokens, *token_limits(config.method.rollout))
    longest = read = of_teachers = 0
    microbatch = config.learner.tokens_per_microbatch
    asked = [(training, written, True)]
    for name, one in config.evaluation.by_name.items():
        asked.append((held_out[name], one.max_tokens, one.reverse_kl_prompts > 0))
    for found, more, scored in asked:
        tokens, where = found.longest
        total = tokens + more
        longest = max(longest, total)
        of_teachers = max(of_teachers, total) if scored or config.evaluation.teacher else of_teachers
        if total > config.student.longest:
            raise ConfigurationError(
                f"{where} has {tokens} tokens and max_tokens is {more}, but student.max_model_len is "
                f"{config.student.longest}; raise it to {total} or lower max_tokens"
            )
        if not scored:  # neither the learner nor a teacher reads what is only graded
            continue
        read = max(read, total)
        if not isinstance(microbatch, Auto) and total > microbatch:
            raise ConfigurationError(
                f"a sequence may have {total} tokens ({where}), but learner.tokens_per_microbatch is "
                f"{microbatch}; raise it to at least {total}"
            )
        _check_teachers_room(config, found, more)
    _check_questions(config, training, written, tokenizer)
    return Lengths(all=longest, scored=read, of_teachers=of_teachers)


def _check_teachers_room(config: RunConfig, found: Survey, more: int) -> None:
    tokens, where = found.longest_for_teacher
    asked = {*named(config.method, Role.READER), *(found.teachers if asks_prompts_teacher(config.method) else ())}
    for name in sorted(asked & config.teachers.keys()):
        teacher, part = config.teachers[name], teacher_key(name)
        for key, room in (("max_batch_tokens", teacher.max_batch_tokens), ("max_model_len", teacher.max_model_len)):
            if room and tokens + more > room:
                raise ConfigurationError(
                    f"{where} has {tokens} tokens for the teacher and max_tokens is {more}, but {part}.{key} is {room}"
                    f"; raise it to {tokens + more} or lower max_tokens"
                )


def _check_questions(config: RunConfig, found: Survey, more: int, tokenizer: Tokenizer) -> None:
    """Refuse a scorer's question that, with the longest prompt and text, is longer than its teacher reads at once.

    What stands in the place of an `{answer}` is not counted, nor what is cut where texts meet: it has at least this.
    """
    tokens, where = found.longest
    for named_teacher, templates in questions(config.method).items():
        asked = {named_teacher} if named_teacher else found.teachers.keys()
        for name in sorted(asked & config.teachers.keys()):
            teacher, part = config.teachers[name], teacher_key(name)
            rooms = {"max_batch_tokens": teacher.max_batch_tokens, "max_model_len": teacher.max_model_len}
            longest = max(least_tokens(template, tokens, tokenizer) for template in templates) + more
            for key, room in rooms.items():
                if room and longest > room:
                    raise ConfigurationError(
                        f"what method {config.method.name} asks its teacher about {where} has {longest} tokens or more "
                        f"(max_tokens is {more}), but {part}.{key} is {room}; raise it, shorten the question of the "
                        "scorer, or lower max_tokens"
                    )


def least_tokens(template: str, prompt: int, tokenizer: Tokenizer) -> int:
    """Number of tokens that a filled template has at least."""
    own = len(tokenizer.encode(template.replace("{prompt}", "").replace("{answer}", "")))
    return max(0, own - JOINTS) + prompt * ("{prompt}" in template)


def token_limits(part: Any) -> Iterator[int]:
    """`max_tokens` of a rollout and of the rollouts it is made of."""
    for field in dataclasses.fields(part) if dataclasses.is_dataclass(part) else ():
        value = getattr(part, field.name)
        if field.name == "max_tokens" and isinstance(value, int):
            yield value
        yield from token_limits(value)


def check_rows(config: RunConfig, sources: Sources, training: Survey) -> None:
    """Refuse rows that would end a run: an answer to learn from is missing, a step is empty."""
    if training.unanswered.count and any(isinstance(p, AnswerRollout) for p in _parts(config.method.rollout)):
        raise DataError(
            f"{training.unanswered.first} has no answer, which method {config.method.name} learns from; set "
            "prompts.answer_column, or choose a method that writes its own text"
        )
    if not isinstance(config.prompts, Listed) or training.seen == training.total or not training.total:
        return
    step = config.prompts.starved(training.ids, config.steps, sources)
    if step is not None:
        raise DataError(
            f"every prompt of step {step} is longer than prompts.max_tokens, and prompts.skip_long leaves them all "
            "out; raise prompts.max_tokens or prompts.prompts_per_step"
        )


def _parts(part: Any) -> Iterator[Any]:
    yield part
    for field in dataclasses.fields(part) if dataclasses.is_dataclass(part) else ():
        yield from _parts(getattr(part, field.name))


def check_templates(
    config: RunConfig, student: TokenizerIdentity, teachers: Mapping[str, TokenizerIdentity], training: Survey
) -> list[str]:
    """Remarks about chat templates that differ.

    Prompts are written with the student's template for both, unless a source asks for the teacher's own. That is
    refused where a teacher writes the answer to messages: it would answer in another form than its own.
    """
    notes: list[str] = []
    own = own_templates(config)
    for name in training.teachers.keys() & teachers.keys():
        teacher = teachers[name]
        if teacher.template == student.template:
            continue
        differ = (
            f"the chat templates of student {student.path!r} and teacher {teacher.path!r} differ (digests "
            f"{student.template or 'none'} and {teacher.template or 'none'})"
        )
        if training.chats.count and needed(config.method, Role.WRITER) and not own:
            raise DataError(
                f"{differ}, and method {config.method.name} lets the teacher write to messages ({training.chats.first})"
                "; set prompts.teacher_chat_template=OWN, copy one chat template to the other, or choose a teacher of "
                "the student's family"
            )
        used = "both read messages in the student's" if training.chats.count else "the prompts are plain text"
        used = "each reads messages in its own" if own else used
        notes.append(f"{differ}; {used}")
    return notes


def remarks(
    config: RunConfig, training: Survey, held_out: HeldOut, more: Sequence[str], *, dated: bool
) -> tuple[str, ...]:
    """Remarks that are no errors and matter before training, one sentence each; `more` is from other checks."""
    notes = list(more)
    for place, found in (("prompts", training), *((place_of(name), found) for name, found in held_out.items())):
        notes += _about(place, found)
    if training.seen < training.total and not _generated(config.prompts):
        notes.append(f"prompts: {training.total - training.seen} of {training.total} rows are too long and left out")
    if all(map(_generated, config.evaluation.sources.values())) and not _generated(config.prompts):
        notes.append(
            "evaluation measures the embedded task, not the prompts that are trained on; set evaluation=dataset "
            "evaluation.prompts.path=... to held-out rows"
        )
    notes += _counted(config)
    notes += _asked(config, held_out)
    if dated and training.chats.count:
        notes.append("the chat template writes today's date into every prompt, so a run resumed tomorrow reads others")
    shared = [line for name, found in held_out.items() for line in _overlap(training, name, found)]
    return (*shared, *(f"note: {sentence}" for sentence in notes))


def _asked(config: RunConfig, held_out: HeldOut) -> Iterator[str]:
    """Amount of text that evaluations on named sets ask for."""
    for name, one in config.evaluation.sets.items():
        between = f", and {one.count(between=True)} every {one.every} steps" if one.every else ""
        yield (
            f"evaluation.sets.{name} asks {held_out[name].seen} prompts, {one.samples + one.greedy} completions each "
            f"before and after training{between}: at most {one.max_tokens} tokens, temperature {one.temperature:g}, "
            f"top-p {one.top_p:g}"
        )


def _counted(config: RunConfig) -> Iterator[str]:
    """Counts of the records that filters keep and leave out, and of those that stay in their files."""
    for place, source in conversations(config):
        if not isinstance(source, DatasetPrompts):
            continue
        found = reading(source.folder or source.path, source.columns(place))
        if found.unread:
            yield (
                f"{place}: the {'column' if len(found.unread) == 1 else 'columns'} {', '.join(found.unread)} of "
                f"{source.path} {'is' if len(found.unread) == 1 else 'are'} not read, and so no part of what is asked; "
                f"{place}.map can make one prompt of several columns"
            )
        if source.stream:
            yield (
                f"{place}: {len(found.rows)} rows stay in their files; the first {min(AT_ONCE, len(found.rows))} stand "
                "for all in what is said of lengths, answers and repeats"
            )
        if source.filter:
            first = f" (first: {found.first_left_out})" if found.left_out else ""
            yield (
                f"{place}.filter keeps {len(found.rows)} of {len(found.rows) + found.left_out} records and leaves "
                f"{found.left_out} out{first}"
            )


def _about(place: str, found: Survey) -> Iterator[str]:
    of = f"of {found.seen} prompts"
    if found.unknown.count:
        yield (
            f"{place}: {found.unknown.count} {of} are mostly unknown tokens (first: {found.unknown.first}); the "
            "tokenizer does not know what they are written in"
        )
    if 0 < found.chats.count < found.seen and found.total:
        yield (
            f"{place}: {found.chats.count} {of} are conversations (first: {found.chats.first}), written by the chat "
            f"template, and the others are plain text without it; {place}.chat=true asks those as a user, too"
        )
    if found.special.count:
        yield (
            f"{place}: {found.special.count} {of} contain the text of a special token (first: {found.special.first}), "
            "which is read as that token"
        )
    if found.repeated.count and found.total:
        yield f"{place}: {found.repeated.count} {of} repeat an earlier one (first: {found.repeated.first})"


def _overlap(training: Survey, name: str, held_out: Survey) -> Iterator[str]:
    both = max(len(training.ids & held_out.ids), len(training.texts & held_out.texts))
    if both:
        least = "" if training.total else "at least "
        which = f"evaluation set {name!r}" if name else "evaluation"
        yield (
            f"WARNING: {least}{both} of the {held_out.seen} prompts of the {which} are trained on, so its accuracy "
            f"says nothing about new ones; give {place_of(name)} other rows or another seed"
        )


def _generated(source: Any) -> bool:
    inner = getattr(source, "sources", None)
    return all(map(_generated, inner.values())) if isinstance(inner, Mapping) else isinstance(source, GeneratedPrompts)
