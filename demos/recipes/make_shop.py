"""Recipe of the teacher and the student of the shop task from scratch: ``python -m demos.recipes.make_shop``.

The teacher (0.6 M parameters) learns true solutions with mistakes that are rejected and repaired. It learns
in two phases: with few mistakes it solves the problems, but does not know a wrong line when it sees one; the
second phase, with many, teaches it that, and a teacher is judged by what it says about a student's wrong
lines. The student (0.3 M parameters) imitates pupils that forget every second carry: it knows every fact, with
a systematic misconception on top.

About 9 minutes on one core. ``--check`` trains nothing: it compares the files with SHA256SUMS and measures
both checkpoints on 500 held-out problems.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from demos.recipes.evaluate_task import Accuracy, accuracy, held_out_problems, load, rejection
from demos.recipes.pretrain import Example, Schedule, Shape, build_model, save_model, train
from demos.recipes.recipe import VOCAB_ROWS, command_line, encoded, make_and_check, word_tokenizer
from demos.tasks.shop import VOCABULARY, ShopTask, Working, grade

BATCH = 32

SHAPES = {
    "teacher": Shape(vocab=VOCAB_ROWS, hidden=128, layers=3, heads=4, kv_heads=2, ffn=384),
    "student": Shape(vocab=VOCAB_ROWS, hidden=96, layers=3, heads=3, kv_heads=1, ffn=256),
}

# Lowest and highest share of solved problems: the student must have much to learn, and a start to learn from.
TARGETS = {
    "teacher": (Accuracy(greedy=0.995, sampled=0.975), Accuracy(greedy=1.0, sampled=1.0)),
    "student": (Accuracy(greedy=0.36, sampled=0.28), Accuracy(greedy=0.46, sampled=0.38)),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer of the task's words."""
    return word_tokenizer(VOCABULARY)


def teacher_batches(mistakes: float, seed: int) -> Iterator[list[Example]]:
    """Endless batches of true solutions with repaired mistakes."""
    task, rng = ShopTask(), random.Random(seed)
    while True:
        problems = [task.problem(rng) for _ in range(BATCH)]
        yield [example(problem.prompt, task.solution(problem, rng, mistakes)) for problem in problems]


def student_batches(seed: int) -> Iterator[list[Example]]:
    """Endless batches of pupils' solutions."""
    task, rng = ShopTask(), random.Random(seed)
    while True:
        problems = [task.problem(rng) for _ in range(BATCH)]
        yield [example(problem.prompt, task.pupil_solution(problem, rng)) for problem in problems]


def make_teacher(folder: Path) -> None:
    model = build_model(SHAPES["teacher"], seed=1)
    train(model, teacher_batches(0.15, seed=11), Schedule(steps=1000, lr=1.5e-3), "teacher, few mistakes")
    train(model, teacher_batches(0.4, seed=12), Schedule(steps=400, lr=1e-3), "teacher, many mistakes")
    save_model(model, make_tokenizer(), folder)


def make_student(folder: Path) -> None:
    model = build_model(SHAPES["student"], seed=2)
    train(model, student_batches(seed=21), Schedule(steps=480, lr=1.5e-3), "student")
    save_model(model, make_tokenizer(), folder)


MAKERS = {"teacher": make_teacher, "student": make_student}


def measured(output: Path, names: Sequence[str]) -> bool:
    """Whether the checkpoints solve as many problems as they should; prints how many."""
    within = True
    problems = held_out_problems(500, ShopTask())
    for name in names:
        model, tokenizer = load(output / name)
        share, (low, high) = accuracy(model, tokenizer, problems, grade), TARGETS[name]
        says_no = rejection(model, tokenizer, problems[:100])
        good = low.greedy <= share.greedy <= high.greedy and low.sampled <= share.sampled <= high.sampled
        within &= good
        print(
            f"{name}: greedy {share.greedy:.1%} (target {low.greedy:.1%} to {high.greedy:.1%}), "
            f"sampled {share.sampled:.1%} (target {low.sampled:.1%} to {high.sampled:.1%}): "
            f"{'good' if good else 'MISSED'}; says no to {says_no.wrong:.1%} of wrong lines "
            f"and {says_no.right:.1%} of right ones"
        )
    return within


def example(prompt: str, working: Working) -> Example:
    """Prompt and solution as token ids; the prompt is context, not trained."""
    return encoded(prompt, working, VOCABULARY)


if __name__ == "__main__":
    make_and_check(command_line("shop").parse_args(), MAKERS, measured)
