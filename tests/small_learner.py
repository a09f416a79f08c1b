"""A small learner for tests: a tiny student, data of many lengths, objectives, and the calls around a rank."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed
from transformers import AutoModelForCausalLM

from learner.config import LearnerConfig, StudentText, environment
from learner.learner import LearnerRank
from learner.publishing import StagedSender
from opd.loss.chunked import StudentLogits
from opd.loss.packing import TokenMean, pack
from opd.ports import Layout, PublishedWeights, WeightChunk, WeightSender, WeightShard
from opd.settings.devices import Device, Dtype
from opd.types import (
    Batch,
    Prompt,
    Scored,
    Scores,
    StopReason,
    TokenLoss,
    TokenScores,
    Trajectory,
    VocabularyScores,
)
from tests.tiny_models import tiny_model
from weight_sync.receiver import assemble, collect

VOCABULARY, STEPS = 61, 6
STAGES = [(stage, Dtype.FLOAT32) for stage in range(4)] + [(stage, Dtype.BFLOAT16) for stage in (1, 2, 3)]
# Smooth in the gradient (plain AdamW divides it by its size), so weights can be compared as gradients can.
SMOOTH = LearnerConfig(
    zero_stage=0,
    dtype=Dtype.FLOAT32,
    device=Device.CPU,
    lr=1.0,
    eps=0.01,  # the most that a setting may be; Adam knows no scale, so gradients are clipped to what is far below it
    grad_clip=0.0005,
    head_chunk=7,
    warmup_steps=0,
    deadline_s=60,
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
                stop=StopReason.END,
            )
        )
    weights = [rng.choice([0.0, 0.5, 1.0, 2.0], len(t)) for t in trajectories]
    weights[0][:] = 0
    weights[-1][:] = 1
    return trajectories, weights


def batches_of(
    step: int, config: LearnerConfig, scores_from_hidden: Callable[[Trajectory], Scores] = lambda _: Scores()
) -> list[list[Batch[Any]]]:
    """`data(step)` in micro-batches per rank."""
    trajectories, weights = data(step)
    scored = [Scored(trajectory=t, scores=scores_from_hidden(t)) for t in trajectories]
    layout = Layout(ranks=config.ranks, tokens_per_microbatch=config.packed_tokens)
    return pack(scored, weights, layout, TokenMean())


Teacher = Callable[[Trajectory], VocabularyScores]


def read_by(path: Path) -> Teacher:
    """A teacher's whole distribution at every written token, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(path)

    def scores_from_hidden(trajectory: Trajectory) -> VocabularyScores:
        logprobs = predictions(model, trajectory).log_softmax(-1)
        written = logprobs.gather(-1, torch.from_numpy(trajectory.token_ids).long()[:, None])[:, 0]
        return VocabularyScores(logprobs=written.numpy(), vocabulary_logprobs=logprobs.numpy())

    return scores_from_hidden


@torch.no_grad()
def predictions(model: Any, trajectory: Trajectory) -> Tensor:
    """Logits of every written token."""
    context = trajectory.prompt.student_ids
    ids = torch.from_numpy(np.concatenate([context, trajectory.token_ids])).long()
    return model(input_ids=ids[None]).logits[0, len(context) - 1 : -1]


def naive_loss(model: Any, step: int, teacher: Teacher | None) -> Tensor:
    """The loss of `ReverseKL` on `data(step)` as one would first write it: padded, whole logits, autograd.

    Without a teacher it is that of `Likelihood`.
    """
    trajectories, weights = data(step)
    rows = [np.concatenate([t.prompt.student_ids, t.token_ids]) for t in trajectories]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.from_numpy(row)
    mask = torch.arange(ids.shape[1])[None] < torch.tensor([len(r) for r in rows])[:, None]
    logprobs = model(input_ids=ids, attention_mask=mask.long()).logits.log_softmax(-1)
    total, count = torch.zeros(()), 0
    for i, (t, w) in enumerate(zip(trajectories, weights, strict=True)):
        p = logprobs[i, len(t.prompt.student_ids) - 1 : len(rows[i]) - 1]
        if teacher is None:
            loss = -p.gather(-1, torch.from_numpy(t.token_ids).long()[:, None])[:, 0]
        else:
            loss = (p.exp() * (p - torch.from_numpy(teacher(t).vocabulary_logprobs))).sum(-1)
        total, count = total + (loss * torch.from_numpy(w)).sum(), count + np.count_nonzero(w)
    return total / int(count)


def copies() -> StagedSender:
    """The plainest outlet: a handle is a copy of the bytes."""
    return StagedSender(np.copy)


def rank_of(
    config: LearnerConfig,
    student: Path,
    teacher: Path | Sequence[Path] | None = None,
    sender: Callable[[], WeightSender] = copies,
    steps: int = STEPS,
    text: StudentText = StudentText(),  # noqa: B008 (frozen)
) -> LearnerRank:
    """A rank that has yet to be set up."""
    heads = [str(path) for path in ([teacher] if isinstance(teacher, Path) else teacher or [])]
    return LearnerRank(config, str(student), heads, steps, 0, lambda handle: handle, sender, text)


def parameters(*shares: WeightShard) -> dict[str, Tensor]:
    """Published weights by name, out of what all ranks published."""
    return dict(collect(assemble(shares), np.asarray, "a test").tensors())


def lay_down(share: WeightShard, folder: Path) -> None:
    """Write what a rank published where another process finds it."""
    folder.mkdir(exist_ok=True)
    for chunk in share.chunks:
        np.save(folder / f"{chunk.first}.npy", chunk.handle)
        (folder / f"{chunk.first}.json").write_text(json.dumps(asdict(replace(chunk, handle=f"{chunk.first}.npy"))))
    (folder / "manifest").write_text(json.dumps(asdict(share.manifest)))


def pick_up(folder: Path, like: WeightShard) -> PublishedWeights:
    """What all ranks have laid down there, as one version with the sentinel of `like`."""
    chunks = [WeightChunk(**json.loads(file.read_text())) for file in folder.glob("*.json")]
    named = json.loads((folder / "manifest").read_text())
    shapes = tuple(map(tuple, named["shapes"]))
    manifest = replace(like.manifest, names=tuple(named["names"]), dtypes=tuple(named["dtypes"]), shapes=shapes)
    manifest = replace(manifest, nbytes=named["nbytes"])
    held = tuple(replace(c, handle=np.load(folder / c.handle)) for c in chunks)
    return assemble([replace(like, manifest=manifest, chunks=held)])


def keep(rank: LearnerRank, directory: Path, step: int) -> Path:
    """What one rank has, on the disk."""
    directory.mkdir(parents=True, exist_ok=True)
    rank.save(directory, step)
    rank.written()
    return directory


@contextmanager
def group_of_its_own() -> Iterator[None]:
    """Learners may meet within, as in a process of their own; nothing is kept of their group after it.

    Nor of one that was given up in the middle: a group whose other rank is gone would hold all later tests up.
    """
    before = dict(os.environ)
    os.environ.update(environment(Device.CPU))
    from deepspeed.comm import comm
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups

    untouched = {name: value for name, value in vars(groups).items() if name.startswith("_") and name.isupper()}
    # ZeRO-3 numbers the modules (in a default argument) and parameters of a process, and ranks compare the numbers.
    (modules,) = DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__
    numbers = modules[0], Init.param_id
    modules[0] = Init.param_id = 0
    try:
        yield
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        comm.cdb = None
        vars(groups).update(untouched)
        modules[0], Init.param_id = numbers
        os.environ.clear()
        os.environ.update(before)


Start = Callable[..., LearnerRank]
