"""Recipe of the teacher and the student of the shop task from scratch: ``python -m demos.recipes.make_shop``.

The teacher (0.6 M parameters) learns true solutions with mistakes that are rejected and repaired. It learns
in two phases: with few mistakes it solves the problems, but does not know a wrong line when it sees one; the
second phase, with many, teaches it that, and a teacher is judged by what it says about a student's wrong
lines. The student (0.3 M parameters) imitates pupils that forget every second carry: it knows every fact, with
a systematic misconception on top.

About 9 minutes on one core. ``--check`` trains nothing: it compares the files with SHA256SUMS and measures
both checkpoints on 500 held-out problems.
"""

import argparse
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from demos.recipes.evaluate_task import Accuracy, accuracy, held_out_problems, load, rejection
from demos.recipes.pretrain import (
    BOS,
    EOS,
    Example,
    Schedule,
    Shape,
    build_model,
    digests,
    make_reproducible,
    save_model,
    train,
    wrap_tokenizer,
)
from demos.tasks.shop import SPECIAL_WORDS, VOCABULARY, ShopTask, Working, grade

# The 36 words, rounded up: rows beyond them are never trained towards.
VOCAB_ROWS = 64
BATCH = 32
DIGESTS = "SHA256SUMS"

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
    """Word-level tokenizer; texts are split and joined at spaces, and <bos> is put in front."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.add_special_tokens([*SPECIAL_WORDS, "<unk>"])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    wrapped = wrap_tokenizer(tokenizer)
    wrapped.unk_token = "<unk>"
    return wrapped


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


def check(output: Path, names: Sequence[str]) -> bool:
    """Compare the files with SHA256SUMS, measure the checkpoints, and print whether all is as it should be."""
    if not (output / DIGESTS).is_file():
        sys.exit(f"make_shop --check needs {output / DIGESTS}, but there is none: make the checkpoints first.")
    problems = held_out_problems(500, ShopTask())
    within = (output / DIGESTS).read_text(encoding="utf-8") == digest_lines(output)
    print(f"{DIGESTS}: {'good' if within else 'DIFFERS from the files'}")
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


def digest_lines(output: Path) -> str:
    """Content of SHA256SUMS, in the format of ``sha256sum --check``."""
    files = {path: digest for path, digest in digests(output).items() if path.split("/")[0] in MAKERS}
    return "".join(f"{digest}  {path}\n" for path, digest in files.items())


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the checkpoints of the shop task from scratch.")
    parser.add_argument("--output", type=Path, default=Path("assets/shop"))
    parser.add_argument("--only", choices=tuple(MAKERS))
    parser.add_argument("--check", action="store_true", help="train nothing, measure what is there")
    arguments = parser.parse_args()
    names = [arguments.only] if arguments.only else list(MAKERS)

    make_reproducible()
    if not arguments.check:
        for name in names:
            started = time.process_time()
            MAKERS[name](arguments.output / name)
            print(f"{name}: made in {time.process_time() - started:.0f} CPU s")
        lines = digest_lines(arguments.output)
        (arguments.output / DIGESTS).write_text(lines, encoding="utf-8")
        print(lines, end="")
    sys.exit(0 if check(arguments.output, names) else 1)


def example(prompt: str, working: Working) -> Example:
    """Prompt and solution as token ids; the prompt is context, not trained."""
    context = (BOS, *(_ID_OF[word] for word in prompt.split()))
    completion = (*(_ID_OF[word] for word in working.words), EOS)
    return Example(ids=context + completion, loss_mask=(False,) * len(context) + (*working.loss_mask, True))


_ID_OF = {word: index for index, word in enumerate(VOCABULARY)}


if __name__ == "__main__":
    main()
