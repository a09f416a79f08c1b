"""The loss against vocabulary and number of teachers (P4): memory does not grow with them, time only with their heads.

    python benchmarks/teachers_loss.py [TOKENS WIDTH ROUNDS [VOCABULARY TEACHERS]]      (default 512 64 3)

VOCABULARY is the only one to measure, and TEACHERS (2 or more) how many there are at most.

Several teachers are read as their mixture (`opd.loss.chunked.mixture`), one after another within a chunk; the naive arm
holds the stacked log-probabilities of all. Memory: a fresh process per arm, growth of the peak resident set beyond
inputs, with an allocator that gives back what is freed (arrays from 4 MiB are mapped): with the learner's, which keeps
it, the layout of the heap moves the same figures by up to a quarter, in both directions. Time: one process, arms
interleaved, CPU seconds; the slope per teacher is printed as a multiple of what its matrix product and softmax alone
take for the same rows.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import process_time

import torch
from torch import Tensor

from learner.config import environment
from opd.loss.chunked import Evaluate, chunk_rows, flat_loss, log_softmax_, mixture
from opd.loss.metrics import diagnosed
from opd.objectives.vocabulary import FullReverseKL
from opd.settings.devices import Device
from opd.types import Batch, VocabularyScores

VOCABULARIES = (8_192, 32_768, 151_936, 262_144)
TEACHERS = (1, 2, 4, 8)
MEMORY_TARGET, SLOPE_TARGET = 1.05, 1.05


class Case:
    """A student and `teachers` teachers over `vocabulary` tokens, all of one width."""

    def __init__(self, tokens: int, vocabulary: int, width: int, teachers: int) -> None:
        draw = torch.Generator().manual_seed(0)

        def normal(rows: int, scale: float = 1.0) -> Tensor:
            return torch.randn(rows, width, generator=draw) * scale

        self.hidden, self.head = normal(tokens).requires_grad_(), normal(vocabulary, 2 / width**0.5).requires_grad_()
        # One matrix for all: what is measured is what the loss makes, and eight matrices are inputs.
        self.teacher_head = normal(vocabulary, 2 / width**0.5)
        self.teacher_hidden = [normal(tokens) for _ in range(teachers)]


def ours(case: Case) -> Tensor:
    count = len(case.teacher_hidden)
    every = torch.arange(len(case.hidden))
    logprobs = torch.full((len(every),), -1.0)

    def prepare(first: int, last: int) -> Evaluate:
        logprobs_of = (log_softmax_(hidden[first:last] @ case.teacher_head.T) for hidden in case.teacher_hidden)
        scores = VocabularyScores(
            logprobs=logprobs[first:last], vocabulary_logprobs=mixture(logprobs_of, [1 / count] * count)
        )  # fmt: skip
        rows = Batch(
            input_ids=every, position_ids=every, cu_seqlens=torch.tensor([0, len(every)]), predict_at=every[first:last],
            target_ids=every[first:last], behavior_logprobs=logprobs[first:last], weights=torch.ones(last - first),
            depth=every[first:last], scores=scores, denominator=float(len(every)),
        )  # fmt: skip
        return lambda student, start, stop: diagnosed(FullReverseKL(), student, rows.rows(start - first, stop - first))

    return flat_loss(case.hidden, case.head, torch.ones(len(every)), prepare)[0] / len(every)


def naive(case: Case) -> Tensor:
    with torch.no_grad():
        log_probs = torch.stack([(hidden @ case.teacher_head.T).log_softmax(-1) for hidden in case.teacher_hidden])
        q = log_probs.logsumexp(0) - torch.tensor(float(len(log_probs))).log()
    p = (case.hidden @ case.head.T).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


ARMS = {"ours": ours, "naive": naive}


def run(name: str, case: Case) -> tuple[float, float]:
    case.hidden.grad = case.head.grad = None
    began = process_time()
    loss = ARMS[name](case)
    loss.backward()
    return process_time() - began, loss.item()


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def measure_peak(name: str, tokens: int, vocabulary: int, width: int, teachers: int) -> None:
    run(name, Case(2, 16, 4, 2))
    case = Case(tokens, vocabulary, width, teachers)
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = resident("VmRSS")
    _, loss = run(name, case)
    print(json.dumps({"bytes": resident("VmHWM") - before, "loss": loss}))


def peak(name: str, *sizes: int) -> tuple[float, float]:
    command = [sys.executable, __file__, "arm", name, *map(str, sizes)]
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    own["MALLOC_MMAP_THRESHOLD_"] = str(2**22)
    found = json.loads(subprocess.run(command, env=own, capture_output=True, text=True, check=True).stdout)
    return found["bytes"] / 1e6, found["loss"]


def memory(tokens: int, width: int, vocabularies: Sequence[int], counts: Sequence[int]) -> None:
    ends = f"T={counts[-1]} / T=1"
    print(f"peak MB at {tokens} tokens, width {width} (of naive only up to 32,768: it would need too much)")
    for vocabulary in vocabularies:
        mine = [peak("ours", tokens, vocabulary, width, count) for count in counts]
        sizes = "  ".join(f"T={count}: {size:,.0f}" for count, (size, _) in zip(counts, mine, strict=True))
        print(f"  V={vocabulary:>7,}  ours   {sizes}  {ends}: {mine[-1][0] / mine[0][0]:.3f} (target {MEMORY_TARGET})")
        if vocabulary <= 32_768:
            plain = [peak("naive", tokens, vocabulary, width, count) for count in counts]
            assert all(abs(a[1] - b[1]) < 1e-5 for a, b in zip(mine, plain, strict=True)), "not the same loss"
            sizes = "  ".join(f"T={count}: {size:,.0f}" for count, (size, _) in zip(counts, plain, strict=True))
            print(f"  {'':>9}  naive  {sizes}  {ends}: {plain[-1][0] / plain[0][0]:.3f}")


def reading(case: Case) -> float:
    """CPU seconds of one teacher's matrix product and softmax over all rows, in the same chunks."""
    began = process_time()
    step = chunk_rows(case.teacher_head)
    for start in range(0, len(case.hidden), step):
        log_softmax_(case.teacher_hidden[0][start : start + step] @ case.teacher_head.T)
    return process_time() - began


