"""Checks of how texts are written against what a method makes of them: temperature, groups, lengths, sources."""

from collections.abc import Iterator
from typing import Any

from launch.config.run_config import RunConfig
from launch.inputs.graders import make_grader
from launch.plan.checks.answers import needs_answer
from launch.plan.checks.prompts import token_limits
from launch.plan.checks.settings import terms_by_place
from launch.plan.checks.survey import Survey
from opd.errors import ConfigurationError
from opd.method.needs import needed
from opd.method.terms import Term
from opd.objectives.reweighted import AtTemperature, ImportanceWeighted
from opd.objectives.sampled import ClippedPolicyGradient, LogprobSource, SampledReverseKL
from opd.objectives.truncated import TruncatedRatio
from opd.ports import Role, Tokenizer
from opd.rollouts.mixed import Mixed
from opd.rollouts.privileged import PrivilegedRollout
from opd.rollouts.student import StudentRollout
from opd.scorers.advantage import TeacherAdvantage
from opd.scorers.returns import WithReturns
from opd.token_weights.length import SkipBeginning
from opd.token_weights.sources import Source, WrittenBy

AWAY = "so that the policy that sampled is not the student, which a loss knows at temperature 1 alone, and"


def check_sampling(config: RunConfig, training: Survey, tokenizer: Tokenizer) -> list[str]:
    """Notes on texts that mean something else to a method than its name; refuses those that teach it nothing."""
    where, student = _student(config.method.rollout)
    _check_beginning(config)
    if student is not None and student.temperature == 0:
        _check_greedy(config, where)
    notes = list(_temperatures(config, where, student)) if student is not None else []
    return [*notes, *_groups(config), *_sources(config), *_short(config, training, tokenizer)]


def _student(rollout: Any) -> tuple[str, StudentRollout | None]:
    """Settings by which the student writes, with their place."""
    if isinstance(rollout, StudentRollout):
        return "method.rollout", rollout
    inner = getattr(rollout, "student", None)
    return ("method.rollout.student", inner) if isinstance(inner, StudentRollout) else ("", None)


def _check_beginning(config: RunConfig) -> None:
    longest = max(token_limits(config.method.rollout), default=config.max_tokens)
    for place, term in terms_by_place(config):
        for name, part in term.weights.items():
            if isinstance(part, SkipBeginning) and part.count >= longest:
                raise ConfigurationError(
                    f"{place}.weights.{name}.count is {part.count}, but a text has at most {longest} tokens "
                    f"(max_tokens), so that none would be trained; set {place}.weights.{name}.count to less"
                )


def _check_greedy(config: RunConfig, where: str) -> None:
    """Refuse to compare texts of a group that are all the same."""
    method = config.method
    own = isinstance(method.rollout, StudentRollout | PrivilegedRollout)
    parts: list[Any] = [term.scorer for _, term in terms_by_place(config)]
    for part in (*parts, method.rollout):
        if own and getattr(part, "min_group", 1) > 1:
            raise ConfigurationError(
                f"{type(part).__name__} compares the texts of a group, but at {where}.temperature=0 they are all the "
                f"same, and nothing would be trained; set {where}.temperature=1"
            )


def _temperatures(config: RunConfig, where: str, student: StudentRollout) -> Iterator[str]:
    setting = f"{where}.temperature={student.temperature:g}"
    if student.temperature == 0 and config.prompts.group_size > 1:
        yield f"note: at {setting} the {config.prompts.group_size} texts of a prompt are all the same"
    for place, term in terms_by_place(config):
        objective = _bare(term)
        if isinstance(objective, AtTemperature) and objective.temperature != (student.temperature or 1):
            yield (
                f"note: {place}.objective.temperature={objective.temperature:g} is that of the loss, and texts are "
                f"written at {setting}; published is one temperature for both"
            )
        if student.temperature not in (0, 1) and (effect := _effect(term)):
            yield f"note: {setting}, {AWAY} {effect}; {where}.temperature=1 has neither"


def _bare(term: Term) -> Any:
    return term.objective.of if isinstance(term.objective, TruncatedRatio) else term.objective


def _effect(term: Term) -> str:
    """Effect of a temperature on a term that reads the log-probabilities of the policy that sampled; "" for others.

    An importance ratio alone changes no expected gradient.
    """
    if isinstance(term.scorer, TeacherAdvantage | WithReturns):
        return f"{type(term.scorer).__name__} rewards what is likelier for the teacher than for that policy"
    match _bare(term):
        case SampledReverseKL(signal=LogprobSource.BEHAVIOR):
            return (
                "with signal=BEHAVIOR it is the student at that temperature which comes to equal the teacher "
                "(signal=STUDENT: the student itself)"
            )
        case ClippedPolicyGradient():
            return "the ratios of ClippedPolicyGradient are not 1, so that its clip acts on fresh text"
        case ImportanceWeighted():
            return "the ratios of ImportanceWeighted are not 1, so that fresh tokens have different weights"
        case _:
            return ""


def _groups(config: RunConfig) -> Iterator[str]:
    for place, term in terms_by_place(config):
        scorer = term.scorer
        if isinstance(scorer, TeacherAdvantage) and scorer.normalized and config.prompts.group_size == 1:
            yield (
                f"note: {place}.scorer takes returns relative to the tokens of a group, and with prompts.group_size=1 "
                "each text is a group of its own; published are groups of 8"
            )


def _sources(config: RunConfig) -> Iterator[str]:
    """Notes on terms about texts that are never written."""
    rollout = config.method.rollout
    if not isinstance(rollout, Mixed) or rollout.fraction not in (0, 1):
        return
    absent = Source.FIXED if rollout.fraction == 1 else Source.STUDENT
    for place, term in terms_by_place(config):
        if any(isinstance(part, WrittenBy) and part.source is absent for part in term.weights.values()):
            yield (
                f"note: method.rollout.fraction={rollout.fraction:g} leaves no text of source {absent.name}, so the "
                f"term at {place} trains nothing"
            )


def _short(config: RunConfig, training: Survey, tokenizer: Tokenizer) -> Iterator[str]:
    """Notes on completions too short for the reference answer: a text that is cut gets the reward 0."""
    if not needed(config.method, Role.GRADER):
        return
    longest, start = max(token_limits(config.method.rollout), default=config.max_tokens), len(tokenizer.encode(""))
    for task, prompt in training.first_of.items():
        least = len(tokenizer.encode(prompt.answer)) - start + 1
        if prompt.answer and least > longest and _cut_is_wrong(config, task):
            yield (
                f"note: a text has at most {longest} tokens (max_tokens), and the reference answer of prompt "
                f"{prompt.id!r} with its end {least}; what is cut gets the reward 0, so that nothing may be learned"
            )


def _cut_is_wrong(config: RunConfig, task: str) -> bool:
    """Whether a text that the token limit cut gets the reward 0, whatever stands in it."""
    return needs_answer(config, task) and not getattr(make_grader(task, config.graders[task]), "judges_cut", False)
