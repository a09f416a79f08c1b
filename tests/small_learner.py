"""A small learner for tests: a tiny student, data of many lengths, objectives, and the calls around a rank."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from learner.config import LearnerConfig
from learner.learner import LearnerRank
from opd.devices import Device, Dtype
from opd.logits import StudentLogits
from opd.manifest import unpack
from opd.packing import TokenMean, pack
from opd.ports import Layout, Weights
from opd.types import (
    Batch,
    Prompt,
    Scored,
    Scores,
    Stop,
    TokenLoss,
    TokenScores,
    Trajectory,
    VocabularyScores,
)
from tests.tiny_models import tiny_model

VOCABULARY, STEPS = 61, 6
STAGES = [(stage, Dtype.FLOAT32) for stage in range(4)] + [(stage, Dtype.BFLOAT16) for stage in (1, 2, 3)]
# Smooth in the gradient (plain AdamW divides it by its size), so weights can be compared as gradients can.
SMOOTH = LearnerConfig(
    zero_stage=0,
    dtype=Dtype.FLOAT32,
    device=Device.CPU,
    lr=1.0,
    eps=1.0,
    grad_clip=0.05,
    head_chunk=7,
    warmup_steps=0,
    deadline_s=240,
)


@dataclass(frozen=True)
class ReverseKL:
    """KL(student||teacher) over the whole vocabulary."""

    consumes = VocabularyScores

    def __call__(self, student: StudentLogits, batch: Batch[Any]) -> TokenLoss:
        p, q = student.logprobs, batch.scores.vocabulary_logprobs
        return TokenLoss(loss=(p.exp() * (p - q)).sum(-1), metrics={"entropy": student.entropy})


@dataclass(frozen=True)
class Likelihood:
    """-log p of the written token; `scale` spoils it on request."""

    scale: float = 1.0
    consumes = Scores

    def __call__(self, student: StudentLogits, batch: Batch[Any]) -> TokenLoss:
        logprobs = student.at(batch.target_ids)
        return TokenLoss(loss=-self.scale * logprobs, metrics={"behavior": batch.behavior_logprobs})


def tiny(path: Path, *, tied: bool, seed: int, width: int = 32) -> Path:
    """A random Qwen3 with sharp logits, saved in `path`."""
    shape = {"hidden_size": width, "intermediate_size": 48, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tiny_model(seed, tied=tied, std=0.15, vocab_size=VOCABULARY, **shape, **heads).save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return path


def data(step: int, sequences: int = 9) -> tuple[list[Trajectory], list[np.ndarray]]:
    """Trajectories of many lengths, and weights of which some are zero and some are no whole numbers."""
    rng = np.random.default_rng(step)
    trajectories = []
    for i in range(sequences):
        context, tokens = (rng.integers(0, VOCABULARY, rng.integers(*r)).astype(np.int32) for r in ((1, 9), (1, 23)))
        n = len(tokens)
        trajectories.append(
            Trajectory(
                prompt=Prompt(id=str(i), student_ids=context, teacher_ids=context),
                sample=0,
                token_ids=tokens,
                behavior=TokenScores(logprobs=-rng.random(n, dtype=np.float32)),
                loss_mask=np.ones(n, dtype=bool),
                versions=np.zeros(n, dtype=np.int32),
                stop=Stop.END,
                rewards={},
            )
        )
    weights = [rng.choice([0.0, 0.5, 1.0, 2.0], len(t)) for t in trajectories]
    weights[0][:] = 0
    weights[-1][:] = 1
    return trajectories, weights


def batches_of(
    step: int, config: LearnerConfig, testify: Callable[[Trajectory], Scores] = lambda _: Scores()
) -> list[list[Batch[Any]]]:
    """`data(step)` in micro-batches per rank."""
    trajectories, weights = data(step)
    scored = [Scored(trajectory=t, scores=testify(t)) for t in trajectories]
    layout = Layout(ranks=config.ranks, tokens_per_microbatch=config.tokens_per_microbatch)
    return pack(scored, weights, layout, TokenMean())


def rank_of(config: LearnerConfig, student: Path, teacher: Path | None = None) -> LearnerRank:
    """A rank that has yet to be set up."""
    heads = [str(teacher)] if teacher else []
    return LearnerRank(config, str(student), heads, STEPS, 0, lambda handle: handle, np.copy)


def parameters(weights: Weights | None) -> dict[str, Tensor]:
    """Published weights by name."""
    assert weights is not None
    return dict(unpack(weights.manifest, weights.buffer))


def keep(rank: LearnerRank, directory: Path, step: int) -> Path:
    """What one rank has, on the disk."""
    directory.mkdir(parents=True, exist_ok=True)
    rank.save(directory, step)
    rank.written()
    return directory


Start = Callable[..., LearnerRank]
