"""What a whole method needs: the union of its parts' needs, and the questions that a plan has about it."""

from opd.method.method import Method
from opd.ports import Need, Role, needs_of


def needs(method: Method) -> frozenset[Need]:
    """Every engine that a part of `method` calls."""
    parts = (method.rollout, method.scorer, *method.weights.values(), method.objective, method.update)
    return frozenset().union(*map(needs_of, parts))


def needed(method: Method, role: Role) -> bool:
    """Does any part call an engine of this role?"""
    return any(need.role is role for need in needs(method))


def named(method: Method, role: Role) -> frozenset[str]:
    """The engines of this role that parts name themselves; empty where the prompts say which."""
    return frozenset(need.name for need in needs(method) if need.role is role and need.name)
