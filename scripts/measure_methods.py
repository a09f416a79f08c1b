"""Table of every shipped method on the embedded task: three seeds each, learning rates swept alike.

    python scripts/measure_methods.py full topk    # make, or go on with, these parts of it (some 40 runs each)
    python scripts/measure_methods.py              # only write the page again

A part is one `opd compare`; its figures (`comparison.json`) are kept in docs/methods/measured/, and the page
docs/methods/measured.md is written from all that are there. Several processes may share a part.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.cli.compare.command import compare_methods

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "docs" / "methods" / "measured"
PAGE = ROOT / "docs" / "methods" / "measured.md"

PARTS: Mapping[str, Sequence[str]] = {
    "full": (
        "full_reverse_kl", "full_forward_kl", "jensen_shannon", "skewed_reverse_kl", "skewed_forward_kl", "gkd", "sft",
    ),
    "topk": (
        "topk_reverse_kl", "student_topk_reverse_kl", "local_support_matching", "many_faces", "mopd_topk",
        "rethinking_eq5", "rethinking_code",
    ),
    "sampled": (
        "sampled_reverse_kl", "thinking_machines", "squared_reverse_kl", "ratio_reverse_kl", "sampled_jensen_shannon",
        "vopd", "vopd_topk",
    ),
    "supports": (
        "union_reverse_kl", "intersection_reverse_kl", "union_forward_kl", "renormalized_forward_kl",
        "tail_bucket_reverse_kl", "tail_bucket_forward_kl", "tail_bucket_jensen_shannon",
    ),
    "estimators": (
        "topk_jensen_shannon", "monte_carlo_reverse_kl", "monte_carlo_forward_kl", "minillm", "eopd",
        "ensemble_reverse_kl",
    ),
    "rewards": ("grpo", "grpo_token_mean", "kdrl", "kdrl_annealed", "opd_then_rl", "reward_extrapolation", "judged"),
    "stability": (
        "log_ratio_clip", "sign_log", "reference_kl", "golden_data", "cal_opd", "opd2", "top_d", "top_d_returns",
        "fixed_advantage",
    ),
    "selection": (
        "fire", "ta_opd", "top_entropy", "top_divergence", "reasoning_prefixes", "open_prompts", "cold_start",
    ),
    "writers": ("trb", "trd", "edge_opd", "effopd", "lgr", "topd"),
    "self": ("opsd", "sdft", "sdpo", "context_distillation"),
}  # fmt: skip

_GROUPS = ("prompts.prompts_per_step=8", "prompts.group_size=8")
_START = ("+teachers.start.path=${student.path}", "+teachers.start.dtype=FLOAT32")
NEEDS: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(("grpo", "grpo_token_mean"), (*_GROUPS, "learner.lr=3e-4")),
    **dict.fromkeys(("kdrl", "kdrl_annealed", "opd_then_rl", "sdpo"), _GROUPS),
    **dict.fromkeys(("reference_kl", "reward_extrapolation"), _START),
    "opd2": ("+teachers.base.path=${student.path}", "+teachers.base.dtype=FLOAT32"),
    "judged": (
        *_GROUPS, "+teachers.judge.path=${teacher.path}", "+teachers.judge.dtype=FLOAT32",
        "method.terms.verdict.scorer.yes=1", "method.terms.verdict.scorer.no=0",
    ),
    # a second teacher from what there is: the student before training, a quarter of the mixture
    "ensemble_reverse_kl": (
        "+teachers.before.path=${student.path}", "+teachers.before.dtype=FLOAT32",
        "method.scorer.shares.default=3", "+method.scorer.shares.before=1",
    ),
}  # fmt: skip
"""Settings without which a method means nothing: groups to compare, a second teacher; and GRPO's smaller rate."""


INTRODUCTION = """# Every method on the shop

60 steps of 64 completions on the embedded task, seeds 0, 1 and 2. Each method has the best of three learning rates
(half, once and twice 1e-3; GRPO 3e-4), chosen by one run with another seed on problems that are not reported here; `*`:
the best is at the edge of those tried, so a better one may lie beyond. Accuracies on 500 held-out problems: at
temperature 1 (mean@4; 32.6 % before) and greedy (46.4 % before). Reverse KL to the teacher in nats per token, exact
(0.62 before). FLOP as `launch/monitors/accounting.py` counts them.

`python scripts/measure_methods.py PART` makes a part again: {parts}. This is one small task whose student starts
confident, and no ranking of papers: many claims need a problem that the shop does not have
([stages](../stages/locks.md)).

| method | part | rate | T=1 accuracy of each seed | greedy | reverse KL | FLOP | completion tokens |
|---|---|---|---|---|---|---|---|"""


def arguments(part: str) -> list[str]:
    """Arguments of `opd compare` for a part."""
    methods = PARTS[part]
    own = [f"{'+' * o.startswith('+')}{m}.{o.removeprefix('+')}" for m in methods for o in NEEDS.get(m, ())]
    return [
        f"methods=[{','.join(methods)}]", "experiment=shop", "steps=60", "seeds=3", "evaluations=1",
        f"run_name=shop_{part}", *own,
    ]  # fmt: skip


def main() -> None:
    for part in sys.argv[1:]:
        begun = Path("runs") / f"shop_{part}"
        compare_methods([*arguments(part), f"resume={str(begun.exists()).lower()}"])
        FIGURES.mkdir(exist_ok=True)
        (FIGURES / f"{part}.json").write_text((begun / "comparison.json").read_text())
    PAGE.write_text(page())


def page() -> str:
    """The page, from the figures that are there."""
    found = {part: json.loads(file.read_text()) for part in PARTS if (file := FIGURES / f"{part}.json").is_file()}
    rows = sorted((row for part, figures in found.items() for row in _rows(part, figures)), key=lambda row: -row[0])
    missing = [method for part in PARTS if part not in found for method in PARTS[part]]
    head = INTRODUCTION.format(parts=", ".join(f"`{part}`" for part in found))
    rest = ", ".join(f"`{method}`" for method in missing) or "none"
    return "\n".join([head, *(row for _, row in rows), "", f"Not measured yet: {rest}.", ""])


def _rows(part: str, figures: Mapping[str, Any]) -> Iterator[tuple[float, str]]:
    """Mean accuracy and line of every method of a part."""
    for arm in figures["arms"]:
        name = arm["arm"]
        runs = sorted((run for run in figures["runs"] if run["arm"] == name), key=lambda run: run["seed"])
        ends = [run["evaluations"][-1] for run in runs]
        edge = any(f" of {name} is " in note and "censored" in note for note in figures["notes"])
        cells = [
            f"`{name}`", part, f"{runs[0]['learning_rate']:g}{'*' * edge}",
            f"{_shares(ends, 'mean_at_k')} %",
            f"{_shares(ends, 'greedy')} %",
            ", ".join(f"{end['reverse_kl']:.3f}" for end in ends),
            f"{sum(end['flops'] for end in ends) / len(ends) / 1e12:.2f} T",
            f"{sum(end['tokens'] for end in ends) / len(ends) / 1e3:.0f} k",
        ]  # fmt: skip
        yield arm["sampled"]["mean"], f"| {' | '.join(cells)} |"


def _shares(ends: Sequence[Mapping[str, Any]], name: str) -> str:
    return ", ".join(f"{100 * end[name]:.1f}" for end in ends)


if __name__ == "__main__":
    main()
