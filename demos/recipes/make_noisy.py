"""Recipe of the teacher of the noisy task: ``python -m demos.recipes.make_noisy``.

The shop's teacher (0.6 M parameters), taught to be wrong on one third of the problems and unsure on another, as
`demos.tasks.noisy` says. The student is the shop's. About 3 minutes on one core. ``--check`` trains nothing: it
compares the files with SHA256SUMS and measures teacher and student on 200 held-out problems of each part.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import Qwen3ForCausalLM

from demos.recipes.evaluate_task import accuracy, held_out_problems, load
from demos.recipes.make_shop import BATCH, example, make_tokenizer
from demos.recipes.pretrain import Example, Schedule, collate, save_model, train
from demos.recipes.recipe import command_line, make_and_check
from demos.tasks.noisy import NoisyTask, Part
from demos.tasks.shop import VOCABULARY, ShopTask, grade

SHOP = Path("assets/shop")
PROBLEMS = 200

# Lowest and highest share of the teacher's sampled solutions that are right; without carrying, nearly half of them are.
TARGETS = {Part.CLEAN: (0.95, 1.0), Part.WRONG: (0.35, 0.5), Part.UNSURE: (0.0, 0.2)}


def teacher_batches(seed: int) -> Iterator[list[Example]]:
    """Endless batches of the teacher's solutions, with mistakes that it rejects and repairs."""
    task, rng = NoisyTask(), random.Random(seed)
    while True:
        problems = [task.problem(rng) for _ in range(BATCH)]
        yield [example(p.prompt, task.solution(p, rng, mistakes=0.3)) for p in problems]


def make_teacher(folder: Path) -> None:
    model, _ = load(SHOP / "teacher")
    train(model, teacher_batches(seed=71), Schedule(steps=420, lr=1.2e-3), "teacher")
    save_model(model, make_tokenizer(), folder)


@torch.no_grad()
def entropies(model: Qwen3ForCausalLM, part: Part) -> tuple[float, float]:
    """Mean entropy in nats at the result digits of right solutions, and at all of their tokens."""
    problems = held_out_problems(100, NoisyTask(part=part))
    texts = [example(p.prompt, ShopTask().solution(p, random.Random(0))) for p in problems]
    ids, mask = collate(texts)
    log_probs = model(input_ids=ids[:, :-1]).logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    learned = mask[:, 1:]
    first = ids[:, :-1] == VOCABULARY.index("=")  # predicts the first digit of a result
    second = torch.roll(first, 1, dims=1)
    return entropy[(first | second) & learned].mean().item(), entropy[learned].mean().item()


def measured(output: Path, _names: Sequence[str]) -> bool:
    """Whether the teacher is as right, wrong and unsure as it should be; prints what it and the student know."""
    within = True
    for name, folder in (("teacher", output / "teacher"), ("student", SHOP / "student")):
        model, tokenizer = load(folder)
        for part, (low, high) in TARGETS.items():
            share = accuracy(model, tokenizer, held_out_problems(PROBLEMS, NoisyTask(part=part)), grade)
            results, everywhere = entropies(model, part)
            good = name == "student" or low <= share.sampled <= high
            within &= good
            print(
                f"{name} on {part.name}: greedy {share.greedy:.1%}, sampled {share.sampled:.1%}, entropy of results "
                f"{results:.3f}, of all tokens {everywhere:.3f} nats: {'good' if good else 'MISSED'}"
            )
    return within


if __name__ == "__main__":
    make_and_check(command_line("noisy").parse_args(), {"teacher": make_teacher}, measured)
