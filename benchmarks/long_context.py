"""Memory of one long sequence in the learner: forward and backward, with the loss over its whole vocabulary.

    python benchmarks/long_context.py [TOKENS ...]

Two layers of width 64 (two heads of 32, one for keys) with an output matrix of 32,768 rows, float32, on a CPU; reverse
KL from a teacher's hidden states, diagnostics included, as the learner computes it. Arms: `full` attention in every
layer, a sliding `window` of 1,024 tokens, and both with `gradient_checkpointing`. A process for each arm: growth of its
peak resident set beyond models and inputs. `logits` is what the logits alone would take, `scores` a mask of all tokens
by all tokens in one byte each: neither exists.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from learner.model import Student
from opd.loss.chunked import Evaluate, StudentLogits, flat_loss, read
from opd.loss.metrics import diagnosed
from opd.objectives.vocabulary import FullReverseKL
from opd.types import Batch, HiddenScores, TokenLoss

ARMS = ("full", "window", "full, checkpointed", "window, checkpointed")
WIDTH, VOCABULARY, WINDOW = 64, 32_768, 1024
MIB = 2**20


def student(arm: str, tokens: int) -> Student:
    """A random student with the attention of `arm`."""
    shape = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 1, "head_dim": 32, "vocab_size": VOCABULARY, "max_position_embeddings": tokens}
    kind, window = ("mistral", {"sliding_window": WINDOW}) if arm.startswith("window") else ("qwen3", {})
    config = AutoConfig.for_model(kind, **shape, **window, tie_word_embeddings=False)
    causal = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert isinstance(causal, PreTrainedModel)
    made = Student(causal).train()
    if "checkpointed" in arm:
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return made


def measured(arm: str, tokens: int) -> float:
    """Growth of this process's peak in MiB."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, every = student(arm, tokens), torch.arange(tokens)
    head, logprobs = torch.randn(VOCABULARY, WIDTH) / WIDTH**0.5, torch.full((tokens,), -1.0)
    ids = torch.randint(VOCABULARY, (tokens,))
    batch = Batch(
        input_ids=ids, position_ids=every, cu_seqlens=torch.tensor([0, tokens]), predict_at=every, target_ids=ids,
        behavior_logprobs=logprobs, weights=torch.ones(tokens), depth=every, denominator=float(tokens),
        scores=HiddenScores(logprobs=logprobs, hidden=torch.randn(tokens, WIDTH)),
    )  # fmt: skip

    def prepare(first: int, last: int) -> Evaluate:
        rows = read(batch.rows(first, last), [head])

        def evaluate(logits: StudentLogits, start: int, stop: int) -> TokenLoss:
            return diagnosed(FullReverseKL(), logits, rows.rows(start - first, stop - first))

        return evaluate

    def use(hidden: Tensor, matrix: Tensor) -> Tensor:
        return flat_loss(hidden, matrix, batch.weights, prepare)[0]

    before = _peak()
    model(ids, every, batch.cu_seqlens, every, use).backward()
    return (_peak() - before) / MIB


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def main(arguments: Sequence[str]) -> None:
    """Print a row per arm and length; with an arm and a length, the figure alone."""
    if arguments[:1] and arguments[0] in ARMS:
        print(measured(arguments[0], int(arguments[1])))
        return
    print("tokens  arm                     MiB beyond model and inputs (logits, scores)")
    for tokens in [int(argument) for argument in arguments] or [8192, 16_384, 32_768]:
        for arm in ARMS:
            command = [sys.executable, "-m", "benchmarks.long_context", arm, str(tokens)]
            printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=1800).stdout
            logits, scores = 4 * tokens * VOCABULARY / MIB, tokens**2 / MIB
            print(f"{tokens:6}  {arm:22}  {float(printed):,.0f} ({logits:,.0f}, {scores:,.0f})", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
