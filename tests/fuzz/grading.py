"""The table of right and wrong answers, graded: `python -m tests.fuzz.grading [count=2000] [seed=0]`.

`count` further pairs are made from the table's references: each handed back in every way a model writes an answer
(right), with one of its numbers, letters or brackets changed (wrong), and rewritten by an identity (right).
"""

import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.inputs.graders import verify_math

TABLE = Path(__file__).with_name("grading_pairs.txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A reference, a completion, and what a grader must say."""

    reference: str
    completion: str
    right: bool


def table() -> list[Pair]:
    """All written pairs."""
    lines = [line for line in TABLE.read_text().splitlines() if line and not line.startswith("#")]
    rows = [line.split(";;") for line in lines]
    return [
        Pair(reference=_lines(reference), completion=_lines(completion), right=verdict.strip() == "+")
        for verdict, reference, completion in rows
    ]


def _lines(text: str) -> str:
    return text.strip().replace("⏎", "\n")


_FORMS = (
    r"So we get \boxed{%s}.", r"The answer is $%s$.", "The answer is %s.", "Adding up, we find:\n\n$$%s$$",
    "%s", "**Answer:** %s", r"Hence \[ \boxed{%s} \]", r"Final answer: \(%s\)", "Therefore,\n#### %s",
    r"<think>Is it \boxed{999}? No.</think> It is $\boxed{ %s }$, as was to be shown.",
)  # fmt: skip
_UNITS = (
    r"\text{ cm}",
    r"\text{ km/h}",
    r"\text{ m/s}^2",
    r"\text{ hours}",
    r" \mathrm{kg}",
    r"\text{ apples}",
    r"\%",
    r"^\circ",
)
_NAMES = ("Tuesday", "parabola", "odd", "Yes", "north", "Charlotte", "isosceles triangle", "potassium", "decreases")


def _reference(rng: random.Random) -> str:
    """An answer of a kind that data sets have, as its reference says it."""
    n, m, k = (rng.randint(2, 99) for _ in range(3))
    x = rng.choice("xyztn")
    kinds = (
        str(n * m), str(-n), f"{n},{rng.randint(100, 999)}", f"{n}.{m}", rf"\frac{{{n}}}{{{m}}}",
        rf"-\dfrac{{{n}}}{{{m}}}", rf"{n}\frac{{{k}}}{{{k + m}}}", rf"\sqrt{{{n}}}", rf"{n}\sqrt{{{m}}}",
        rf"\frac{{{n}\pi}}{{{m}}}", rf"{n}^{{{k}}}", rf"{n} - {m}\sqrt{{{k}}}", rf"\frac{{{n}+\sqrt{{{m}}}}}{{{k}}}",
        rf"{n}+{m}i", rf"{x}^2 - {n}{x} + {m}", rf"\frac{{{x}+{n}}}{{{x}-{m}}}", rf"{n}{x}^{{{k}}}", rf"\ln {n}",
        rf"\log_{n} {m}", rf"e^{{{n}}}", rf"\sqrt[3]{{{n}}}", rf"({n}, -{m})", f"({n}, {m}, {k})", f"({n}, {n + m}]",
        rf"\left({n}, \frac{{{m}}}{{{k}}}\right)", f"[{n}, {n + m}]", rf"(-\infty, {n}) \cup [{n + m}, \infty)",
        f"{n}, -{m}", rf"\{{{n}, {n + m}, {n + m + k}\}}", rf"{n} \pm \sqrt{{{m}}}", f"{x} = {n}", f"y = {n}x - {m}",
        f"{n}x + {m}y = {k}", f"{x} > {n}", rf"{n} \le {x} < {n + m}", f"{n}{rng.choice(_UNITS)}",
        rf"\${n}.{rng.randint(10, 99)}", rf"{n}.{k}\%", rf"{rng.randint(101, 776)}_8",
        rf"\begin{{pmatrix}} {n} & -{m} \\ {k} & 0 \end{{pmatrix}}", rf"\begin{{pmatrix}} {n} \\ {m} \end{{pmatrix}}",
        rng.choice("ABCDE"), f"({rng.choice('ABCDE')})", rf"\text{{{rng.choice(_NAMES)}}}", rng.choice(_NAMES),
        f"{n}:{n + m}", rf"{n}.{m} \times 10^{{-{k}}}", rf"\frac{{{n}!}}{{{m}}}", rf"f({x}) = {n}{x}^2 - {m}",
        f"work {n}*{m}=<<{n}*{m}={n * m}>>{n * m}\n#### {n * m}", f"${n}$ and ${m}$",
        rf"so it is \boxed{{\frac{{{n}}}{{{m}}}}}",
    )  # fmt: skip
    return rng.choice(kinds)


def _said(reference: str) -> str:
    """The part of a reference that a completion would repeat."""
    said = reference.rsplit("####", 1)[-1].strip()
    return re.sub(r"^.*?\\boxed\{(.*)\}\W*$|^The answer is (.*)\.$", r"\1\2", said)


def _changed(said: str, rng: random.Random) -> str | None:
    """A wrong answer that is nearly right; None where this kind of change cannot be made."""
    digits = [m.start() for m in re.finditer(r"\d", said)]
    brackets = [m.start() for m in re.finditer(r"(?<!\w)(?<!\\left)[(\[](?=[^()]*,)", said)]
    how = rng.choice(("digit", "digit", "bracket", "fewer", "more", "kind"))
    if how == "digit" and digits and "\\sum" not in said:  # a sum from 0 may be that from 1
        at = rng.choice(digits)
        return f"{said[:at]}{(int(said[at]) + rng.randint(1, 8)) % 9}{said[at + 1 :]}"
    if how == "bracket" and brackets and "," in said and "\\{" not in said:
        at = brackets[0]
        return said[:at] + {"(": "[", "[": "("}[said[at]] + said[at + 1 :]
    if how == "fewer" and re.search(r", |\\pm| and ", said) and "(" not in said[1:]:
        return re.split(r", | and |\\pm", said)[-1].strip(" )]}\\$")
    if how == "more":
        return f"{said}, 1000003"
    if how == "kind":
        word = rng.choice([w for w in ("Sunday", "ellipse", "even", "No", "A", "E") if w.lower() not in said.lower()])
        return rf"\text{{{word}}}"
    return None


def _rewritten(said: str, rng: random.Random) -> str | None:
    """The same value in another spelling."""
    if re.fullmatch(r"-?\d+", said):
        n, k = int(said), rng.randint(2, 9)
        return rng.choice((f"{n}.0", rf"\frac{{{n * k}}}{{{k}}}", f"{n - k} + {k}", f"x = {n}", rf"\text{{{n}}}"))
    if match := re.fullmatch(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}", said):
        sign, up, down, k = match[1], int(match[2]), int(match[3]), rng.randint(2, 9)
        return rng.choice(
            (f"{sign}{up}/{down}", rf"{sign}\tfrac{{{up * k}}}{{{down * k}}}", rf"\frac{{{sign}{up}}}{{{down}}}")
        )
    if match := re.fullmatch(r"(\d+), (-?\d+)", said):
        return rng.choice(
            (f"{match[2]}, {match[1]}", rf"\{{{match[2]}, {match[1]}\}}", rf"{match[1]} \text{{ or }} {match[2]}")
        )
    if match := re.fullmatch(r"(\S+) - (\S+)", said):
        return f"-{match[2]} + {match[1]}"
    if (
        re.fullmatch(r"[\d\\a-z{}^+ -]*\\(?:sqrt|pi|ln)[\d\\a-z{}^+ -]*", said)
        and "\\pm" not in said
        and "\\text" not in said
    ):
        return rng.choice((rf"\frac{{2({said})}}{{2}}", f"({said}) + 1 - 1", f"x = {said}"))
    return None


def made(count: int, seed: int) -> Iterator[Pair]:
    """Pairs made from references of the table and from new ones; a function of its arguments."""
    rng = random.Random(f"grading/{seed}")
    written = [pair.reference for pair in table() if "^{9^" not in pair.reference]
    while count:
        reference = rng.choice(written) if rng.random() < 0.3 else _reference(rng)
        said, form = _said(reference), rng.choice(_FORMS)
        right = rng.random() < 0.5
        respelled = rng.random() < 0.5 and _rewritten(said, rng)
        answer = respelled or said if right else _changed(said, rng)
        if answer is None or (not right and _compact(answer) == _compact(said)):
            continue
        if "\\text{" in answer and "$" in answer:
            form = _FORMS[0]
        yield Pair(reference=reference, completion=form.replace("%s", answer), right=right)
        count -= 1


def _compact(text: str) -> str:
    return re.sub(r"\s|\\left|\\right", "", text)


def graded(pair: Pair) -> bool:
    """What the grader says of a pair."""
    return verify_math(pair.completion, pair.reference) == 1.0


def main(arguments: list[str]) -> int:
    """Print right of all, for right and for wrong pairs, and every pair that was graded wrongly."""
    values = dict(argument.split("=") for argument in arguments)
    pairs = {"table": table(), "made": list(made(int(values.get("count", 2000)), int(values.get("seed", 0))))}
    failed = 0
    for name, some in pairs.items():
        wrongly = [pair for pair in some if graded(pair) != pair.right]
        failed += len(wrongly)
        for pair in wrongly:
            print(f"graded wrongly: {pair}")
        for right, word in ((True, "right"), (False, "wrong")):
            every = sum(pair.right == right for pair in some)
            missed = sum(pair.right == right for pair in wrongly)
            print(f"{name}: {word} pairs graded as such: {every - missed} of {every}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
