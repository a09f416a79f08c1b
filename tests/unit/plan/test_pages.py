"""Figures of memory on the pages are what the plan says: README, docs/gpus.md and docs/models.md."""

import json
import re
from pathlib import Path

import pytest

from launch.config.run_config import run_config
from launch.plan.checks.devices import resolved
from launch.plan.memory.footprint import peak
from launch.plan.memory.parts import GIB, card_bytes, parts
from tests.command import ROOT
from tests.records import with_row
from tests.unit.plan.test_layout import GOLDEN, models, pair, shows

__all__ = ["models"]
LONG_PAGE = ROOT / "docs" / "models.md"
# Start of a row in docs/gpus.md -> its case in the golden file.
LAYOUTS = {
    "0.6B, 4B, one of 16 GB": "16 GB",
    "0.6B, 4B, one of 24 GB": "24 GB",
    "0.6B, 4B, one of 24 GB, with adapters": "24 GB, adapters",
    "0.6B, 4B, one of 24 GB, `tokens_per_microbatch` AUTO": "24 GB, AUTO",
    "0.6B, 4B, one of 24 GB, with adapters, AUTO": "24 GB, adapters, AUTO",
    "0.6B, 4B, two of 24 GB": "two of 24 GB",
    "1.7B, 8B, one of 80 GB": "80 GB",
    "1.7B, 8B, one of 80 GB, `tokens_per_microbatch` AUTO": "80 GB, AUTO",
    "1.7B, 8B, one of 80 GB, not checkpointed": "80 GB, not checkpointed",
    "1.7B, 32B, four of 48 GB": "four of 48 GB, a teacher larger than one",
    "1.7B, 32B, four of 48 GB, the teacher over two": "four of 48 GB, a teacher over two",
    "8B, 32B, eight of 80 GB": "eight of 80 GB",
    "8B, 32B, eight of 80 GB, `tokens_per_microbatch` AUTO": "eight of 80 GB, AUTO",
    "1.7B, 30B-A3B, eight of 80 GB": "eight of 80 GB, a mixture teaches",
    "30B-A3B, 235B-A22B, eight of 80 GB": "eight of 80 GB, a mixture",
}
# Student, teacher, learner ranks, ZeRO stage, tokens of a micro-batch, GB of a GPU.
LONG = [
    ("1.7B", "8B", 1, 2, 32_768, 80),
    ("1.7B", "8B", 1, 2, 16_384, 80),
    ("8B", "32B", 4, 2, 32_768, 80),
    ("8B", "32B", 4, 2, 16_384, 80),
    ("30B-A3B", "32B", 8, 3, 16_384, 141),
]


def cells(start: str) -> list[str]:
    """Cells of the row of docs/gpus.md that starts so, without the first."""
    (found,) = re.findall(rf"^\| {re.escape(start)} \| (.*) \|$", (ROOT / "docs/gpus.md").read_text(), re.M)
    return found.split(" | ")


@pytest.mark.parametrize(("start", "case"), LAYOUTS.items(), ids=LAYOUTS.values())
def test_a_layout_on_the_page_is_the_recorded_one(start: str, case: str) -> None:
    recorded, shown = json.loads(GOLDEN.read_text())[case], cells(start)
    refused = str(recorded.get("refused", ""))
    memory = (
        re.findall(r"(\d+\.\d)(?: GiB)?(?: at least)?[,;]", refused.partition(": ")[2]) or recorded["memory"].values()
    )
    assert [float(cell.split()[0]) for cell in shown[:3]] == [float(gib) for gib in memory]
    assert shown[3].startswith("**refused**") == bool(refused)


def test_readme_says_what_the_page_of_gpus_says() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in ("one_gpu_24gb", "one_gpu_80gb"):
        assert f"{cells(f'`experiment={name}`')[3]} GiB" in re.findall(rf"experiment={name} .*", readme)[0]


def long_row(models: Path, student: str, teacher: str, ranks: int, stage: int, tokens: int, gb: int) -> str:
    """What docs/models.md says about a run of long texts."""
    overrides = [
        *(given for given in pair(models, student, teacher) if "max_model_len" not in given),
        "student.max_model_len=32768", "teacher.max_batch_tokens=32768", "max_tokens=31744", "method=topk_reverse_kl",
        "learner.dtype=BFLOAT16", "learner.gradient_checkpointing=true", f"learner.zero_stage={stage}",
        f"learner.ranks={ranks}", f"learner.tokens_per_microbatch={tokens}", f"cluster.gpu_memory_gib={gb}",
        "cluster.layout=GIVEN", *(f"cluster.gpus_per_{role}=1" for role in ("engine", "teacher", "learner")),
    ]  # fmt: skip
    config = resolved(run_config(overrides))
    gib = {part.name: f"{peak(part.role).total / GIB:.1f}" for part in parts(config, card_bytes(config))}
    ranked = f"{ranks} rank{'s' * (ranks > 1)} (ZeRO-{stage})"
    return (
        f"| {student}, {teacher}, {ranked}, {tokens:,} tokens | {gib['learner rank']} of {gb} GB | "
        f"{gib['teacher actor']} |"
    )


@pytest.mark.parametrize("case", LONG, ids=lambda case: f"{case[0]}, {case[4]}")
def test_a_run_of_long_texts_is_told_as_planned(
    case: tuple[str, str, int, int, int, int], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shows(monkeypatch, 16)
    written = long_row(models, *case)
    assert written in LONG_PAGE.read_text(), f"{written}: record it with `python -m tests.records`"


def record(models: Path) -> None:
    """Write the rows of docs/models.md."""
    with pytest.MonkeyPatch.context() as patch:
        shows(patch, 16)
        for case in LONG:
            with_row(LONG_PAGE, long_row(models, *case))
