"""Evaluation of a checkpoint on held-out problems: share solved, and whether it rejects wrong lines."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

from demos.tasks.shop import ShopProblem, ShopTask, without_carry

HELD_OUT_SEED = 1_000_000
Grade = Callable[[str, str], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Shares of solved problems, e.g. ``Accuracy(greedy=0.41, sampled=0.34)``."""

    greedy: float
    sampled: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """Mean probability of `no` after wrong and after right lines, e.g. 0.99 and 0.01 for a good teacher."""

    wrong: float
    right: float


class Problem(Protocol):
    """A problem with a prompt and a grader."""

    @property
    def prompt(self) -> str: ...

    @property
    def answer(self) -> str: ...


P = TypeVar("P", covariant=True)


class Drawer(Protocol[P]):
    """A task that draws problems: `ShopTask()`, `PeakTask()`."""

    def problem(self, rng: random.Random) -> P:
        """One problem."""
        ...


def held_out_problems(count: int, task: Drawer[P]) -> list[P]:
    """The same held-out problems every time, from a seed that no recipe trains on."""
    rng = random.Random(HELD_OUT_SEED)
    return [task.problem(rng) for _ in range(count)]


def load(folder: Path) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """The model of a checkpoint folder, in float32, and its tokenizer."""
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def accuracy(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem], grade: Grade
) -> Accuracy:
    """Grade one greedy and one sampled completion per problem."""
    torch.manual_seed(0)
    shares = {
        sample: _share_solved(complete(model, tokenizer, problems, sample=sample), problems, grade)
        for sample in (False, True)
    }
    return Accuracy(greedy=shares[False], sampled=shares[True])


@torch.no_grad()
def complete(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Problem],
    *,
    sample: bool,
) -> list[str | None]:
    """Completion texts without their <eos>; None for one that did not end within the limit."""
    inputs = tokenizer([problem.prompt for problem in problems], return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    limit = ShopTask().max_completion_words
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    # The ignore: transformers types `generate` for a protocol that its own models do not satisfy.
    generate = model.generate  # pyright: ignore[reportAttributeAccessIssue]
    written = generate(**inputs, max_new_tokens=limit, **sampling)[:, inputs["input_ids"].shape[1] :]
    return [
        str(tokenizer.decode(ids, skip_special_tokens=True)) if tokenizer.eos_token_id in ids else None
        for ids in written.tolist()
    ]


@torch.no_grad()
def rejection(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: Sequence[ShopProblem]
) -> Rejection:
    """Verdicts on every line that crosses a ten, once with its carry and once without.

    A teacher that is right by itself need not know a wrong line when it reads one, and reading a student's
    wrong lines is what it is for.
    """
    chances: dict[bool, list[float]] = {False: [], True: []}
    no = tokenizer.convert_tokens_to_ids("no")
    for problem in problems:
        words = ShopTask().solution(problem, random.Random(0)).words
        for step in problem.steps:
            forgotten = without_carry(step)
            if forgotten is None:
                continue
            before_result = words[: words.index(step.day) + 6]
            for result in (step.after, forgotten):
                text = " ".join((problem.prompt, *before_result, *f"{result:02d}"))
                logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
                chances[result == step.after].append(logits.softmax(-1)[no].item())
    return Rejection(wrong=sum(chances[False]) / len(chances[False]), right=sum(chances[True]) / len(chances[True]))


def _share_solved(completions: Sequence[str | None], problems: Sequence[Problem], grade: Grade) -> float:
    grades = [
        0.0 if completion is None else grade(completion, problem.answer)
        for completion, problem in zip(completions, problems, strict=True)
    ]
    return sum(grades) / len(grades)
