"""Do the prompts fit the run: lengths, graders, teachers?"""

from collections.abc import Sequence

from launch.config import RunConfig
from launch.inputs.graders import GRADERS
from opd.errors import ConfigurationError, DataError
from opd.ports import Routed, Sources
from opd.scorers.ensemble import Ensemble
from opd.types import Prompt


def check_routes(config: RunConfig, sources: Sources, asked: Sequence[Prompt]) -> None:
    """Refuse a teacher that somebody asks for and the run does not have, before anything is started."""
    first = {p.teacher: f"prompt {p.id!r}" for p in reversed(asked)}
    for place, source in (("prompts", config.prompts), ("evaluation.prompts", config.evaluation.prompts)):
        if isinstance(source, Routed):
            first = dict.fromkeys(source.routes(sources), place) | first
    if isinstance(config.method.scorer, Ensemble):
        first |= dict.fromkeys(config.method.scorer.shares, "method.scorer")
    unknown = sorted(first.keys() - config.teachers.keys())
    if unknown:
        raise ConfigurationError(
            f"{first[unknown[0]]} asks for teacher {unknown[0]!r}, but the run has {sorted(config.teachers)}; name one "
            f"of those, or add it with teachers.{unknown[0]}.path=..."
        )


def check_lengths(config: RunConfig, prompts: Sequence[Prompt]) -> int:
    """Tokens of the longest sequence; refuses one that fits neither the engine nor a micro-batch."""
    worst = max(prompts, key=lambda p: len(p.student_ids))
    longest = len(worst.student_ids) + max(config.max_tokens, config.evaluation.max_tokens)
    if longest > config.student.max_model_len:
        raise ConfigurationError(
            f"prompt {worst.id!r} has {len(worst.student_ids)} tokens and max_tokens is {config.max_tokens}, but "
            f"student.max_model_len is {config.student.max_model_len}; raise it to {longest} or lower max_tokens"
        )
    if longest > config.learner.tokens_per_microbatch:
        raise ConfigurationError(
            f"a sequence may have {longest} tokens, but learner.tokens_per_microbatch is "
            f"{config.learner.tokens_per_microbatch}; raise it to at least {longest}"
        )
    return longest


def check_tasks(prompts: Sequence[Prompt]) -> None:
    """Refuse a prompt whose answer no grader can grade."""
    unknown = {p.task for p in prompts} - GRADERS.keys()
    if unknown:
        raise DataError(f"no grader is called {sorted(unknown)[0]!r}; set prompts.task to one of {list(GRADERS)}")
