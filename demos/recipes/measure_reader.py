"""The phenomenon of the stage `locks_reader` in a checkpoint: ``python -m demos.recipes.measure_reader FOLDER``.

Eight samples of each held-out problem are graded. Then the model is shown, in the words of `method=sdpo`, the first
right one of each problem, and, in the words of `method=trd`, the first wrong one, and writes again. Counted besides:
verdicts on tries that it did not write, and what is kept of a draft.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from demos.recipes.evaluate_task import load
from demos.recipes.locks_reader import DRAFT, SIBLING, first_values, shown
from demos.recipes.measure_locks import Measured, found, go_on, held_out, measure, verdicts
from demos.recipes.pretrain import make_reproducible
from demos.tasks.locks import LocksProblem, judge

GROUP = 8
Text = tuple[str, bool]


@dataclass(frozen=True, slots=True)
class Seen:
    """A problem and a text about it that is shown."""

    problem: LocksProblem
    text: str


def groups(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: Sequence[LocksProblem]
) -> list[list[Text]]:
    """Samples of every problem alone."""
    torch.manual_seed(0)
    rounds = [go_on(model, tokenizer, [p.prompt for p in problems], sample=True) for _ in range(GROUP)]
    return [list(texts) for texts in zip(*rounds, strict=True)]


def firsts(problems: Sequence[LocksProblem], written: Sequence[Sequence[Text]], *, right: bool) -> list[Seen]:
    """The first right or the first wrong text of every problem that has one."""
    return [
        Seen(problem, texts[0])
        for problem, group in zip(problems, written, strict=True)
        if (texts := [t for t, ended in group if (judge(t, problem.answer, ended=ended).failure is None) == right])
    ]


def again(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, template: str, seen: Sequence[Seen], *, sample: bool
) -> list[Text]:
    """Texts written after the problem and the text that is shown."""
    torch.manual_seed(0)
    return go_on(model, tokenizer, [shown(template, s.problem, s.text) for s in seen], sample=sample)


def graded(seen: Sequence[Seen], written: Sequence[Text]) -> Measured:
    """Findings in texts about these problems."""
    return found([judge(t, s.problem.answer, ended=ended) for (t, ended), s in zip(written, seen, strict=True)])


def kept(seen: Sequence[Seen], written: Sequence[Text]) -> str:
    """Shares of drafts that stand in rewritten texts: first values of locks, and words before the first other one."""
    values, words = list[bool](), list[float]()
    for one, (text, _) in zip(seen, written, strict=True):
        mine, its = first_values(text.split()), first_values(one.text.split())
        values += [mine.get(mark) == value for mark, value in its.items()]
        pairs = list(zip(text.split(), one.text.split(), strict=False))
        alike = next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs))
        words.append(alike / max(1, len(one.text.split())))
    same = sum(words) / len(words)
    return f"first values kept {sum(values) / len(values):.1%}, words of drafts before the first other one {same:.1%}"


def report(folder: Path, count: int) -> None:
    model, tokenizer = load(folder)
    problems = held_out(count)
    written = groups(model, tokenizer, problems)
    all_of_them = [Seen(p, t) for p, group in zip(problems, written, strict=True) for t, _ in group]
    flat = [text for group in written for text in group]
    print(f"alone, T=1, {len(flat)} texts: {graded(all_of_them, flat).line}")
    print(f"alone, greedy: {measure(model, tokenizer, problems, told=False, sample=False).line}", flush=True)
    for name, template, right in (("a right text", SIBLING, True), ("a wrong draft", DRAFT, False)):
        seen = firsts(problems, written, right=right)
        print(f"shown {name} of its own: {len(seen)} of {count} problems have one")
        for sample in (False, True):
            texts = again(model, tokenizer, template, seen, sample=sample)
            about = "" if right else f"; {kept(seen, texts)}"
            print(f"  {'T=1' if sample else 'greedy'}: {graded(seen, texts).line}{about}", flush=True)
        some = seen[:100]
        says = verdicts(model, tokenizer, [s.problem for s in some], [shown(template, s.problem, s.text) for s in some])
        print(f"  reading others' tries: P(no | wrong) {says.wrong:.4f}, P(no | right) {says.right:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what a checkpoint does with texts about a problem.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--problems", type=int, default=250)
    arguments = parser.parse_args()
    make_reproducible()
    report(arguments.folder, arguments.problems)


if __name__ == "__main__":
    main()
