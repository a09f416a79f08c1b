"""Recipe of the teacher and the student of the long task from scratch: ``python -m demos.recipes.make_long``.

Both have 0.6 M parameters. The teacher learns true texts and nothing else: six rounds of each first, then whole ones.
The student learns true texts, two rounds of each first, and then imitates pupils who leave out ever after what they
once forgot. About 7 minutes on one core. ``--check`` trains nothing: it compares the files with SHA256SUMS and prints
how far the teacher's help goes in both models' texts (`demos.recipes.measure_long`).
"""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from demos.recipes.measure_long import PROBLEMS, findings, share
from demos.recipes.pretrain import Example, Schedule, Shape, build_model, save_model, train
from demos.recipes.recipe import VOCAB_ROWS, command_line, encoded, make_and_check, word_tokenizer
from demos.tasks.long import VOCABULARY, LongProblem, LongTask
from demos.tasks.shop import Working

SHAPE = Shape(vocab=VOCAB_ROWS, hidden=128, layers=3, heads=4, kv_heads=2, ffn=384)
TWO_ROUNDS, SIX_ROUNDS = 74, 172  # tokens of a prompt and a text's first rounds

Writer = Callable[[LongProblem, random.Random], Working]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer of the task's words."""
    return word_tokenizer(VOCABULARY)


def truth(problem: LongProblem, _rng: random.Random) -> Working:
    """Text that the teacher learns."""
    return LongTask().solution(problem)


def pupil(problem: LongProblem, rng: random.Random) -> Working:
    """Text that the student learns."""
    return LongTask().pupil_solution(problem, rng)


def batches(writer: Writer, seed: int, texts: int, tokens: int | None = None) -> Iterator[list[Example]]:
    """Endless batches of texts, or of their first `tokens` tokens."""
    rng = random.Random(seed)
    while True:
        yield [_beginning(writer, rng, tokens) for _ in range(texts)]


def _beginning(writer: Writer, rng: random.Random, tokens: int | None) -> Example:
    problem = LongTask().problem(rng)
    whole = encoded(problem.prompt, writer(problem, rng), VOCABULARY)
    return Example(ids=whole.ids[:tokens], loss_mask=whole.loss_mask[:tokens])


def make_teacher(folder: Path) -> None:
    model = build_model(SHAPE, seed=91)
    # Six rounds are mostly repetition: repeating what is written is learned first, and reading the list after it.
    train(model, batches(truth, 1, 16, SIX_ROUNDS), Schedule(steps=250, lr=2e-3), "teacher, six rounds")
    train(model, batches(truth, 2, 8), Schedule(steps=400, lr=1.5e-3), "teacher, whole texts")
    save_model(model, make_tokenizer(), folder)


def make_student(folder: Path) -> None:
    model = build_model(SHAPE, seed=91)
    # In two rounds there is little to repeat, so this one goes by the last room, in the list or in the text.
    train(model, batches(truth, 1, 32, TWO_ROUNDS), Schedule(steps=400, lr=2e-3), "student, two rounds")
    train(model, batches(truth, 2, 8), Schedule(steps=250, lr=1.5e-3), "student, whole texts")
    train(model, batches(pupil, 94, 8), Schedule(steps=300, lr=1.5e-3, warmup=10), "student, pupils")
    save_model(model, make_tokenizer(), folder)


MAKERS = {"teacher": make_teacher, "student": make_student}

# Least and greatest share of rounds that are right at temperature 1, and of the teacher's words in the student's texts.
ROUNDS_RIGHT = {"teacher": (0.85, 1.0), "student": (0.01, 0.2)}
BEFORE_A_SLIP, AFTER_IT = (0.95, 1.0), (0.0, 0.3)


def measured(output: Path, _names: Sequence[str]) -> bool:
    """Whether both are as good as they should be, and the teacher no help after a slip; prints the whole table."""
    found = {name: findings(output / name, output / "teacher", PROBLEMS) for name in MAKERS}
    within = True
    for name, one in found.items():
        low, high = ROUNDS_RIGHT[name]
        within &= low <= one.sampled.rounds <= high
        print("\n".join(one.lines(name)))
        print(f"{name}: target of rounds right {low:.0%} to {high:.0%}: {'good' if within else 'MISSED'}")
    places = found["student"].places
    for slipped, (low, high) in ((False, BEFORE_A_SLIP), (True, AFTER_IT)):
        right = share([place for place in places if place.slipped is slipped]).right
        within &= low <= right <= high
        print(
            f"teacher right {'after' if slipped else 'before'} a slip in {right:.1%} (target {low:.0%} to {high:.0%}): "
            f"{'good' if low <= right <= high else 'MISSED'}"
        )
    return within


if __name__ == "__main__":
    make_and_check(command_line("long").parse_args(), MAKERS, measured)
