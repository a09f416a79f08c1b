"""Engines that a method needs: the union of its parts' needs; and the check of words in its scorers."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from opd.method.method import Method
from opd.ports import Need, Role, Tokenizer, needs_of


@runtime_checkable
class Spells(Protocol):
    """A scorer whose settings are words that must differ as tokens."""

    def check_spelling(self, tokenizer: Tokenizer) -> None:
        """Raise `ConfigurationError` where the tokenizer makes the same of words that mean different things."""
        ...


@runtime_checkable
class ReadsMore(Protocol):
    """A scorer that has a teacher read more than a prompt and what was written after it."""

    @property
    def questions(self) -> Mapping[str, Sequence[str]]:
        """Templates of all that is read around a text, by the name of the teacher ("": the one that a prompt names)."""
        ...


def needs(method: Method) -> frozenset[Need]:
    """All engines that a part of `method` calls."""
    terms = [part for t in method.every_term.values() for part in (t.scorer, *t.weights.values(), t.objective)]
    return frozenset().union(*map(needs_of, (method.rollout, *terms, method.update)))


def needed(method: Method, role: Role) -> bool:
    """Whether any part calls an engine of this role."""
    return any(need.role is role for need in needs(method))


def named(method: Method, role: Role) -> frozenset[str]:
    """Names of engines of this role that parts name themselves; empty where the prompts name them."""
    return frozenset(need.name for need in needs(method) if need.role is role and need.name)


def asks_prompts_teacher(method: Method) -> bool:
    """Whether a scorer of any term calls the teacher that a prompt names."""
    return any(Need(role=Role.READER) in needs_of(term.scorer) for term in method.every_term.values())


def questions(method: Method) -> Mapping[str, Sequence[str]]:
    """Templates that teachers read around a text, by the teacher's name ("": the one that a prompt names)."""
    found: dict[str, list[str]] = {}
    for term in method.every_term.values():
        for name, templates in (term.scorer.questions if isinstance(term.scorer, ReadsMore) else {}).items():
            found.setdefault(name, []).extend(templates)
    return found


def check_spelling(method: Method, tokenizer: Tokenizer) -> None:
    """Refuse words in the scorers of a method that the student's tokenizer does not tell apart."""
    for term in method.every_term.values():
        if isinstance(term.scorer, Spells):
            term.scorer.check_spelling(tokenizer)
