"""Needs of a whole method: the union of its parts' needs, and what a plan asks about it."""

from opd.method.method import Method
from opd.ports import Need, Role, needs_of


def needs(method: Method) -> frozenset[Need]:
    """Every engine that a part of `method` calls."""
    terms = [part for t in method.every_term.values() for part in (t.scorer, *t.weights.values(), t.objective)]
    return frozenset().union(*map(needs_of, (method.rollout, *terms, method.update)))


def needed(method: Method, role: Role) -> bool:
    """Whether any part calls an engine of this role."""
    return any(need.role is role for need in needs(method))


def named(method: Method, role: Role) -> frozenset[str]:
    """The engines of this role that parts name themselves; empty where the prompts name them."""
    return frozenset(need.name for need in needs(method) if need.role is role and need.name)


def asks_prompts_teacher(method: Method) -> bool:
    """Whether a scorer of any term asks the teacher that a prompt names."""
    return any(Need(role=Role.READER) in needs_of(term.scorer) for term in method.every_term.values())