def time(tokens: int, width: int, rounds: int, vocabulary: int, counts: Sequence[int]) -> None:
    cases = {count: Case(tokens, vocabulary, width, count) for count in counts}
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    alone: list[float] = []
    for at in range(rounds + 1):
        spent = {count: run("ours", case)[0] for count, case in cases.items()}
        floor = reading(cases[1])
        if at:  # the first round warms up
            alone.append(floor)
            for count, value in spent.items():
                seconds[count].append(value)
    print(f"CPU ms at {tokens} tokens, vocabulary {vocabulary:,}, width {width}, {rounds} rounds: median (min to max)")
    for count, found in seconds.items():
        print(f"  T={count}: {1e3 * median(found):,.0f} ({1e3 * min(found):,.0f} to {1e3 * max(found):,.0f})")
    most = counts[-1]
    slopes = [(b - a) / (most - 1) / c for a, b, c in zip(seconds[1], seconds[most], alone, strict=True)]
    print(
        f"  per further teacher, in units of its head GEMM and softmax alone: {median(slopes):.2f} "
        f"({min(slopes):.2f} to {max(slopes):.2f}; target {SLOPE_TARGET}, the mixture itself comes on top)"
    )


def main() -> None:
    wanted = {} if sys.argv[1:2] == ["arm"] else environment(Device.GPU) | environment(Device.CPU)
    if any(os.environ.get(name) != value for name, value in wanted.items()):  # read once, when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["arm"]:
        measure_peak(sys.argv[2], *(int(value) for value in sys.argv[3:]))
        return
    tokens, width, rounds, *few = (int(value) for value in sys.argv[1:]) if sys.argv[1:] else (512, 64, 3)
    vocabularies = tuple(few[:1]) or VOCABULARIES
    counts = [count for count in TEACHERS if count <= few[1]] if few[1:] else TEACHERS
    if len(counts) < 2:
        raise SystemExit(__doc__)
    memory(tokens, width, vocabularies, counts)
    time(tokens, width, rounds, few[0] if few else VOCABULARIES[1], counts)


if __name__ == "__main__":
    main()
