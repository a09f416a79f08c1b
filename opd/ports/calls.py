"""Calls of a learner's ranks as values, which are sent, repeated and logged alike whatever the verb."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from opd.types import nbytes

Own = TypeVar("Own")
Answer = TypeVar("Answer")
P = ParamSpec("P")
Verb = TypeVar("Verb", bound=Callable[..., Any])

_CHANGING = "_changes_state"


def changes_state(verb: Verb) -> Verb:
    """Mark of a verb after which a rank computes with other weights, or holds other snapshots, than before.

    Ranks that take the place of lost ones repeat such calls in order. What was not marked is not repeated.
    """
    setattr(verb, _CHANGING, True)
    return verb


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[Answer]):
    """A verb of `opd.ports.Rank` with its arguments, for all ranks at once.

    Made by `broadcast` or `scatter`. `scattered` has a first argument per rank (None: all get the same arguments).
    """

    verb: Callable[..., Answer]
    scattered: Sequence[Any] | None = None
    arguments: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def broadcast(
        cls, verb: Callable[Concatenate[Any, P], Answer], *arguments: P.args, **options: P.kwargs
    ) -> "Call[Answer]":
        """The same arguments for every rank. Example: `Call.broadcast(Rank.snapshot, "start")`."""
        return cls(verb=verb, arguments=arguments, options=options)

    @classmethod
    def scatter(
        cls,
        verb: Callable[Concatenate[Any, Own, P], Answer],
        scattered: Sequence[Own],
        *arguments: P.args,
        **options: P.kwargs,
    ) -> "Call[Answer]":
        """A first argument of its own for every rank. Example: `Call.scatter(Rank.step, batches, objective)`."""
        return cls(verb=verb, scattered=scattered, arguments=arguments, options=options)

    @property
    def name(self) -> str:
        """The verb's name, which is that of a rank's method."""
        return self.verb.__name__

    @property
    def changes_state(self) -> bool:
        """Whether it must be repeated on ranks that take the place of lost ones."""
        return getattr(self.verb, _CHANGING, False)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays in the arguments, those held elsewhere included."""
        return _nbytes((self.scattered, self.arguments, tuple(self.options.values())))

    def of(self, rank: int) -> tuple[Any, ...]:
        """The positional arguments of one rank."""
        return self.arguments if self.scattered is None else (self.scattered[rank], *self.arguments)


def _nbytes(value: Any) -> int:
    return sum(map(_nbytes, value)) if isinstance(value, list | tuple) else nbytes(value)
