"""A hundred recorded batches, through the learner and through transformers with torch's AdamW: the same weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, get_scheduler

from learner.schedule import Schedule
from opd.types import Trajectory, VocabularyScores
from tests.small_learner import SMOOTH, ReverseKL, Start, Teacher, batches_of, naive_loss, parameters, read_by

UPDATES, WARMUP, FLOOR = 100, 10, 0.1
CONFIG = replace(
    SMOOTH,
    lr=1e-3,
    eps=1e-8,
    grad_clip=1.0,
    weight_decay=0.1,
    schedule=Schedule.COSINE,
    warmup_steps=WARMUP,
    final_lr_fraction=FLOOR,
)


def recorded(teacher: Teacher) -> Teacher:
    """What the teacher said once of each text."""
    said: dict[bytes, VocabularyScores] = {}

    def scores_from_hidden(t: Trajectory) -> VocabularyScores:
        text = t.prompt.student_ids.tobytes() + t.token_ids.tobytes()
        return said[text] if text in said else said.setdefault(text, teacher(t))

    return scores_from_hidden


def replayed(path: Path, teacher: Teacher) -> dict[str, Tensor]:
    """The weights after all updates, with nothing of ours but the batches."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    matrices, others = ([p for p in model.parameters() if (p.ndim > 1) is wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": CONFIG.weight_decay}, {"params": others, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, CONFIG.lr, (CONFIG.beta1, CONFIG.beta2), CONFIG.eps)
    scheduler = get_scheduler("cosine_with_min_lr", adam, WARMUP, UPDATES, {"min_lr_rate": FLOOR})
    for step in range(UPDATES):
        naive_loss(model, step, teacher).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CONFIG.grad_clip)
        adam.step()
        scheduler.step()
        adam.zero_grad()
    return weights_of(model)


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def farthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of a weight."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_a_hundred_updates_end_at_the_weights_of_plain_transformers(models: dict[str, Path], start: Start) -> None:
    """With weight decay, clipping, a warm-up and a floor. With a floor of 0 there, they end 4e-3 apart."""
    teacher = recorded(read_by(models["teacher"]))
    rank = start(CONFIG, models["tied"], steps=UPDATES)
    before = parameters(rank.share(0))
    reports = [rank.step(batches_of(step, CONFIG, teacher)[0], ReverseKL()) for step in range(UPDATES)]
    ours = parameters(rank.share(UPDATES))
    apart, moved = farthest(ours, replayed(models["tied"], teacher)), farthest(ours, before)
    print(f"largest difference of a weight after {UPDATES} updates: {apart:.2g} (they moved by up to {moved:.2g})")
    assert apart < 1e-5 and moved > 1e-2
    assert any(report.grad_norm > CONFIG.grad_clip for report in reports), "clipping is a part of it"
