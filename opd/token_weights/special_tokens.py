"""Weights that depend on the sampled token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Protocol, Self, runtime_checkable

import numpy as np
from jaxtyping import Float

from opd.errors import ConfigurationError
from opd.method.method import Method
from opd.ports import Context
from opd.settings.ranges import In
from opd.settings.validation import settings
from opd.types import Scored, Scores


@runtime_checkable
class NamesTokens(Protocol):
    """A weight whose configuration spells tokens; it is used as `known` gives it."""

    def known(self, vocabulary: Mapping[str, int]) -> Self:
        """The same by ids alone, which `vocabulary` gives for its tokens."""
        ...


def look_up(weights: Mapping[str, Any], vocabulary: Mapping[str, int]) -> dict[str, Any]:
    """The same weights, with the ids of all tokens that they (or weights inside them) name."""
    return {name: part.known(vocabulary) if isinstance(part, NamesTokens) else part for name, part in weights.items()}


def with_known_tokens(method: Method, vocabulary: Mapping[str, int]) -> Method:
    """The same method, with the ids of all tokens that the weights of its terms name."""
    terms = {n: replace(term, weights=look_up(term.weights, vocabulary)) for n, term in method.terms.items()}
    return replace(method, weights=look_up(method.weights, vocabulary), terms=terms)


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class SkipFirst:
    """Weight 0 of the first occurrence of each of `token_ids` in a completion; later ones are trained.

    For tokens on which student and teacher differ by template rather than by skill (Revisiting OPD, arXiv 2603.25562,
    masks the first `<`, `think` and `<|im_end|>`). `tokens` are named as the vocabulary spells them; a run that is
    planned looks up their ids (`look_up`), and until then the part refuses to weigh anything.
    """

    consumes: ClassVar[type[Scores]] = Scores
    reads_sampled_tokens: ClassVar[bool] = True

    # ids whose first occurrence is not trained
    token_ids: Sequence[Annotated[int, In(0, 100_000_000)]] = ()
    # the same as the vocabulary spells them
    tokens: Sequence[str] = ()

    def known(self, vocabulary: Mapping[str, int]) -> Self:
        """The same by ids alone. A token that the vocabulary does not have cannot be sampled, so it is left out."""
        ids = [vocabulary[token] for token in self.tokens if token in vocabulary]
        return replace(self, token_ids=(*self.token_ids, *ids), tokens=())

    def __call__(self, scored: Sequence[Scored[Any]], context: Context) -> list[Float[np.ndarray, " T"]]:
        if self.tokens:
            raise ConfigurationError(
                f"weight SkipFirst names tokens {list(self.tokens)} and needs their ids before it can weigh a step; "
                "look them up with opd.token_weights.special_tokens.look_up, or set weights.NAME.token_ids instead"
            )
        return [self._weights(s.trajectory.token_ids) for s in scored]

    def _weights(self, token_ids: np.ndarray) -> np.ndarray:
        weights = np.ones(len(token_ids))
        for token in self.token_ids:
            weights[np.flatnonzero(token_ids == token)[:1]] = 0.0
        return weights
