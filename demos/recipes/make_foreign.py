"""Recipe of the two teachers of the foreign stage: ``python -m demos.recipes.make_foreign``.

`teacher` (0.6 M parameters) solves the shop's problems and writes them differently (`demos.tasks.foreign`); it never
saw the student's way of writing. `larger` has its size and the student's education: it imitates the same pupils, so it
is larger and knows no more. The student is the shop's. About 7 minutes on one core. ``--check`` trains nothing: it
compares the files with SHA256SUMS and measures both on 500 held-out problems.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from demos.recipes.evaluate_task import Accuracy, accuracy, held_out_problems, load
from demos.recipes.make_shop import BATCH, SHAPES, example, make_tokenizer, student_batches
from demos.recipes.pretrain import Example, Schedule, build_model, save_model, train
from demos.recipes.recipe import command_line, make_and_check
from demos.tasks.foreign import ForeignTask
from demos.tasks.shop import ShopTask, grade

# Lowest and highest share of solved problems; the shop's student solves 46.4 % greedily and 32.6 % sampled.
TARGETS = {
    "teacher": (Accuracy(greedy=0.98, sampled=0.95), Accuracy(greedy=1.0, sampled=1.0)),
    "larger": (Accuracy(greedy=0.36, sampled=0.28), Accuracy(greedy=0.52, sampled=0.40)),
}


def teacher_batches(seed: int) -> Iterator[list[Example]]:
    """Endless batches of solutions that begin numbers with their units, with repaired mistakes."""
    task, rng = ForeignTask(), random.Random(seed)
    while True:
        problems = [task.problem(rng) for _ in range(BATCH)]
        yield [example(problem.prompt, task.solution(problem, rng, mistakes=0.15)) for problem in problems]


def make_teacher(folder: Path) -> None:
    model = build_model(SHAPES["teacher"], seed=81)
    train(model, teacher_batches(seed=81), Schedule(steps=1000, lr=1.5e-3), "teacher")
    save_model(model, make_tokenizer(), folder)


def make_larger(folder: Path) -> None:
    model = build_model(SHAPES["teacher"], seed=82)
    train(model, student_batches(seed=82), Schedule(steps=600, lr=1.5e-3), "larger")
    save_model(model, make_tokenizer(), folder)


MAKERS = {"teacher": make_teacher, "larger": make_larger}


def measured(output: Path, names: Sequence[str]) -> bool:
    """Whether the checkpoints solve as many problems as they should; prints how many."""
    within, problems = True, held_out_problems(500, ShopTask())
    for name in names:
        model, tokenizer = load(output / name)
        share, (low, high) = accuracy(model, tokenizer, problems, grade), TARGETS[name]
        good = low.greedy <= share.greedy <= high.greedy and low.sampled <= share.sampled <= high.sampled
        within &= good
        print(f"{name}: greedy {share.greedy:.1%}, sampled {share.sampled:.1%}: {'good' if good else 'MISSED'}")
    return within


if __name__ == "__main__":
    make_and_check(command_line("foreign").parse_args(), MAKERS, measured)
