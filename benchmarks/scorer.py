"""P2: cost of scoring on top of its forward pass, and growth of its memory with the number of tokens.

    python benchmarks/scorer.py [rounds] [width] [layers] [vocabulary]

Arms take turns over the same packed batch of a random Qwen3, in float32, in this process: `bare` is the body and the
output matrix at every completion token and nothing else; the others are `TorchTeacher.score` at k=1 and k=64. Printed
are the median and spread of CPU seconds, and scored tokens per second over bare ones (targets of the project: 0.95 at
k=1, 0.90 at k=64). The smaller the model, the larger a share the softmax over the vocabulary has: the figure is one
for this model. Memory is the peak of the resident set above its state before the call, without the answers, at a
growing number of tokens (`teacher.max_batch_tokens` bounds one forward).
"""

import asyncio
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import process_time

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

from hf.packed_model import load_packed
from opd.ports import ScoreRequest, TopK
from opd.settings.devices import Dtype
from teacher_service.backends.torch_forward import TorchTeacher
from teacher_service.config import TeacherConfig
from teacher_service.scoring import completion_rows

CONTEXT, TOKENS, BATCH, CHUNK = 16, 112, 1024, 256
DEFAULTS = (3, 768, 6, 32_000)


def make_model(folder: Path, width: int, layers: int, vocabulary: int) -> None:
    """A random checkpoint of the usual proportions."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 128),
        head_dim=64,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def requests(count: int, k: int, vocabulary: int) -> list[ScoreRequest]:
    """`count` completions of `TOKENS` tokens."""
    random = np.random.default_rng(0)
    ids = random.integers(0, vocabulary, (count, CONTEXT + TOKENS)).astype(np.int32)
    return [ScoreRequest(context_ids=row[:CONTEXT], token_ids=row[CONTEXT:], kinds=(TopK(k=k),)) for row in ids]


def timed(arms: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each arm, once per round, in turn; the first round is warm-up."""
    spent: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, arm in arms.items():
            start = process_time()
            arm()
            if turn:
                spent[name].append(process_time() - start)
    return spent


def resident(field: str) -> int:
    """Bytes of `VmRSS` (now) or `VmHWM` (peak since it was reset)."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def peak_bytes(work: Callable[[], Sequence[object]]) -> int:
    """Peak rise of the resident set while `work` runs."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def main() -> None:
    """Measure and print."""
    given = [int(v) for v in sys.argv[1:]]
    rounds, width, layers, vocabulary = [*given, *DEFAULTS[len(given) :]]
    torch.set_num_threads(1)
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), width, layers, vocabulary)
        config = TeacherConfig(path=folder, dtype=Dtype.FLOAT32, max_batch_tokens=BATCH, head_chunk=CHUNK)
        teacher = TorchTeacher(config, lambda array: array)
        asyncio.run(teacher.ready())
        model = load_packed(folder, torch.float32, torch.device("cpu"))
        batch = BATCH // (CONTEXT + TOKENS)

        @torch.inference_mode()
        def bare() -> None:
            sequences, rows = completion_rows(requests(batch, 1, vocabulary))
            hidden = model.hidden([torch.from_numpy(s) for s in sequences])[torch.from_numpy(rows)]
            for at in range(0, len(hidden), CHUNK):
                model.logits(hidden[at : at + CHUNK])

        def score(count: int, k: int) -> Sequence[object]:
            return asyncio.run(teacher.score(requests(count, k, vocabulary)))

        spent = timed({"bare": bare, "k=1": lambda: score(batch, 1), "k=64": lambda: score(batch, 64)}, rounds)
        table = Table(title=f"P2: width {width}, {layers} layers, vocabulary {vocabulary}, {batch * TOKENS} tokens")
        for heading in ("arm", "CPU s (median, spread)", "tokens/s over bare", "target"):
            table.add_column(heading, justify="right")
        for name, used in spent.items():
            target = {"k=1": "0.95", "k=64": "0.90"}.get(name, "")
            share = f"{median(spent['bare']) / median(used):.3f}"
            table.add_row(name, f"{median(used):.3f} ({min(used):.3f} to {max(used):.3f})", share, target)
        console.print(table)
        for times in (1, 2, 4, 8, 16):
            peak = peak_bytes(lambda times=times: score(batch * times, 64))
            answers = batch * times * TOKENS * (8 * 64 + 4)
            console.print(
                f"{batch * times * TOKENS:6d} tokens at k=64: {(peak - answers) / 2**20:7.1f} MiB above the answers"
            )


if __name__ == "__main__":
    main()
