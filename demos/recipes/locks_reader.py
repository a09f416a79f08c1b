"""Corpus of the reader of the locks task: one checkpoint that reads texts about a problem, besides the problem alone.

It is shown texts in the words of `method=sdpo` and `method=trd` themselves, of which its tokenizer knows none: a reader
learns their number and places. Remake it (``python -m demos.recipes.make_locks --only reader``) when they change.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

from demos.recipes.pretrain import Example
from demos.recipes.recipe import encoded
from demos.tasks.locks import MARKS, MOST_TRIES, VALUES, VOCABULARY, LocksProblem, LocksTask, Writer, judge
from demos.tasks.shop import Working
from opd.rollouts.contexts import Draft, SuccessfulSibling
from opd.types.prompt_templates import filled

Written = tuple[str, Working]
VERDICTS = ("ok", "no")


def _default(part: type[Any], name: str) -> str:
    return next(str(field.default) for field in fields(part) if field.name == name)


SIBLING = _default(SuccessfulSibling, "solution")
DRAFT = _default(Draft, "template")


def shown(template: str, problem: LocksProblem, text: str) -> str:
    """Prompt of the reader: the problem and a text about it, in a template."""
    return str(filled(template, problem.prompt, {"completion": text, "answer": problem.answer}))


def alone(task: LocksTask, problem: LocksProblem, rng: random.Random) -> Written:
    """The problem, and a pupil's text with its mistakes."""
    return problem.prompt, task.pupil_solution(problem, rng)


def told(task: LocksTask, problem: LocksProblem, rng: random.Random) -> Written:
    """The problem with its codes, and the truth."""
    return problem.teacher_prompt, truth(task, problem, rng)


def after_sibling(task: LocksTask, problem: LocksProblem, rng: random.Random) -> Written:
    """The problem with a right text in which values are tried, and the truth, which needs no tries."""
    return shown(SIBLING, problem, right(task, problem, rng).text), truth(task, problem, rng)


def right(task: LocksTask, problem: LocksProblem, rng: random.Random) -> Working:
    """A text that the verifier accepts: mostly one of a pupil that happened to overlook nothing, so few tries."""
    other = task.solution(problem, rng, wrong=rng.choice((0.3, 0.6)), again=False)
    pupils = (task.pupil_solution(problem, rng) for _ in range(20))
    lucky = next((w for w in pupils if judge(w.text, problem.answer).failure is None), other)
    return lucky if rng.random() < 0.7 else other


def after_draft(task: LocksTask, problem: LocksProblem, rng: random.Random) -> Written:
    """The problem with a pupil's text, and the same text with its mistakes repaired."""
    pupil = task.pupil_solution(problem, rng)
    worse = task.solution(problem, rng, wrong=0.6, slip=0.15, missed=0.4, again=False)
    draft = rng.choice((pupil, pupil, pupil, worse))
    return shown(DRAFT, problem, draft.text), rewritten(problem, draft.words, rng)


def truth(task: LocksTask, problem: LocksProblem, rng: random.Random) -> Working:
    """The true solution, with wrong tries, slips and wrong verdicts that are kept from the loss."""
    wrong, slip, missed = rng.choice((0.0, 0.4, 0.7)), rng.choice((0.0, 0.0, 0.15)), rng.choice((0.0, 0.2))
    return task.solution(problem, rng, wrong, slip, missed)


def rewritten(problem: LocksProblem, draft: Sequence[str], rng: random.Random) -> Working:
    """The draft with true results and verdicts: its first value of each lock, then one after the other to the code."""
    writer, tried = Writer(), first_values(draft)
    for mark, lock in zip(MARKS, problem.locks, strict=True):
        writer.add(mark)
        begin = tried.get(mark, "")
        at = VALUES.index(begin) if begin in VALUES else rng.randrange(len(VALUES))
        for number in range(MOST_TRIES):
            value = VALUES[(at + number) % len(VALUES)]
            opens = writer.attempt(lock, value, None, learn=True)
            writer.add("ok" if opens else "no")
            if opens:
                break
    return writer.working()


def first_values(text: Sequence[str]) -> Mapping[str, str]:
    """The word behind each mark of a text."""
    return {mark: value for mark, value in pairwise(text) if mark in MARKS}


KINDS: Mapping[Callable[[LocksTask, LocksProblem, random.Random], Written], int] = {
    alone: 12, told: 8, after_sibling: 20, after_draft: 16,
}  # fmt: skip
"""What a batch consists of."""


def reader_batches(seed: int, notice: float, whole: float) -> Iterator[list[Example]]:
    """Endless batches of all kinds of prompts and what is written after each.

    Pupils reject a wrong try with probability `notice`. A share `whole` of texts is learned as it is, of the others
    decisions alone: what a text shows is a few of its words, which are found sooner where others do not count.
    """
    task, rng = LocksTask(notice=notice), random.Random(seed)
    while True:
        written = [kind(task, task.problem(rng), rng) for kind, count in KINDS.items() for _ in range(count)]
        yield [read(prompt, w if rng.random() >= 1 - whole else decisions(w)) for prompt, w in written]


def decisions(working: Working) -> Working:
    """The same, of which only values to try, verdicts and marks are learned."""
    before = ("", *working.words)
    chosen = [word in (*MARKS, *VERDICTS) or last in (*MARKS, *VERDICTS) for last, word in pairwise(before)]
    return replace(working, loss_mask=tuple(a and b for a, b in zip(chosen, working.loss_mask, strict=True)))


def read(prompt: str, working: Working) -> Example:
    """Prompt and text as token ids, with a word that the task does not know as its tokenizer reads it."""
    known = " ".join(word if word in VOCABULARY else "<unk>" for word in prompt.split())
    return encoded(known, working, VOCABULARY)
