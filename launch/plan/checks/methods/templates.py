"""Checks of what teachers are shown around a text while a run lasts: room for it, and words for it."""

from collections.abc import Iterator, Mapping

import numpy as np

from hf.tokenizer import HuggingFaceTokenizer
from launch.config.run_config import RunConfig, teacher_key
from launch.plan.checks.prompts import least_tokens, token_limits
from launch.plan.checks.settings import terms_by_place
from launch.plan.checks.survey import Survey
from opd.errors import ConfigurationError
from opd.rollouts.contexts import SuccessfulSibling
from opd.scorers.judge import JudgeAdvantage
from opd.settings.ranges import Template
from opd.settings.validation import walk

NAMES = ("prompt", "answer", "completion", "feedback")  # in braces, what a template is filled with


def check_shown(config: RunConfig, training: Survey, tokenizer: HuggingFaceTokenizer) -> list[str]:
    """Notes on templates that the student's tokenizer has no words for; refuses those that there is no room for."""
    shown = getattr(config.method.rollout, "shown", None)
    if isinstance(shown, SuccessfulSibling):
        _check_room(config, shown, training, tokenizer)
    return [*_unknown(config, tokenizer), *_unasked(config)]


def _check_room(config: RunConfig, shown: SuccessfulSibling, training: Survey, tokenizer: HuggingFaceTokenizer) -> None:
    """Refuse a context without room for the longest prompt, and one too long for a teacher that reads it.

    What stands in the place of an `{answer}` is not counted.
    """
    tokens, where = training.longest
    least = max(least_tokens(template, tokens, tokenizer) for template in shown.shows)
    if least > shown.longest:
        raise ConfigurationError(
            f"method.rollout.shown.longest is {shown.longest}, but what a teacher is shown with {where} has {least} "
            f"tokens without any solution; raise it to {least} at least, or shorten its templates"
        )
    written = max(token_limits(config.method.rollout), default=config.max_tokens)
    whole = min(shown.longest, least + written) + written
    for name in sorted(training.teachers.keys() & config.teachers.keys()):
        teacher, part = config.teachers[name], teacher_key(name)
        for key, room in (("max_batch_tokens", teacher.max_batch_tokens), ("max_model_len", teacher.max_model_len)):
            if room and whole > room:
                raise ConfigurationError(
                    f"a text with what its teacher is shown before it may have {whole} tokens ({where}, a solution and "
                    f"the text, of max_tokens={written} each), but {part}.{key} is {room}; raise it to {whole}, or "
                    "lower max_tokens or method.rollout.shown.longest"
                )


def _unknown(config: RunConfig, tokenizer: HuggingFaceTokenizer) -> Iterator[str]:
    unknown = tokenizer.unknown_id
    if unknown is None:
        return
    found = [name for name, text in _templates(config) if _mostly(text, tokenizer, unknown)]
    if found:
        yield (
            f"note: {', '.join(found)}: mostly unknown tokens, because the student's tokenizer has no words for what "
            "teachers are shown there; write it in words that the prompts have"
        )


def _unasked(config: RunConfig) -> Iterator[str]:
    """Notes on a judge that does not read the prompt, or has no question to answer."""
    for place, term in terms_by_place(config):
        scorer = term.scorer
        if isinstance(scorer, JudgeAdvantage) and not ("{prompt}" in scorer.before and scorer.after.strip()):
            if not scorer.after.strip():
                yield f"note: the judge of {place}.scorer is asked nothing: {place}.scorer.after is empty"
            else:
                yield (
                    f"note: the judge of {place}.scorer does not read the prompt: {place}.scorer.before lacks "
                    "{prompt}"
                )


def _templates(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Every template of the method, by the name that a user gives it."""
    for name, hint, value in walk(config.method, "method"):
        if hint is Template or hint == Template:
            yield name, value
        elif isinstance(value, Mapping):
            yield from ((f"{name}.{key}", text) for key, text in value.items() if isinstance(text, str))


def _mostly(template: str, tokenizer: HuggingFaceTokenizer, unknown: int) -> bool:
    for name in NAMES:
        template = template.replace(f"{{{name}}}", "")
    own = tokenizer.encode(template)[len(tokenizer.encode("")) :]
    return len(own) > 0 and bool(np.mean(own == unknown) > 0.5)
