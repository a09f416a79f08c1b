"""Memory and time of full-vocabulary losses against other implementations (P3): loss, and both gradients, in float32.

    python benchmarks/loss.py memory TOKENS VOCABULARY WIDTH [ARM ...]        peak memory, a fresh process per arm
    python benchmarks/loss.py time TOKENS VOCABULARY WIDTH ROUNDS [ARM ...]   arms interleaved in one process

Arms: `naive` (reverse KL from whole logits, autograd), `trl_jsd` (the loss of TRL's `DistillationTrainer` as released,
tiled over tokens and vocabulary), `liger_jsd` (`LigerFusedLinearJSDLoss`, its torch path without compilation), `ours`
(`flat_loss` as the learner calls it, diagnostics included) and `bare` (the same without diagnostics). Peers are used
where they can be imported (`pip install --no-deps --target FOLDER trl liger-kernel`, then `PYTHONPATH=.:FOLDER`), and
the table names their versions. `*_jsd` arms compute JSD(0.5), the others reverse KL. One thread; times are CPU seconds
of the process, which a busy machine disturbs less than the clock. The allocator is set as in a learner's process.
Memory is the growth of the peak resident set beyond the inputs; both gradients are part of it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from learner.config import environment
from opd.loss.chunked import Evaluate, StudentLogits, flat_loss, read
from opd.loss.metrics import diagnosed
from opd.objectives.vocabulary import FullReverseKL, JensenShannon
from opd.settings.devices import Device
from opd.types import Batch, HiddenScores, TokenLoss

MEMORY_TARGET, TIME_TARGET = 12.0, 1.05
REFERENCE = {"ours": "naive", "bare": "naive", "ours_jsd": "trl_jsd", "bare_jsd": "trl_jsd", "liger_jsd": "trl_jsd"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Hidden states `[L, H]` and output matrices `[V, H]` of student and teacher; the student's want gradients."""

    hidden: Tensor
    head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    targets: Tensor

    @staticmethod
    def make(tokens: int, vocabulary: int, width: int) -> "Case":
        draw = torch.Generator().manual_seed(0)

        def normal(rows: int) -> Tensor:
            return torch.randn(rows, width, generator=draw)

        return Case(
            hidden=normal(tokens).requires_grad_(),
            head=(normal(vocabulary) * 2 / width**0.5).requires_grad_(),
            teacher_hidden=normal(tokens),
            teacher_head=normal(vocabulary) * 2 / width**0.5,
            targets=torch.randint(vocabulary, (tokens,), generator=draw),
        )


Arm = Callable[[Case], Tensor]


def whole_logits(case: Case) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        teacher = case.teacher_hidden @ case.teacher_head.T
    return case.hidden @ case.head.T, teacher


def naive(case: Case) -> Tensor:
    student, teacher = whole_logits(case)
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    weights = torch.ones(len(p))
    return (weights * (p.exp() * (p - q)).sum(-1)).sum() / len(p)


def trl_jsd(case: Case) -> Tensor:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss  # pyright: ignore[reportMissingImports]

    mask = torch.ones(1, len(case.targets), dtype=torch.long)
    loss, _, _ = _chunked_divergence_loss(
        case.hidden[None], case.teacher_hidden[None], case.head, case.teacher_head, mask, beta=0.5
    )
    return loss


def liger_jsd(case: Case) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # pyright: ignore[reportMissingImports]

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=False)
    return loss(case.hidden, case.head, case.teacher_hidden, case.teacher_head, case.targets)


def flat(objective: Any, diagnostics: bool) -> Arm:
    def arm(case: Case) -> Tensor:
        every = torch.arange(len(case.targets))
        logprobs = torch.full((len(every),), -1.0)
        batch = Batch(
            input_ids=every, position_ids=every, cu_seqlens=torch.tensor([0, len(every)]), predict_at=every,
            target_ids=case.targets, behavior_logprobs=logprobs, weights=torch.ones(len(every)), depth=every,
            scores=HiddenScores(logprobs=logprobs, hidden=case.teacher_hidden), denominator=float(len(every)),
        )  # fmt: skip

        def prepare(first: int, last: int) -> Evaluate:
            rows = read(batch.rows(first, last), case.teacher_head)

            def evaluate(student: StudentLogits, start: int, stop: int) -> TokenLoss:
                part = rows.rows(start - first, stop - first)
                return diagnosed(objective, student, part) if diagnostics else objective(student, part)

            return evaluate

        return flat_loss(case.hidden, case.head, batch.weights, prepare)[0] / batch.denominator

    return arm


ARMS: dict[str, Arm] = {
    "naive": naive,
    "ours": flat(FullReverseKL(), diagnostics=True),
    "bare": flat(FullReverseKL(), diagnostics=False),
    "trl_jsd": trl_jsd,
    "liger_jsd": liger_jsd,
    "ours_jsd": flat(JensenShannon(), diagnostics=True),
    "bare_jsd": flat(JensenShannon(), diagnostics=False),
}


