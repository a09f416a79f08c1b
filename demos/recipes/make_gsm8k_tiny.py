r"""Recipe of a teacher and a student on real text: ``python -m demos.recipes.make_gsm8k_tiny --data PATH``.

PATH holds train.jsonl and test.jsonl of GSM8K (one ``{"question": ..., "answer": ...}`` per line). A prompt
is the question and a newline, a completion is the answer text as it stands in the file, and then <eos>:

    <bos>Natalia sold clips to 48 of her friends ... in April and May?\n
    Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n ... #### 72<eos>

Both models learn prompt and completion as text, with one byte-level BPE tokenizer made from the training
split. The teacher (2.2 M parameters) reads three quarters of it, the student (0.7 M) a sixth. Neither can do
the mathematics: they are here so that the whole system can be run on real text, on a laptop, in minutes. What
the student can learn is the teacher's distribution: reverse KL is what to watch, not the share of solved
problems.

About 7 minutes on one core.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from demos.recipes.pretrain import (
    BOS,
    EOS,
    Example,
    Schedule,
    Shape,
    build_model,
    collate,
    digests,
    make_reproducible,
    save_model,
    train,
    wrap_tokenizer,
)

VOCAB = 1024
BATCH = 8
# Longer problems (about one in forty) are left out: they would set the width of every batch they are in.
MAX_TOKENS = 400
HELD_OUT = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFactory:
    """Constructor of one of the models."""

    shape: Shape
    schedule: Schedule
    seed: int


RECIPES = {
    "teacher": RankFactory(
        shape=Shape(vocab=VOCAB, hidden=256, layers=3, heads=4, kv_heads=2, ffn=704),
        schedule=Schedule(steps=700, lr=3e-3, warmup=20, bfloat16=True),
        seed=1,
    ),
    "student": RankFactory(
        shape=Shape(vocab=VOCAB, hidden=128, layers=3, heads=4, kv_heads=1, ffn=384),
        schedule=Schedule(steps=150, lr=3e-3, warmup=20),
        seed=2,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A line of GSM8K as a prompt and a completion."""

    prompt: str
    completion: str


def read_problems(file: Path) -> list[Problem]:
    """The problems of one file; leaves with a sentence if there is no such file."""
    if not file.is_file():
        sys.exit(
            f"make_gsm8k_tiny needs GSM8K's {file.name}, but there is none in {file.parent}: "
            f"pass the folder that holds train.jsonl and test.jsonl with --data."
        )
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [Problem(prompt=row["question"] + "\n", completion=row["answer"]) for row in rows]


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE tokenizer: any text can be encoded, <unk> is not needed; <bos> is put in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=["<pad>", "<bos>", "<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return wrap_tokenizer(tokenizer)


def encode(tokenizer: PreTrainedTokenizerFast, problem: Problem, *, learn_prompt: bool) -> Example:
    """Token ids of prompt and completion, encoded apart, so that the prompt's are those a rollout starts from."""
    prompt = tokenizer.encode(problem.prompt)
    completion = [*tokenizer.encode(problem.completion, add_special_tokens=False), EOS]
    mask = [learn_prompt] * len(prompt) + [True] * len(completion)
    return Example(ids=(*prompt, *completion), loss_mask=tuple(mask))


def batches(examples: Sequence[Example], seed: int) -> Iterator[list[Example]]:
    """Endless batches in random order, of examples of similar length: less padding, the same text."""
    rng, bucket = random.Random(seed), 32 * BATCH
    while True:
        order = rng.sample(examples, len(examples))
        for start in range(0, len(order) - bucket + 1, bucket):
            by_length = sorted(order[start : start + bucket], key=lambda example: len(example.ids))
            rows = [by_length[i : i + BATCH] for i in range(0, bucket, BATCH)]
            yield from rng.sample(rows, len(rows))


@torch.no_grad()
def held_out_loss(model: Qwen3ForCausalLM, examples: Sequence[Example]) -> float:
    """Cross-entropy in nats per token over the learned tokens of `examples`."""
    total, count = 0.0, 0
    ordered = sorted(examples, key=lambda example: len(example.ids))
    for start in range(0, len(ordered), BATCH):
        ids, mask = collate(ordered[start : start + BATCH])
        logits = model(input_ids=ids[:, :-1]).logits
        learned = mask[:, 1:]
        total += F.cross_entropy(logits[learned], ids[:, 1:][learned], reduction="sum").item()
        count += int(learned.sum())
    return total / count


def make_checkpoints(data: Path, output: Path) -> None:
    problems, held_out = read_problems(data / "train.jsonl"), read_problems(data / "test.jsonl")
    tokenizer = make_tokenizer(problem.prompt + problem.completion for problem in problems)
    encoded = [encode(tokenizer, problem, learn_prompt=True) for problem in problems]
    examples = [example for example in encoded if len(example.ids) <= MAX_TOKENS]
    tokens = sum(len(example.ids) for example in examples)
    print(f"{len(examples)} of {len(encoded)} problems kept, {tokens} tokens")
    answers = [encode(tokenizer, problem, learn_prompt=False) for problem in held_out[:HELD_OUT]]
    for name, recipe in RECIPES.items():
        started = time.process_time()
        model = build_model(recipe.shape, recipe.seed)
        train(model, batches(examples, recipe.seed), recipe.schedule, name)
        size = sum(parameter.numel() for parameter in model.parameters())
        loss = held_out_loss(model, answers)
        print(f"{name}: {size} parameters, {loss:.3f} nats per answer token on {HELD_OUT} held-out problems")
        save_model(model, tokenizer, output / name)
        print(f"{name}: made in {time.process_time() - started:.0f} CPU s")
    for file, digest in digests(output).items():
        print(f"{digest}  {file}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a small teacher and student on GSM8K's text.")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/gsm8k"))
    parser.add_argument("--output", type=Path, default=Path("assets/gsm8k_tiny"))
    arguments = parser.parse_args()
    make_reproducible()
    make_checkpoints(arguments.data, arguments.output)


if __name__ == "__main__":
    main()
