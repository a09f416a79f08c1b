"""Tables of methods on the embedded stages: three seeds each, learning rates swept alike.

    python scripts/measure_methods.py full topk    # make, or go on with, these parts (some 40 runs each)
    python scripts/measure_methods.py              # only write the page again

A part is one `opd compare`; its figures (`comparison.json`) are kept in docs/methods/measured/, and the page
docs/methods/measured.md is written from all that are there. Several processes may share a part.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.cli.compare.command import compare_methods

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "docs" / "methods" / "measured"
PAGE = ROOT / "docs" / "methods" / "measured.md"


@dataclass(frozen=True)
class Stage:
    """A task with its teacher and student, and how long methods are trained on it."""

    title: str
    experiment: str
    steps: int
    about: str
    options: Sequence[str] = ()


SHOP = Stage(
    "Every method on the shop", "shop", 60,
    "64 completions a step; 500 held-out problems. Before training: 32.6 % at temperature 1, 46.4 % greedy, reverse"
    " KL 0.62. This is one small task whose student starts confident, and no ranking of papers: many claims need a"
    " problem that the shop does not have.",
)  # fmt: skip
NOISY = Stage(
    "A teacher that is wrong on a third of the problems and unsure on another: [noisy](../stages/noisy.md)",
    "noisy", 60,
    "64 completions a step; 500 held-out problems of all three kinds. Before training: 32.8 % at temperature 1,"
    " 49.2 % greedy.",
)  # fmt: skip
SELF = Stage(
    "The student as its own teacher: [locks_self](../stages/locks_self.md)", "locks_self", 40,
    "64 completions a step; 250 held-out problems. Before training: 7.0 to 8.6 % at temperature 1, 7.2 % greedy.",
)  # fmt: skip
READER = Stage(
    "What a teacher reads in texts of a step: [locks_reader](../stages/locks_reader.md)", "locks_reader", 40,
    "64 completions a step (8 of each problem where siblings are compared); 250 held-out problems.",
)  # fmt: skip
LONG = Stage(
    "A teacher whose help ends at the first slip: [long](../stages/long.md)", "long", 40,
    "16 completions a step; 64 held-out problems, one text each.",
    ("evaluation.samples=1", "evaluation.prompts.prompts_per_step=64", "evaluation.reverse_kl_prompts=8"),
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Methods that are compared in one go on a stage."""

    stage: Stage
    methods: Sequence[str]


def _shop(*methods: str) -> Part:
    return Part(SHOP, methods)


PARTS: Mapping[str, Part] = {
    "full": _shop(
        "full_reverse_kl", "full_forward_kl", "jensen_shannon", "skewed_reverse_kl", "skewed_forward_kl", "gkd", "sft",
    ),
    "topk": _shop(
        "topk_reverse_kl", "student_topk_reverse_kl", "local_support_matching", "many_faces", "mopd_topk",
        "rethinking_eq5", "rethinking_code",
    ),
    "sampled": _shop(
        "sampled_reverse_kl", "thinking_machines", "squared_reverse_kl", "ratio_reverse_kl", "sampled_jensen_shannon",
        "vopd", "vopd_topk",
    ),
    "supports": _shop(
        "union_reverse_kl", "intersection_reverse_kl", "union_forward_kl", "renormalized_forward_kl",
        "tail_bucket_reverse_kl", "tail_bucket_forward_kl", "tail_bucket_jensen_shannon",
    ),
    "estimators": _shop(
        "topk_jensen_shannon", "monte_carlo_reverse_kl", "monte_carlo_forward_kl", "minillm", "eopd",
        "ensemble_reverse_kl",
    ),
    "rewards": _shop("kdrl", "kdrl_annealed", "reward_extrapolation", "judged"),
    "graded": _shop("grpo", "grpo_token_mean", "opd_then_rl"),
    "proximal": _shop("cal_opd", "opd2", "top_d", "top_d_returns"),
    "stability": _shop("log_ratio_clip", "sign_log", "reference_kl", "golden_data", "fixed_advantage"),
    "shortened": _shop("reasoning_prefixes", "open_prompts", "cold_start"),
    "selection": _shop("fire", "ta_opd", "top_entropy", "top_divergence"),
    "writers": _shop("trd", "edge_opd", "effopd"),
    "ahead": _shop("trb", "lgr", "topd", "topd_downweight"),
    "bridges": _shop("veto", "taid", "reopold"),
    "added": _shop("lookahead_optimizer", "distillm2", "mopd_orm"),
    "self": _shop("opsd", "sdft", "sdpo", "context_distillation"),
    "self_taught": Part(
        SELF, ("context_distillation", "opsd", "sdft", "edge_opd", "sft", "grpo_token_mean"),
    ),
    "texts_read": Part(
        READER, ("sdpo", "trd", "context_distillation", "sft", "grpo_token_mean"),
    ),
    "noisy_teacher": Part(
        NOISY, (
            "full_reverse_kl", "fire", "ta_opd", "top_entropy", "top_divergence", "kdrl", "opd_then_rl",
            "grpo_token_mean",
        ),
    ),
    "long_texts": Part(
        LONG, ("sampled_reverse_kl", "reasoning_prefixes", "lgr", "topd", "trb"),
    ),
}  # fmt: skip

