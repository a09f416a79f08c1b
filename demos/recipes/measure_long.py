"""The phenomenon of the long task in two checkpoints: how far the teacher's help goes.

``python -m demos.recipes.measure_long TEACHER WRITER...`` lets writers write and has the teacher read it. By depth,
before and after a text's first slip: how sure the teacher is (its greatest probability: the supervision fidelity), how
often its likeliest word is the one that the list asks for, and how often the word that was written is not.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from demos.recipes.evaluate_task import held_out_problems, load
from demos.recipes.pretrain import make_reproducible
from demos.tasks.long import END, MAX_COMPLETION_WORDS, STAIRS, LongProblem, LongTask, due, first_slip, grade

DEPTHS = (0, 64, 256)  # where the buckets of `distill/fidelity_*` begin
PROBLEMS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A place of a text, as the teacher reads it.

    `due` is the word that the list asks for there, `written` the one that stands there, `likeliest` the teacher's,
    `fidelity` that one's probability, and `slipped` says whether a slip stands before.
    """

    depth: int
    due: str | None
    written: str
    likeliest: str
    fidelity: float
    slipped: bool


Choice = Callable[[Place], bool]

CHOICES: Mapping[str, Choice] = {
    "all": lambda _place: True,
    "before the first slip": lambda place: not place.slipped,
    "after it": lambda place: place.slipped,
    "stairs due": lambda place: place.due in STAIRS,
    "stairs due, before the first slip": lambda place: place.due in STAIRS and not place.slipped,
    "stairs due, after it": lambda place: place.due in STAIRS and place.slipped,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Means over places: fidelity, the teacher's likeliest word being due, the written one not being due."""

    places: int
    fidelity: float
    right: float
    slips: float


def share(places: Sequence[Place]) -> Share:
    """Means over the places where something is due."""
    known = [place for place in places if place.due is not None]
    count = max(1, len(known))
    return Share(
        places=len(known),
        fidelity=sum(p.fidelity for p in known) / count,
        right=sum(p.likeliest == p.due for p in known) / count,
        slips=sum(p.written != p.due for p in known) / count,
    )


def at_depth(places: Sequence[Place], bucket: int) -> list[Place]:
    """The places of one bucket of `DEPTHS`."""
    edges = (*DEPTHS, MAX_COMPLETION_WORDS + 1)
    return [place for place in places if edges[bucket] <= place.depth < edges[bucket + 1]]


@torch.no_grad()
def write(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: Sequence[LongProblem], *, sample: bool
) -> list[str]:
    """Completion texts, without an end-of-text token; one that did not end within the limit lacks its last word."""
    torch.manual_seed(0)
    inputs = tokenizer([p.prompt for p in problems], return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    # The ignore: transformers types `generate` for a protocol that its own models do not satisfy.
    generate = model.generate  # pyright: ignore[reportAttributeAccessIssue]
    written = generate(**inputs, max_new_tokens=MAX_COMPLETION_WORDS, **sampling)[:, inputs["input_ids"].shape[1] :]
    return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in written.tolist()]


@torch.no_grad()
def read(
    teacher: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: Sequence[LongProblem], texts: Sequence[str]
) -> list[Place]:
    """Every place of the texts, as the teacher reads it."""
    places: list[Place] = []
    for problem, text in zip(problems, texts, strict=True):
        words = text.split()
        ids: Tensor = tokenizer(f"{problem.prompt} {text}", return_tensors="pt")["input_ids"]
        rows = teacher(input_ids=ids).logits[0, -len(words) - 1 : -1].softmax(-1)
        likeliest = tokenizer.convert_ids_to_tokens(rows.argmax(-1).tolist())
        asked, slip = due(words, problem.circle), first_slip(words, problem.circle)
        places += [
            Place(
                depth=at,
                due=asked[at],
                written=word,
                likeliest=likeliest[at],
                fidelity=rows[at].max().item(),
                slipped=slip is not None and at > slip,
            )
            for at, word in enumerate(words)
        ]
    return places


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Texts of one model, graded: shares of rounds, of texts without a slip and of texts that end, and their length."""

    rounds: float
    whole: float
    ended: float
    words: float

    @property
    def line(self) -> str:
        """All of it in one line."""
        return (
            f"rounds right {self.rounds:.1%}, texts without a slip {self.whole:.1%}, ended {self.ended:.1%}, "
            f"{self.words:.0f} words each"
        )


def graded(texts: Sequence[str], problems: Sequence[LongProblem]) -> Texts:
    """Means over texts."""
    count = len(texts)
    return Texts(
        rounds=sum(grade(text, p.answer) for text, p in zip(texts, problems, strict=True)) / count,
        whole=sum(first_slip(text.split(), p.circle) is None for text, p in zip(texts, problems, strict=True)) / count,
        ended=sum(text.endswith(END) for text in texts) / count,
        words=sum(len(text.split()) for text in texts) / count,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Grades of a model's texts, greedy and at temperature 1, and the latter as the teacher reads them."""

    greedy: Texts
    sampled: Texts
    places: Sequence[Place]

    def lines(self, name: str) -> list[str]:
        """The findings as a page of text."""
        head = [f"{name}, greedy: {self.greedy.line}", f"{name}, T=1: {self.sampled.line}; read by the teacher:"]
        return [*head, *table(self.places)]


def findings(writer: Path, teacher: Path, count: int) -> Findings:
    """Findings in the texts of one checkpoint on held-out problems."""
    problems = held_out_problems(count, LongTask())
    model, tokenizer = load(writer)
    greedy, texts = (write(model, tokenizer, problems, sample=sample) for sample in (False, True))
    return Findings(
        greedy=graded(greedy, problems),
        sampled=graded(texts, problems),
        places=read(load(teacher)[0], tokenizer, problems, texts),
    )


def table(places: Sequence[Place]) -> list[str]:
    """Lines of a table: for every choice and depth fidelity, right words, slips and the number of places."""
    begins = " | ".join(f"from word {depth}".ljust(31) for depth in DEPTHS)
    lines = [f"  {'fidelity, likeliest right, slips':34s} {begins}"]
    for name, choice in CHOICES.items():
        shares = [share([p for p in at_depth(places, bucket) if choice(p)]) for bucket in range(len(DEPTHS))]
        cells = [f"{s.fidelity:.3f} {s.right:6.1%} {s.slips:6.2%} ({s.places:6d})" if s.places else "-" for s in shares]
        lines.append(f"  {name:34s} " + " | ".join(cell.ljust(31) for cell in cells))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how far a teacher's help goes in long texts.")
    parser.add_argument("teacher", type=Path)
    parser.add_argument("writers", type=Path, nargs="+", help="folders whose texts the teacher reads")
    parser.add_argument("--problems", type=int, default=PROBLEMS)
    arguments = parser.parse_args()
    make_reproducible()
    for writer in arguments.writers:
        found = findings(writer, arguments.teacher, arguments.problems)
        print("\n".join(found.lines(str(writer))), flush=True)


if __name__ == "__main__":
    main()
