"""Recipe of the checkpoints of the locks task from scratch: ``python -m demos.recipes.make_locks``.

The student (0.2 M parameters) imitates pupils that try one value after the other. They first always notice a wrong try
and then overlook many: the comparison is there, with a systematic weakness on top. The teacher begins as that student
and then reads the codes. It learns true solutions whose wrong tries, slips and wrong verdicts are kept from the loss,
so it knows what to say in states that its own answers never get into. The reader begins as that teacher and learns to
read texts about a problem (`demos/recipes/locks_reader.py`); alone it writes as pupils do.

About 5 minutes on one core. ``--check`` trains nothing: it compares the files with SHA256SUMS and measures the
checkpoints on 250 held-out problems. ``--only student --cold-start N`` makes another student, of other pupils.
"""

import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from demos.recipes.evaluate_task import load
from demos.recipes.locks_reader import reader_batches
from demos.recipes.measure_locks import held_out, measure
from demos.recipes.pretrain import Example, Schedule, Shape, build_model, save_model, train
from demos.recipes.recipe import VOCAB_ROWS, command_line, encoded, make_and_check, word_tokenizer
from demos.tasks.locks import VOCABULARY, LocksTask
from demos.tasks.shop import Working

BATCH = 64
TEACHER_BATCH = 48

SHAPE = Shape(vocab=VOCAB_ROWS, hidden=96, layers=2, heads=3, kv_heads=1, ffn=256)

# Lowest and highest share of problems solved at temperature 1.
TARGETS = {"student": (0.04, 0.12), "teacher": (0.95, 1.0), "reader": (0.04, 0.2)}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer of the task's words."""
    return word_tokenizer(VOCABULARY)


def teacher_batches(seed: int) -> Iterator[list[Example]]:
    """Endless batches of true solutions with mistakes kept from the loss, under prompts with the codes."""
    task, rng = LocksTask(), random.Random(seed)
    while True:
        problems = [task.problem(rng) for _ in range(TEACHER_BATCH)]
        wrong = rng.choice((0.0, 0.4, 0.7))  # one for all, so that they are about as long
        workings = [
            task.solution(p, rng, wrong, slip=rng.choice((0.0, 0.0, 0.15)), missed=rng.choice((0.0, 0.2)))
            for p in problems
        ]
        yield [example(p.teacher_prompt, working) for p, working in zip(problems, workings, strict=True)]


def student_batches(notice: float, seed: int) -> Iterator[list[Example]]:
    """Endless batches of pupils' solutions, under prompts without the codes."""
    task, rng = LocksTask(notice=notice), random.Random(seed)
    while True:
        problems = [task.problem(rng) for _ in range(BATCH)]
        yield [example(problem.prompt, task.pupil_solution(problem, rng)) for problem in problems]


def make_teacher(folder: Path, student: Path) -> None:
    """The student, taught with the codes: what it is ahead of the student is what it reads, and practice with that."""
    model, _ = load(student)
    train(model, teacher_batches(seed=51), Schedule(steps=260, lr=1.5e-3), "teacher")
    save_model(model, make_tokenizer(), folder)


def make_student(folder: Path, cold_start: int) -> None:
    model = build_model(SHAPE, seed=6 + 100 * cold_start)
    train(model, student_batches(1.0, seed=61 + 100 * cold_start), Schedule(steps=260, lr=2e-3), "student, notices")
    train(model, student_batches(0.6, seed=62 + 100 * cold_start), Schedule(steps=60, lr=1e-3), "student, overlooks")
    save_model(model, make_tokenizer(), folder)


def make_reader(folder: Path, teacher: Path) -> None:
    """The teacher, taught to read texts about a problem, and to overlook wrong tries without one."""
    model, _ = load(teacher)
    train(model, reader_batches(71, notice=0.6, whole=0.25), Schedule(steps=340, lr=1.5e-3), "reader, decides")
    save_model(model, make_tokenizer(), folder)
    model, _ = load(folder)  # as it is stored, in bfloat16: so either half can be repeated by itself
    train(model, reader_batches(72, notice=0.4, whole=1.0), Schedule(steps=80, lr=1e-3), "reader, calculates")
    save_model(model, make_tokenizer(), folder)


def measured(output: Path, names: Sequence[str]) -> bool:
    """Whether the checkpoints solve as many problems as they should; prints how many."""
    within = True
    for name in names:
        model, tokenizer = load(output / name)
        low, high = TARGETS[name]
        greedy, sampled = (
            measure(model, tokenizer, held_out(250), told=name == "teacher", sample=sample) for sample in (False, True)
        )
        good = low <= sampled.solved <= high
        within &= good
        print(f"{name}, greedy: {greedy.line}\n{name}, T=1: {sampled.line}")
        print(f"{name}: target at T=1 {low:.0%} to {high:.0%}: {'good' if good else 'MISSED'}")
    return within


def main() -> None:
    parser = command_line("locks")
    parser.add_argument("--cold-start", type=int, default=0, help="number of the student; 0 is shipped")
    arguments = parser.parse_args()
    makers = {
        "student": partial(make_student, cold_start=arguments.cold_start),
        "teacher": partial(make_teacher, student=arguments.output / "student"),
        "reader": partial(make_reader, teacher=arguments.output / "teacher"),
    }
    make_and_check(arguments, makers, measured)


def example(prompt: str, working: Working) -> Example:
    """Prompt and solution as token ids; the prompt is context, not trained."""
    return encoded(prompt, working, VOCABULARY)


if __name__ == "__main__":
    main()