_GROUPS = ("prompts.prompts_per_step=8", "prompts.group_size=8")
_START = ("+teachers.start.path=${student.path}", "+teachers.start.dtype=FLOAT32")
NEEDS: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(("grpo", "grpo_token_mean"), (*_GROUPS, "learner.lr=3e-4")),
    **dict.fromkeys(("kdrl", "kdrl_annealed", "opd_then_rl", "sdpo", "mopd_orm"), _GROUPS),
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


INTRODUCTION = """# Methods, measured alike

Seeds 0, 1 and 2. Each method has the best of three learning rates (half, once and twice 1e-3; GRPO 3e-4), chosen by one
run with another seed on problems that are not reported here; `*`: the best is at the edge of those tried, so a better
one may lie beyond. Accuracies on held-out problems: at temperature 1 (mean@4, where no other is named) and greedy.
Reverse KL to the teacher in nats per token, exact. FLOP as `launch/monitors/accounting.py` counts them.

`python scripts/measure_methods.py PART` makes a part again: {parts}.
"""

TABLE = """
## {title}

`experiment={experiment}`, {steps} steps. {about}

| method | part | rate | T=1 accuracy of each seed | greedy | reverse KL | FLOP | completion tokens |
|---|---|---|---|---|---|---|---|"""


def arguments(part: str) -> list[str]:
    """Arguments of `opd compare` for a part."""
    stage, methods = PARTS[part].stage, PARTS[part].methods
    own = [f"{'+' * o.startswith('+')}{m}.{o.removeprefix('+')}" for m in methods for o in NEEDS.get(m, ())]
    return [
        f"methods=[{','.join(methods)}]", f"experiment={stage.experiment}", f"steps={stage.steps}", "seeds=3",
        "evaluations=1", "evaluation.on_start=false", f"run_name={stage.experiment}_{part}", *stage.options, *own,
    ]  # fmt: skip


def main() -> None:
    for part in sys.argv[1:]:
        begun = Path("runs") / f"{PARTS[part].stage.experiment}_{part}"
        compare_methods([*arguments(part), f"resume={str(begun.exists()).lower()}"])
        FIGURES.mkdir(exist_ok=True)
        (FIGURES / f"{part}.json").write_text((begun / "comparison.json").read_text())
    PAGE.write_text(page())


def page() -> str:
    """The page, from the figures that are there."""
    found = {part: json.loads(file.read_text()) for part in PARTS if (file := FIGURES / f"{part}.json").is_file()}
    made = [INTRODUCTION.format(parts=", ".join(f"`{part}`" for part in found))]
    for stage in (SHOP, NOISY, SELF, READER, LONG):
        parts = [part for part in found if PARTS[part].stage is stage]
        rows = sorted((row for part in parts for row in _rows(part, found[part])), key=lambda row: -row[0])
        if rows:
            made.append("\n".join([TABLE.format(**vars(stage)), *(row for _, row in rows), ""]))
    missing = [
        method for name, part in PARTS.items() if part.stage is SHOP and name not in found for method in part.methods
    ]
    rest = ", ".join(f"`{method}`" for method in missing) or "none"
    return "".join([*made, f"\nNot measured on the shop yet: {rest}.\n"])


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
