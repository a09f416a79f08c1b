"""The phenomenon of the locks task in a checkpoint: ``python -m demos.recipes.measure_locks FOLDER``.

Samples answers to held-out problems and counts in them: wrong tries, the share of these that are noticed (``no``),
values tried again after they were refuted, first tries that are right, and why answers fail. Before, what it says to
the tries in texts that it did not write. ``--told`` shows the codes, as a teacher is shown them: what it writes then is
what off-policy training learns from.
"""

import argparse
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from demos.recipes.evaluate_task import Rejection, load
from demos.recipes.pretrain import make_reproducible
from demos.tasks.locks import (
    MARKS,
    MAX_COMPLETION_WORDS,
    Failure,
    LocksProblem,
    LocksTask,
    Verdict,
    judge,
    lock,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Findings in answers; shares are of answers, of wrong tries (`noticed`) or of locks (`at_once`)."""

    solved: float
    wrong: int
    noticed: float
    repeated: int
    at_once: float
    tainted: float
    failures: Counter[Failure]

    @property
    def line(self) -> str:
        """All of it in one line."""
        why = ", ".join(f"{count} {failure.name}" for failure, count in self.failures.most_common())
        return (
            f"solved {self.solved:.1%}; wrong tries {self.wrong} in {self.tainted:.1%} of answers, P(no | wrong try) "
            f"{self.noticed:.3f}, refuted values tried again {self.repeated}; first try right {self.at_once:.1%}; "
            f"failures: {why or 'none'}"
        )


def held_out(count: int) -> list[LocksProblem]:
    """The first problems of held-out locks."""
    locks = [lock(number, held_out=True) for number in range(len(MARKS) * count)]
    return [LocksProblem(locks=tuple(locks[at : at + len(MARKS)])) for at in range(0, len(locks), len(MARKS))]


def measure(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[LocksProblem],
    *,
    told: bool,
    sample: bool,
) -> Measured:
    """Judge one completion per problem."""
    torch.manual_seed(0)
    texts = write(model, tokenizer, problems, told=told, sample=sample)
    return found([judge(text, p.answer, ended=ended) for (text, ended), p in zip(texts, problems, strict=True)])


def write(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[LocksProblem],
    *,
    told: bool,
    sample: bool,
) -> list[tuple[str, bool]]:
    """Completion texts, and whether each ended within the limit."""
    return go_on(model, tokenizer, [p.teacher_prompt if told else p.prompt for p in problems], sample=sample)


@torch.no_grad()
def go_on(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], *, sample: bool
) -> list[tuple[str, bool]]:
    """Completion texts of any prompts, and whether each ended within the limit."""
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    # The ignore: transformers types `generate` for a protocol that its own models do not satisfy.
    generate = model.generate  # pyright: ignore[reportAttributeAccessIssue]
    written = generate(**inputs, max_new_tokens=MAX_COMPLETION_WORDS, **sampling)[:, inputs["input_ids"].shape[1] :]
    return [
        (str(tokenizer.decode(ids, skip_special_tokens=True)), tokenizer.eos_token_id in ids)
        for ids in written.tolist()
    ]


def found(verdicts: Sequence[Verdict]) -> Measured:
    """Sums over verdicts."""
    wrong = sum(v.wrong for v in verdicts)
    return Measured(
        solved=sum(v.failure is None for v in verdicts) / len(verdicts),
        wrong=wrong,
        noticed=sum(v.noticed for v in verdicts) / max(1, wrong),
        repeated=sum(v.repeated for v in verdicts),
        at_once=sum(v.at_once for v in verdicts) / max(1, sum(v.tried for v in verdicts)),
        tainted=sum(v.wrong > 0 for v in verdicts) / len(verdicts),
        failures=Counter(v.failure for v in verdicts if v.failure is not None),
    )


def rejection(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: Sequence[LocksProblem], *, told: bool
) -> Rejection:
    """Verdicts on the tries of true solutions with wrong tries in them, as the model reads these."""
    return verdicts(model, tokenizer, problems, [p.teacher_prompt if told else p.prompt for p in problems])


@torch.no_grad()
def verdicts(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[LocksProblem],
    prompts: Sequence[str],
) -> Rejection:
    """The same after any prompts of the problems."""
    chances: dict[bool, list[float]] = {False: [], True: []}
    no, rng = tokenizer.convert_tokens_to_ids("no"), random.Random(0)
    for problem, prompt in zip(problems, prompts, strict=True):
        before = prompt.split()
        words = [*before, *LocksTask().solution(problem, rng, wrong=0.5).words]
        logits = model(**tokenizer(" ".join(words), return_tensors="pt")).logits[0]
        for at in range(len(before), len(words)):  # <bos> stands before the words: row `at` is what comes there
            if words[at] in ("ok", "no"):
                chances[words[at] == "ok"].append(logits[at].softmax(-1)[no].item())
    return Rejection(wrong=sum(chances[False]) / len(chances[False]), right=sum(chances[True]) / len(chances[True]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what a checkpoint does with wrong tries.")
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--told", action="store_true", help="show the codes, as to a teacher")
    parser.add_argument("--problems", type=int, default=500)
    arguments = parser.parse_args()
    make_reproducible()
    for folder in arguments.folders:
        model, tokenizer = load(folder)
        reads = rejection(model, tokenizer, held_out(100), told=arguments.told)
        print(f"{folder}, reading others' tries: P(no | wrong) {reads.wrong:.4f}, P(no | right) {reads.right:.4f}")
        for sample in (False, True):
            said = measure(model, tokenizer, held_out(arguments.problems), told=arguments.told, sample=sample)
            print(f"{folder}, {'T=1' if sample else 'greedy'}: {said.line}", flush=True)


if __name__ == "__main__":
    main()
