"""Pretraining of a tiny language model from scratch on token sequences, written as a Hugging Face folder.

Shared by the recipes. One CPU thread, a fixed number of steps and fixed seeds: on one machine, the same
recipe writes the same bytes (another processor or torch may round differently).
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PAD, BOS, EOS = 0, 1, 2
HEAD_DIM = 32
MAX_POSITIONS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The size of a model, e.g. ``Shape(vocab=64, hidden=96, layers=3, heads=3, kv_heads=1, ffn=256)``."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A sequence and its trained tokens: ``ids=(1, 5, 2)``, ``loss_mask=(False, True, True)``."""

    ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Number of steps and learning rate, e.g. ``Schedule(steps=400, lr=1.5e-3)``.

    The rate rises for `warmup` steps, stays, and falls linearly to 3 % over the last 40 % of the steps.
    `bfloat16` computes in bfloat16 (parameters stay in float32): it pays from about a million parameters on.
    """

    steps: int
    lr: float
    warmup: int = 50
    bfloat16: bool = False

    def rate(self, step: int) -> float:
        rise = min(1.0, (step + 1) / self.warmup)
        fall = min(1.0, (1 - step / self.steps) / 0.4)
        return self.lr * rise * max(0.03, fall)


def make_reproducible() -> None:
    """Set one thread and deterministic kernels: the order of every sum is fixed."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def build_model(shape: Shape, seed: int) -> Qwen3ForCausalLM:
    """A randomly initialized model with tied embeddings, in float32."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return Qwen3ForCausalLM(config)


def train(model: Qwen3ForCausalLM, batches: Iterator[Sequence[Example]], schedule: Schedule, label: str) -> None:
    """Minimize the mean cross-entropy of the learned tokens; one batch per step."""
    muon, adamw = _optimizers(model)
    started, smooth_loss = time.process_time(), 0.0
    model.train()
    for step in range(schedule.steps):
        # Muon's update has unit spectral norm: it takes a ten times larger rate than AdamW's.
        muon.param_groups[0]["lr"] = 10 * schedule.rate(step)
        adamw.param_groups[0]["lr"] = schedule.rate(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=schedule.bfloat16):
            loss = _loss(model, next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
        smooth_loss = loss.item() if step == 0 else 0.95 * smooth_loss + 0.05 * loss.item()
        if step % 50 == 49 or step == schedule.steps - 1:
            seconds = time.process_time() - started
            print(
                f"{label}: step {step + 1}/{schedule.steps} loss {smooth_loss:.4f} ({seconds:.0f} CPU s)",
                flush=True,
            )
    model.eval()


def save_model(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights (bfloat16), configuration and tokenizer files."""
    # Only the token ids: how to sample is for the caller to say, not for the checkpoint.
    model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    model.bfloat16().save_pretrained(folder)
    # safetensors lets the owner alone read the file; it is copied into images that run as another user.
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Name the special tokens, so that AutoTokenizer finds them; prompts are padded on the left."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=MAX_POSITIONS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by its relative path: ``{"teacher/config.json": "9f..."}``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def collate(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Right-padded ids [B, T] and loss mask [B, T]; causal attention never looks at what is to the right."""
    width = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), width), PAD)
    mask = torch.zeros(len(examples), width, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        mask[row, : len(example.ids)] = torch.tensor(example.loss_mask)
    return ids, mask


def _loss(model: Qwen3ForCausalLM, examples: Sequence[Example]) -> Tensor:
    ids, mask = collate(examples)
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    learned = mask[:, 1:]
    # Project only the positions that count: the vocabulary is the widest matrix of a small model.
    return F.cross_entropy(model.lm_head(hidden[learned]).float(), ids[:, 1:][learned])


def _optimizers(model: Qwen3ForCausalLM) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms.

    From scratch and at this size, Muon needed about half the tokens of AdamW alone.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, weight_decay=0.01)
    return muon, torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)
