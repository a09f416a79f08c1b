"""Weights of prompts and of teachers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
from jaxtyping import Float

from opd.errors import ConfigurationError
from opd.method.method import readings_of
from opd.method.slots import TokenWeight
from opd.ports import Context, Reading
from opd.settings.ranges import Relative
from opd.settings.validation import settings
from opd.token_weights.special_tokens import look_up
from opd.types import Scored, Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptWeight:
    """Weight of a completion's prompt (`Prompt.weight`, e.g. from a column) at every token."""

    consumes: ClassVar[type[Scores]] = Scores
    reads_sampled_tokens: ClassVar[bool] = False

    def __call__(self, scored: Sequence[Scored[Any]], context: Context) -> list[Float[np.ndarray, " T"]]:
        return [np.full(len(s.trajectory), s.trajectory.prompt.weight) for s in scored]


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class TeacherBalance:
    """Shares of teachers in a step's token budget, however many prompts each has and however long they get.

    A trained token of teacher `k` weighs `s_k N / n_k`, with `n_k` of the step's `N` trained tokens read by `k` and
    `s_k` its share among the teachers that have any; the weights of a step add up to `N`, so the learning rate keeps
    its meaning. Without balance a teacher of long answers drowns the others (the domain weights of arXiv 2606.15007
    section 3.3; none of the published recipes states how tokens are counted: INFERRED).

    `shares` are relative (left out: all alike). `filters` are the weight parts that leave tokens out before budgets
    are counted; put them here instead of beside this part, whose tokens would else be counted and then dropped.
    Example: `TeacherBalance(shares={"default": 2, "peak": 1}, filters={"whole": SkipTruncated()})`.
    """

    shares: Mapping[str, Relative] = field(default_factory=dict)
    filters: Mapping[str, TokenWeight] = field(default_factory=dict)

    @property
    def consumes(self) -> type[Scores]:
        """Narrowest class of scores that a filter reads."""
        return max((part.consumes for part in self.filters.values()), key=lambda t: len(t.__mro__), default=Scores)

    @property
    def reads_sampled_tokens(self) -> bool:
        """Whether a filter looks at tokens; budgets only count them."""
        return any(getattr(part, "reads_sampled_tokens", True) for part in self.filters.values())

    @property
    def readings(self) -> Sequence[Reading]:
        """Readings of its filters."""
        return readings_of(*self.filters.values())

    def known(self, vocabulary: Mapping[str, int]) -> Self:
        """The same, with the ids of the tokens that its filters name (`special_tokens.NamesTokens`)."""
        return replace(self, filters=look_up(self.filters, vocabulary))

    def __call__(self, scored: Sequence[Scored[Any]], context: Context) -> list[Float[np.ndarray, " T"]]:
        kept = [s.trajectory.loss_mask.astype(np.float64) for s in scored]
        for part in self.filters.values():
            kept = [a * b for a, b in zip(kept, part(scored, context), strict=True)]
        budget: dict[str, float] = {}
        for s, weight in zip(scored, kept, strict=True):
            name = s.trajectory.prompt.teacher
            budget[name] = budget.get(name, 0.0) + float(weight.sum())
        shares = {name: self._share(name) for name, spent in budget.items() if spent > 0}
        total, parts = sum(budget.values()), sum(shares.values())
        factor = {name: share / parts * total / budget[name] for name, share in shares.items()}
        return [w * factor.get(s.trajectory.prompt.teacher, 0.0) for s, w in zip(scored, kept, strict=True)]

    def _share(self, name: str) -> float:
        if self.shares and name not in self.shares:
            raise ConfigurationError(
                f"weight TeacherBalance has no share for teacher {name!r} (has {sorted(self.shares)}); add it"
            )
        return self.shares.get(name, 1.0)
