"""The ledger against a model of it: random histories, illegal moves, checkpoints in between."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from opd.errors import DataError
from opd.loop.ledger import Entry, Ledger, State

OPEN = (State.ISSUED, State.GENERATED, State.SCORED, State.LEASED)
FORWARD = {
    State.ISSUED: State.GENERATED,
    State.GENERATED: State.SCORED,
    State.SCORED: State.LEASED,
    State.LEASED: State.TRAINED,
}


class Histories(RuleBasedStateMachine):
    """Whatever happens in whatever order, the ledger says what the model says, and refuses what is illegal."""

    names = Bundle("names")

    @initialize(first=st.integers(0, 3))
    def start(self, first: int) -> None:
        self.ledger, self.first, self.steps = Ledger(), first, first
        self.ledger.begin(first)
        self.model: dict[Entry, State] = {}
        self.moved = dict.fromkeys(State, 0)
        self.why: dict[str, int] = {}

    @rule(target=names, prompts=st.integers(0, 3), samples=st.integers(1, 3))
    def issue(self, prompts: int, samples: int) -> Any:
        step, self.steps = self.steps, self.steps + 1
        new = [Entry(step, f"p{i}", s) for i in range(prompts) for s in range(samples)]
        self.ledger.issue(step, new)
        self.model |= dict.fromkeys(new, State.ISSUED)
        return multiple(*new)

    @rule(name=names, to=st.sampled_from([*FORWARD.values(), State.DROPPED]), reason=st.sampled_from(["stale", "long"]))
    def move(self, name: Entry, to: State, reason: str = "") -> None:
        now = self.model[name]
        legal = FORWARD.get(now) is to or (to is State.DROPPED and now in OPEN)
        self._attempt(False, lambda: self.ledger.move([name], to, "" if to is State.DROPPED else reason or "long"))
        self._attempt(legal, lambda: self.ledger.move([name], to, reason if to is State.DROPPED else ""))
        if legal:
            self.model[name] = to
            self.moved[to] += 1
            if to is State.DROPPED:
                self._because(f"dropped/{reason}")

    def _because(self, reason: str) -> None:
        self.why[reason] = self.why.get(reason, 0) + 1

    @rule(some=st.lists(names, min_size=2, max_size=4))
    def move_several_or_none(self, some: Sequence[Entry]) -> None:
        """One that cannot move keeps the others where they are."""
        legal = all(self.model[n] is State.ISSUED for n in some) and len(set(some)) == len(some)
        self._attempt(legal, lambda: self.ledger.move(some, State.GENERATED))
        if legal:
            self.model |= dict.fromkeys(some, State.GENERATED)
            self.moved[State.GENERATED] += len(some)

    @rule(name=names)
    def requeue(self, name: Entry) -> None:
        legal = self.model[name] in OPEN
        self._attempt(legal, lambda: self.ledger.requeue([name], "died"))
        if legal:
            self.model[name] = State.ISSUED
            self._because("requeued/died")

    @rule()
    def issue_again(self) -> None:
        for step in range(self.first, self.steps):
            self._attempt(False, lambda step=step: self.ledger.issue(step, []))

    @rule(lose=st.booleans())
    def stop_and_resume(self, lose: bool) -> None:
        """Everything outstanding is asked for again under its name; a step that forgets one is refused."""
        self.ledger = Ledger.from_json(self.ledger.to_json())
        self.ledger.reopen()
        left: dict[int, list[Entry]] = {}
        for name, state in self.model.items():
            if state in OPEN:
                left.setdefault(name.step, []).append(name)
                self.model[name] = State.ISSUED
                self._because("requeued/resumed")
        for step, names in left.items():
            if lose:
                self._attempt(False, lambda step=step, names=names: self.ledger.issue(step, names[1:]))
            whole = [name for name in self.model if name.step == step]
            self.ledger.issue(step, whole)
            self._attempt(False, lambda step=step, whole=whole: self.ledger.issue(step, whole))

    @rule(name=consumes(names))
    def finish(self, name: Entry) -> None:
        while self.model[name] in OPEN:
            self.move(name, FORWARD[self.model[name]])

    @invariant()
    def they_agree(self) -> None:
        if not hasattr(self, "model"):
            return
        self.ledger.check()
        said = self.ledger.summary()
        requeued = sum(n for reason, n in self.why.items() if reason.startswith("requeued/"))
        expected = {
            "issued": len(self.model),
            "outstanding": sum(s in OPEN for s in self.model.values()),
            **{s.value: self.moved[s] for s in (State.GENERATED, State.SCORED, State.TRAINED, State.DROPPED)},
            **({"requeued": requeued} if requeued else {}),
        }
        assert said == expected | self.why
        assert self.ledger.outstanding == expected["outstanding"]
        for name, state in self.model.items():
            if state in OPEN:
                assert self.ledger.state(name) is state
        again = Ledger.from_json(self.ledger.to_json())
        assert again == self.ledger

    @staticmethod
    def _attempt(legal: bool, action: Any) -> None:
        if legal:
            action()
            return
        with pytest.raises(DataError):
            action()


Histories.TestCase.settings = settings(max_examples=400, stateful_step_count=30, deadline=None)
TestHistories = Histories.TestCase


@pytest.mark.slow
class TestManyHistories(Histories.TestCase):
    """Half a minute of the same."""

    settings = settings(max_examples=2000, stateful_step_count=30, deadline=None)


def test_memory_is_that_of_the_outstanding_steps() -> None:
    ledger = Ledger()
    for step in range(1000):
        names = [Entry(step, "p", i) for i in range(4)]
        ledger.issue(step, names)
        for state in (State.GENERATED, State.SCORED, State.LEASED, State.TRAINED):
            ledger.move(names, state)
    assert len(ledger.to_json()) < 300
    assert ledger.summary()["trained"] == 4000
    with pytest.raises(DataError, match="whose step is settled"):
        ledger.move([Entry(5, "p", 0)], State.TRAINED)


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda text: text[:-5], "cannot be read"),
        (lambda text: text.replace("opd ledger 1", "other"), "another format"),
        (lambda text: text.replace('"trained": 1', '"trained": 2'), "does not add up"),
        (lambda text: text.replace('"scored", false]', '"lost", false]'), "cannot be read"),
        (lambda text: "[]", "cannot be read"),
    ],
)
def test_a_damaged_ledger_is_refused(break_it: Any, says: str) -> None:
    ledger = Ledger()
    names = [Entry(0, "p", 0), Entry(0, "p", 1)]
    ledger.issue(0, names)
    for state in (State.GENERATED, State.SCORED):
        ledger.move(names, state)
    ledger.move(names[:1], State.LEASED)
    ledger.move(names[:1], State.TRAINED)
    text = ledger.to_json()
    assert Ledger.from_json(text) == ledger
    with pytest.raises(DataError, match=says):
        Ledger.from_json(break_it(text))


@pytest.mark.parametrize("order", ["pqp", "qpp", "qprp"])
def test_a_prompt_that_stands_in_two_places_is_refused(order: str) -> None:
    with pytest.raises(DataError, match="prompt 'p' in two places"):
        Ledger().issue(0, [Entry(0, prompt, 0) for prompt in order])


def test_a_run_starts_at_its_step_and_never_earlier_than_it_has_started() -> None:
    ledger = Ledger()
    for step in (3, 1):
        ledger.begin(step)
        for early in (0, 2):
            with pytest.raises(DataError, match=f"step {early} was issued before"):
                ledger.issue(early, [Entry(early, "p", 0)])
    with pytest.raises(DataError, match="whose step is settled"):
        ledger.state(Entry(2, "p", 0))
    ledger.issue(3, [Entry(3, "p", 0)])


def test_a_message_names_the_first_that_is_wrong_in_the_order_given() -> None:
    names = [Entry(0, prompt, 0) for prompt in "zya"]
    ledger = Ledger()
    ledger.issue(0, names)
    with pytest.raises(DataError, match=r"prompt_id='z'.* is issued and cannot become leased"):
        ledger.move(names, State.LEASED)
    with pytest.raises(DataError, match=r"one move to generated: .*'z'.*'z'.*'a'"):
        ledger.move([names[0], names[0], names[2]], State.GENERATED)
    ledger.issue(1, [Entry(1, "open", 0)])
    ledger.move(names[:2], State.DROPPED, "long")
    with pytest.raises(DataError, match=r"prompt_id='z'.* is dropped and cannot be asked for again"):
        ledger.requeue(names, "died")
    assert ledger.state(names[2]) is State.ISSUED and "requeued" not in ledger.summary()


def test_what_a_resumed_run_does_not_ask_for_again_is_named_alike_every_time() -> None:
    names = [Entry(0, f"p{i:02}", 0) for i in range(60)]
    ledger = Ledger()
    ledger.issue(0, names[::-1])
    ledger.reopen()
    with pytest.raises(DataError, match="step 0 had prompt 'p01' outstanding"):
        ledger.issue(0, names[:1])
    ledger.issue(0, names)


def test_a_run_that_stops_again_before_it_has_asked_still_asks_once_more() -> None:
    names = [Entry(0, "p", 0), Entry(0, "q", 0)]
    ledger = Ledger()
    ledger.issue(0, names)
    ledger.reopen()
    ledger = Ledger.from_json(ledger.to_json())
    ledger.issue(0, names)
    with pytest.raises(DataError, match="issued before"):
        ledger.issue(0, names)
    assert ledger.summary()["issued"] == 2


@given(
    first=st.integers(0, 3),
    settled=st.sets(st.integers(0, 9), max_size=6),
    still_open=st.sets(st.integers(0, 9), max_size=3),
)
def test_a_name_without_an_entry_is_of_a_settled_step_or_was_never_asked_for(
    first: int, settled: set[int], still_open: set[int]
) -> None:
    """Also of steps that are settled before an earlier one is, and after a checkpoint."""
    ledger = Ledger()
    ledger.begin(first)
    for step in sorted(settled | still_open - set(range(first))):
        if step >= first:
            ledger.issue(step, [Entry(step, "p", 0)] if step in still_open else [])
    for one in (ledger, Ledger.from_json(ledger.to_json())):
        for step in range(12):
            over = step < first or step in settled - still_open
            with pytest.raises(DataError, match="one whose step is settled" if over else "one that was never issued"):
                one.state(Entry(step, "stranger", 0))


@pytest.mark.parametrize("order", [[9, 2, 17], [17, 9, 2], [2, 9, 17]], ids=str)
def test_a_ledger_is_written_alike_whatever_order_its_steps_and_reasons_came_in(order: list[int]) -> None:
    """A checkpoint of the same run has the same bytes, and a summary the same lines."""
    ledger = Ledger()
    for step in [0, *order]:  # step 0 stays open, so that those after it are kept one by one
        ledger.issue(step, [Entry(step, "q", 0), Entry(step, "p", 0)])
        ledger.issue(step + 1, [])
    opened = [entry[:3] for entry in json.loads(ledger.to_json())["open"]]
    assert opened == [[step, prompt, 0] for step in (0, 2, 9, 17) for prompt in "qp"]
    assert json.loads(ledger.to_json())["settled"] == [1, 3, 10, 18]
    for step in order:
        ledger.requeue([Entry(step, "p", 0)], f"died at {step:02}")
        ledger.move([Entry(step, "p", 0)], State.DROPPED, f"long at {step:02}")
    kept = [name for name in ledger.summary() if "/" in name]
    assert kept == [f"{why} at {step:02}" for why in ("dropped/long", "requeued/died") for step in (2, 9, 17)]