def run(arm: Arm, case: Case) -> tuple[float, float]:
    """(CPU seconds, loss) of one loss with both gradients."""
    case.hidden.grad = case.head.grad = None
    began = process_time()
    loss = arm(case)
    loss.backward()
    return process_time() - began, loss.item()


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def measure_peak(name: str, sizes: list[int]) -> None:
    """Peak growth of the resident set in an own process, while the arm runs for the first time."""
    run(ARMS[name], Case.make(2, 16, 4))  # imports and first-use allocations of libraries
    case = Case.make(*sizes)
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = resident("VmRSS")
    seconds, loss = run(ARMS[name], case)
    print(json.dumps({"bytes": resident("VmHWM") - before, "seconds": seconds, "loss": loss}))


PEERS = {"trl_jsd": "trl", "liger_jsd": "liger-kernel"}


def version(name: str) -> str | None:
    """Installed version of a peer's package, if it can be imported here."""
    try:
        return f"{PEERS[name]} {metadata.version(PEERS[name])}"
    except metadata.PackageNotFoundError:
        return None


def chosen(names: list[str]) -> list[str]:
    absent = [name for name in names or PEERS if name in PEERS and version(name) is None]
    if absent:
        print(f"not measured, because the package is not installed: {', '.join(PEERS[name] for name in absent)}")
    return [name for name in names or ARMS if name not in absent]


def labeled(name: str) -> str:
    return f"{name} ({version(name)})" if name in PEERS else name


def memory(names: list[str], tokens: int, vocabulary: int, width: int) -> None:
    table = Table(
        "arm", "peak MB", "of which gradients", "logits [L, V] would be", "times less", "target", "CPU s", "loss"
    )
    peaks: dict[str, int] = {}
    gradients = 4 * width * (tokens + vocabulary)
    for name in names:
        sizes = [str(tokens), str(vocabulary), str(width)]
        ran = subprocess.run(
            [sys.executable, __file__, "arm", name, *sizes], capture_output=True, text=True, check=False
        )
        if ran.returncode:
            table.add_row(labeled(name), f"failed: {ran.stderr.splitlines()[-1] if ran.stderr else ran.returncode}")
            continue
        found = json.loads(ran.stdout)
        peaks[name] = found["bytes"]
        reference = peaks.get(REFERENCE.get(name, ""))
        least = MEMORY_TARGET if REFERENCE.get(name) == "naive" else 1
        table.add_row(
            labeled(name), f"{found['bytes'] / 1e6:,.0f}",
            f"{gradients / 1e6:,.0f}", f"{4e-6 * tokens * vocabulary:,.0f}",
            f"{reference / found['bytes']:.1f}" if reference else "", f">= {least:g}" if reference else "",
            f"{found['seconds']:.1f}", f"{found['loss']:.6f}",
        )  # fmt: skip
    Console(width=140).print(f"peak memory: {tokens} tokens, vocabulary {vocabulary}, width {width}", table)


def time(names: list[str], tokens: int, vocabulary: int, width: int, rounds: int) -> None:
    case = Case.make(tokens, vocabulary, width)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for at in range(rounds + 1):
        for name, found in seconds.items():
            spent, _ = run(ARMS[name], case)
            if at:  # the first round warms up
                found.append(spent)
    table = Table("arm", "median CPU ms", "spread (min to max)", "against its reference", "target")
    for name, found in seconds.items():
        reference = seconds.get(REFERENCE.get(name, ""))
        ratio = median(a / b for a, b in zip(found, reference, strict=True)) if reference else None
        table.add_row(
            labeled(name), f"{1e3 * median(found):,.2f}", f"{1e3 * min(found):,.2f} to {1e3 * max(found):,.2f}",
            f"{ratio:.2f}" if ratio else "", f"<= {TIME_TARGET:g}" if ratio else "",
        )  # fmt: skip
    Console(width=140).print(f"time: {tokens} tokens, vocabulary {vocabulary}, width {width}, {rounds} rounds", table)
    for full, bare in (("ours", "bare"), ("ours_jsd", "bare_jsd")):
        if {full, bare} <= seconds.keys():
            share = median(1 - b / a for a, b in zip(seconds[full], seconds[bare], strict=True))
            print(f"share of diagnostics in `{full}`: {share:.1%}")


def main() -> None:
    wanted = environment(Device.GPU) | environment(Device.CPU)
    if any(os.environ.get(name) != value for name, value in wanted.items()):  # read once, when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)
    torch.set_num_threads(1)
    what, *rest = sys.argv[1:] or ["help"]
    if what == "arm":
        measure_peak(rest[0], [int(value) for value in rest[1:]])
    elif what == "memory" and len(rest) >= 3:
        memory(chosen(rest[3:]), *(int(value) for value in rest[:3]))
    elif what == "time" and len(rest) >= 4:
        time(chosen(rest[4:]), *(int(value) for value in rest[:4]))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
