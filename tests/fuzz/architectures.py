"""`python -m tests.fuzz.architectures [family=NAME]`: every family as student and as teacher, planned and loaded.

A family works if packed and plain log-probabilities differ by no more than its dtype rounds, in float32 and bfloat16,
with queries and keys so large that windows, caps and sinks matter. Otherwise it has to be refused in the dry run, with
one sentence. Prints a table (docs/models.md) and one line of figures; exits with 1 if a family is silently wrong, is
refused only once it is loaded, or ends in a traceback.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from hf.packed_model import load_packed
from launch.config.run_config import run_config
from launch.plan.plan import make_plan
from learner.model import load_student
from opd.errors import OpdError
from tests.fuzz.families import FAMILIES, VOCABULARY, make

LENGTHS = (60, 7, 31, 1, 90)
SHOP = ["experiment=shop", "method=topk_reverse_kl", "max_tokens=16", "evaluation.max_tokens=16"]
Logits = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a family in one role: `refused` by the plan with this sentence, or the gaps of its two dtypes.

    `wrong` is empty if that is right. Gaps are in multiples of the floor (nats), which stands beside them.
    """

    refused: str = ""
    gaps: tuple[float, ...] = ()
    floors: tuple[float, ...] = ()
    wrong: str = ""

    def __str__(self) -> str:
        if self.wrong:
            return f"WRONG: {self.wrong}"
        return f"refused: {self.refused}" if self.refused else f"works ({', '.join(f'{gap:.1f}' for gap in self.gaps)})"


def tried(folder: Path, role: str) -> Outcome:
    """The model in `folder` as `role` ("student" or "teacher"), planned and then loaded."""
    path = [f"{role}.path={folder}", "student.max_model_len=224"]
    other = [f"teacher.path={folder}"] if role == "student" else []  # of the same vocabulary
    try:
        make_plan(run_config([*SHOP, *path, *other]))
    except OpdError as error:
        sentence = str(error).replace(f" {str(folder)!r}", "")
        return Outcome(refused=sentence, wrong="" if "\n" not in sentence else "two lines")
    except Exception as error:  # noqa: BLE001 (that there is none of any type is what is tried)
        return Outcome(wrong=f"traceback in the dry run: {type(error).__name__}: {error}")
    gaps, floors = [], []
    for dtype in (torch.float32, torch.bfloat16):
        try:
            gap, floor = measured(folder, role, dtype)
        except Exception as error:  # noqa: BLE001
            return Outcome(wrong=f"planned, but not loaded in {dtype}: {type(error).__name__}: {error}")
        gaps.append(gap / floor)
        floors.append(floor)
    wrong = f"gaps of {gaps} times the floor" if max(gaps) > 4 else ""
    return Outcome(gaps=tuple(gaps), floors=tuple(floors), wrong=wrong)


def measured(folder: Path, role: str, dtype: torch.dtype) -> tuple[float, float]:
    """(gap between packed and plain, what `dtype` rounds), both in nats: of each sequence the usual token's worst."""
    generator = torch.Generator().manual_seed(7)
    sequences = [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in LENGTHS]
    packed = _student(folder, dtype) if role == "student" else _teacher(folder, dtype)
    with torch.no_grad():
        ours = packed(sequences).float().log_softmax(-1).split(LENGTHS)
        plain, exact = (_plain(folder, kind, sequences) for kind in (dtype, torch.float64))
    usual = [float(e.abs().median()) for e in exact]
    grain = torch.finfo(dtype).eps * max(usual)
    return _gap(ours, plain), max(_gap(plain, exact), grain)


def _student(folder: Path, dtype: torch.dtype) -> Logits:
    return load_student(str(folder), dtype, gradient_checkpointing=False).logits


def _teacher(folder: Path, dtype: torch.dtype) -> Logits:
    model = load_packed(str(folder), dtype, torch.device("cpu"))
    return lambda sequences: model.logits(model.hidden(sequences))


def _plain(folder: Path, dtype: torch.dtype, sequences: Sequence[Tensor]) -> list[Tensor]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    if dtype is torch.float64 and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the fused kernel has no float64
    return [model(input_ids=ids[None], use_cache=False).logits[0].double().log_softmax(-1) for ids in sequences]


def _gap(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    worst = [(a - b).abs().amax(-1).median() for a, b in zip(ours, theirs, strict=True)]
    return float(torch.stack(worst).max())


def main(arguments: Sequence[str]) -> int:
    """Try the families that are named, or all."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    named = [a.removeprefix("family=") for a in arguments]
    outcomes: list[Outcome] = []
    print("| family | as student | as teacher (teacher.backend=TORCH) |\n|---|---|---|")
    for family in named or FAMILIES:
        with TemporaryDirectory() as folder:
            make(family, Path(folder))
            pair = [tried(Path(folder), role) for role in ("student", "teacher")]
        print(f"| {family} | {pair[0]} | {pair[1]} |", flush=True)
        outcomes += pair
    refused, wrong = sum(bool(o.refused) for o in outcomes), [o for o in outcomes if o.wrong]
    worst = max((gap for o in outcomes for gap in o.gaps), default=0.0)
    works = len(outcomes) - refused - len(wrong)
    print(
        f"\n{len(outcomes) // 2} families, {len(outcomes)} roles: {works} work (gaps up to {worst:.1f} times what the "
        f"dtype rounds), {refused} refused in the dry run, {len(wrong)} wrong"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
