"""Ledger of trajectories: none is lost without a reason, and none is trained twice.

Every trajectory has an entry `(step, prompt id, sample)` that moves along `State`. The identity
`issued == trained + dropped + outstanding` is counted from both sides and checked, not derived.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from opd.errors import DataError

_FORMAT = "opd ledger 1"


class State(Enum):
    """State of a trajectory. The last two are final."""

    ISSUED = "issued"  # requested
    GENERATED = "generated"  # has its completion
    SCORED = "scored"  # has its scores
    LEASED = "leased"  # taken by the learner, and fresh enough
    TRAINED = "trained"
    DROPPED = "dropped"


_NEXT: Mapping[State, frozenset[State]] = {
    State.ISSUED: frozenset({State.GENERATED, State.DROPPED}),
    State.GENERATED: frozenset({State.SCORED, State.DROPPED}),
    State.SCORED: frozenset({State.LEASED, State.DROPPED}),
    State.LEASED: frozenset({State.TRAINED, State.DROPPED}),
}


class Entry(NamedTuple):
    """Identifier of a trajectory within a run: step (from 0), prompt id, number in the group."""

    step: int
    prompt_id: str
    sample: int


@dataclass(slots=True)
class Ledger:
    """Outstanding trajectories by identifier, and counts of those that were trained or dropped.

    A step's entries are forgotten when all of them are settled; an entry of such a step is refused from then on, so
    memory is that of the outstanding steps. Example: after one step of 64 prompts of which one could not be trained
    `summary()` has `issued=64, trained=63, dropped=1, outstanding=0`.
    """

    issued: int = 0
    generated: int = 0
    scored: int = 0
    trained: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    requeued: Counter[str] = field(default_factory=Counter)
    _open: dict[int, dict[Entry, State]] = field(default_factory=dict)
    _settled: set[int] = field(default_factory=set)  # steps from `_first` on of which nothing is open any more
    _first: int = 0  # every step below is settled
    _again: set[Entry] = field(default_factory=set)  # outstanding when the run stopped; to be issued once more

    @property
    def outstanding(self) -> int:
        """Number of trajectories that are issued, and neither trained nor dropped yet; counted, not derived."""
        return sum(state not in (State.TRAINED, State.DROPPED) for of in self._open.values() for state in of.values())

    def begin(self, step: int) -> None:
        """Set the first step of this run; steps before `step` are refused."""
        self._first = max(self._first, step)

    def issue(self, step: int, entries: Iterable[Entry]) -> None:
        """Add all trajectories of a step.

        Raises:
            DataError: the step was issued before, or an entry stands in it twice. What was outstanding when the run
                stopped (`reopen`) is issued again, once, and is not counted twice.
        """
        names = list(entries)
        if step < self._first or step in self._settled or (step in self._open and not self._is_reissued(step)):
            raise DataError(f"step {step} was issued before; every step is issued once")
        if len(set(names)) < len(names):
            twice = next(name for name, n in Counter(names).items() if n > 1)
            raise DataError(
                f"step {step} has prompt {twice.prompt_id!r} in two places; prompts with the same id form a group and "
                "must stand next to each other, so give these ids of their own"
            )
        known = self._open.setdefault(step, {})
        self.issued += sum(name not in known for name in names)
        if lost := sorted(self._again.intersection(known) - set(names)):
            raise DataError(
                f"step {step} had prompt {lost[0].prompt_id!r} outstanding when the run stopped, but does not ask for "
                "it now; resume with the same prompts"
            )
        self._again.difference_update(names)
        for name in names:
            known.setdefault(name, State.ISSUED)
        self._settle(step)

    def _is_reissued(self, step: int) -> bool:
        return any(name in self._again for name in self._open[step])

    def move(self, entries: Iterable[Entry], to: State, reason: str = "") -> None:
        """Change the state of trajectories to `to`, with a `reason` where they are dropped.

        Raises:
            DataError: `to` cannot follow the state of one of them, or the reason is missing. None is changed then.
        """
        names = list(entries)
        if (to is State.DROPPED) != bool(reason):
            raise DataError(f"a trajectory needs a reason exactly when it is dropped, got {to.value} for {reason!r}")
        if not names:
            return
        for name in names:
            if to not in _NEXT.get(self.state(name), ()):
                raise DataError(
                    f"trajectory {name} is {self.state(name).value} and cannot become {to.value}; it came twice or was "
                    "taken out of turn"
                )
        if len(set(names)) < len(names):
            raise DataError(f"a trajectory was named twice in one move to {to.value}: {names}")
        for name in names:
            self._open[name.step][name] = to
        match to:
            case State.GENERATED:
                self.generated += len(names)
            case State.SCORED:
                self.scored += len(names)
            case State.TRAINED:
                self.trained += len(names)
            case State.DROPPED:
                self.dropped[reason] += len(names)
            case State.ISSUED | State.LEASED:
                pass
        for step in {name.step for name in names}:
            self._settle(step)

    def requeue(self, entries: Iterable[Entry], reason: str) -> None:
        """Put outstanding trajectories back to `ISSUED`, to be generated again; `reason` is counted.

        Raises:
            DataError: one is settled already. Nothing is requeued then.
        """
        names = list(entries)
        for name in names:
            if self.state(name) in (State.TRAINED, State.DROPPED):
                raise DataError(f"trajectory {name} is {self.state(name).value} and cannot be asked for again")
        for name in names:
            self._open[name.step][name] = State.ISSUED
        if names:
            self.requeued[reason] += len(names)

    def state(self, entry: Entry) -> State:
        """State of a trajectory. Raises `DataError` for one that was never issued, or whose step is settled."""
        found = self._open.get(entry.step, {}).get(entry)
        if found is None:
            when = "whose step is settled" if self._is_settled(entry.step) else "that was never issued"
            raise DataError(f"the ledger has no open trajectory {entry}: one {when}")
        return found

    def check(self) -> None:
        """Raise `DataError` unless `issued == trained + dropped + outstanding`."""
        settled, outstanding = self.trained + self.dropped.total(), self.outstanding
        here = sum(state in (State.TRAINED, State.DROPPED) for of in self._open.values() for state in of.values())
        if self.issued != settled + outstanding or here > settled:
            raise DataError(
                f"the ledger does not add up: {self.issued} issued, {self.trained} trained, {self.dropped.total()} "
                f"dropped, {outstanding} outstanding; this is a bug, please report it"
            )

    def reopen(self) -> None:
        """Prepare for a resumed run: all that was outstanding is issued again, under the same identifiers."""
        for of in self._open.values():
            names = [name for name, state in of.items() if state not in (State.TRAINED, State.DROPPED)]
            self.requeue(names, "resumed")
            self._again.update(names)

    def summary(self) -> dict[str, int]:
        """Flat counts; dropped and requeued ones also by reason."""
        reasons = {f"dropped/{reason}": n for reason, n in sorted(self.dropped.items())}
        again = {f"requeued/{reason}": n for reason, n in sorted(self.requeued.items())}
        return {
            "issued": self.issued,
            "generated": self.generated,
            "scored": self.scored,
            "trained": self.trained,
            "dropped": self.dropped.total(),
            "outstanding": self.outstanding,
            **({"requeued": self.requeued.total()} if again else {}),
            **reasons,
            **again,
        }

    def to_json(self) -> str:
        """The ledger as JSON, for a checkpoint."""
        entries = [
            [name.step, name.prompt_id, name.sample, state.value, name in self._again]
            for step in sorted(self._open)
            for name, state in self._open[step].items()
        ]
        return json.dumps(
            {
                "format": _FORMAT,
                "issued": self.issued,
                "generated": self.generated,
                "scored": self.scored,
                "trained": self.trained,
                "dropped": dict(self.dropped),
                "requeued": dict(self.requeued),
                "first": self._first,
                "settled": sorted(self._settled),
                "open": entries,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> "Ledger":
        """The ledger that `to_json` wrote.

        Raises:
            DataError: it is not a ledger, or does not add up.
        """
        try:
            content: dict[str, Any] = json.loads(text)
            if content["format"] != _FORMAT:
                raise ValueError("another format")
            issued, generated, scored, trained = (int(content[n]) for n in ("issued", "generated", "scored", "trained"))
            ledger = cls(issued=issued, generated=generated, scored=scored, trained=trained)
            ledger.dropped, ledger.requeued = _counter(content["dropped"]), _counter(content["requeued"])
            ledger._first, ledger._settled = int(content["first"]), {int(step) for step in content["settled"]}
            for step, prompt_id, sample, state, again in content["open"]:
                name = Entry(int(step), str(prompt_id), int(sample))
                ledger._open.setdefault(name.step, {})[name] = State(state)
                if again:
                    ledger._again.add(name)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise DataError(
                f"the ledger of a checkpoint cannot be read ({type(error).__name__}: {error}); take another checkpoint"
            ) from error
        ledger.check()
        return ledger

    def _is_settled(self, step: int) -> bool:
        return step < self._first or step in self._settled

    def _settle(self, step: int) -> None:
        of = self._open.get(step)
        if of is None or any(state not in (State.TRAINED, State.DROPPED) for state in of.values()):
            return
        del self._open[step]
        self._settled.add(step)
        while self._first in self._settled:
            self._settled.remove(self._first)
            self._first += 1


def entries_of(step: int, groups: Iterable[Sequence[Any]]) -> list[list[Entry]]:
    """Entries of a step's groups of prompts, numbered within each group."""
    return [[Entry(step, prompt.id, i) for i, prompt in enumerate(group)] for group in groups]


def _counter(counts: Mapping[str, int]) -> Counter[str]:
    return Counter({str(reason): int(n) for reason, n in counts.items()})
