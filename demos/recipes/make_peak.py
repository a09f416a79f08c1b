"""Recipe of the second specialist and the student of two teachers: ``python -m demos.recipes.make_peak``.

The specialist (0.5 M parameters, narrower and deeper than the shop's teacher) learns true solutions of the peak task
with mistakes that are rejected and repaired; it never sees a shop problem. The student (0.3 M parameters) imitates
the pupils of both tasks: it forgets every second carry in the shop and compares only last digits in every second line
of the peak task where that matters. Both weaknesses are put there on purpose.

The tokenizer is the shop's, so all checkpoints can work together. About 7 minutes on one core. ``--check``
trains nothing: it compares the files with SHA256SUMS and measures the checkpoints on 500 held-out problems a task.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from demos.recipes.evaluate_task import Accuracy, accuracy, held_out_problems, load
from demos.recipes.make_shop import BATCH, example, make_tokenizer
from demos.recipes.pretrain import Example, Schedule, Shape, build_model, save_model, train
from demos.recipes.recipe import VOCAB_ROWS, command_line, make_and_check
from demos.tasks import peak, shop
from demos.tasks.peak import PeakTask
from demos.tasks.shop import ShopTask

TEACHER = Shape(vocab=VOCAB_ROWS, hidden=96, layers=4, heads=4, kv_heads=2, ffn=320)
STUDENT = Shape(vocab=VOCAB_ROWS, hidden=96, layers=3, heads=3, kv_heads=1, ffn=256)

# Lowest and highest share of solved problems per checkpoint and task.
TARGETS = {
    ("teacher", "peak"): (Accuracy(greedy=0.98, sampled=0.96), Accuracy(greedy=1.0, sampled=1.0)),
    ("student", "peak"): (Accuracy(greedy=0.15, sampled=0.15), Accuracy(greedy=0.7, sampled=0.6)),
    ("student", "shop"): (Accuracy(greedy=0.15, sampled=0.15), Accuracy(greedy=0.6, sampled=0.5)),
}
TASKS = {"peak": (PeakTask(), peak.grade), "shop": (ShopTask(), shop.grade)}


def teacher_batches(mistakes: float, seed: int) -> Iterator[list[Example]]:
    """Endless batches of true solutions with repaired mistakes."""
    task, rng = PeakTask(), random.Random(seed)
    while True:
        problems = [task.problem(rng) for _ in range(BATCH)]
        yield [example(p.prompt, task.solution(p, rng, mistakes)) for p in problems]


def student_batches(seed: int) -> Iterator[list[Example]]:
    """Endless batches of pupils' solutions, half of them of the shop task."""
    rng = random.Random(seed)
    shop_task, peak_task = ShopTask(), PeakTask()
    while True:
        sums = [shop_task.problem(rng) for _ in range(BATCH // 2)]
        comparisons = [peak_task.problem(rng) for _ in range(BATCH // 2)]
        yield [
            *(example(p.prompt, shop_task.pupil_solution(p, rng)) for p in sums),
            *(example(p.prompt, peak_task.pupil_solution(p, rng)) for p in comparisons),
        ]


def make_teacher(folder: Path) -> None:
    model = build_model(TEACHER, seed=3)
    train(model, teacher_batches(0.3, seed=31), Schedule(steps=700, lr=1.5e-3), "specialist")
    save_model(model, make_tokenizer(), folder)


def make_student(folder: Path) -> None:
    model = build_model(STUDENT, seed=4)
    train(model, student_batches(seed=41), Schedule(steps=800, lr=1.5e-3), "student")
    save_model(model, make_tokenizer(), folder)


MAKERS = {"teacher": make_teacher, "student": make_student}


def measured(output: Path, _names: Sequence[str]) -> bool:
    """Whether the checkpoints solve as many problems as they should; prints how many."""
    within = True
    for (name, task), (low, high) in TARGETS.items():
        model, tokenizer = load(output / name)
        drawer, grade = TASKS[task]
        share = accuracy(model, tokenizer, held_out_problems(500, drawer), grade)
        good = low.greedy <= share.greedy <= high.greedy and low.sampled <= share.sampled <= high.sampled
        within &= good
        print(
            f"{name} on {task}: greedy {share.greedy:.1%} (target {low.greedy:.1%} to {high.greedy:.1%}), "
            f"sampled {share.sampled:.1%} (target {low.sampled:.1%} to {high.sampled:.1%}): "
            f"{'good' if good else 'MISSED'}"
        )
    return within


if __name__ == "__main__":
    make_and_check(command_line("peak").parse_args(), MAKERS, measured)
