"""Learner on this machine: loss of a step against transformers in float64, and offloading that changes no bit."""

import os
from dataclasses import replace

import numpy as np
import psutil
import torch

from hf.plain_model import plain_model
from launch.cli.selftest.rows import Outcome, Row
from launch.config.shipped_files import shipped
from learner.config import LearnerConfig, environment
from learner.learner import LearnerRank
from learner.publishing import StagedSender
from opd.errors import ConfigurationError
from opd.loss.packing import TokenMean, pack
from opd.objectives.sampled import Likelihood
from opd.ports import Layout
from opd.settings.devices import Dtype, on_gpu
from opd.types import Batch, Prompt, Scored, Scores, StopReason, TokenScores, Trajectory

LIMITS = {Dtype.FLOAT32: 1e-5, Dtype.BFLOAT16: 0.02}  # relative error of a loss
_CONFIG = LearnerConfig(lr=1e-3, warmup_steps=0, tokens_per_microbatch=256, deadline_s=120)
_TEXTS, _LONGEST = 8, 48
_STEPS = 4


def learner_float32() -> list[Row]:
    """The learner in float32, as the demo trains."""
    return _checked(replace(_CONFIG, zero_stage=0, dtype=Dtype.FLOAT32))


def learner_bfloat16() -> list[Row]:
    """The learner in bfloat16 with float32 masters, as real models train; on a GPU also with those on the host."""
    config = replace(_CONFIG, zero_stage=2, dtype=Dtype.BFLOAT16)
    on_host = [replace(config, offload_optimizer=True)] if on_gpu(config.device) else []
    return _checked(config, *on_host)


def _checked(*configs: LearnerConfig) -> list[Row]:
    os.environ.update(environment(configs[0].device))  # before DeepSpeed is imported
    rows, ranks = list[Row](), list[LearnerRank]()
    for config in configs:
        rows += _rows(config, ranks)
    for rank in ranks:  # the first one takes the process group with it
        rank.close()
    return rows


def _rows(config: LearnerConfig, ranks: list[LearnerRank]) -> list[Row]:
    """Rows of a learner with `config`, which is added to `ranks`."""
    name = f"ZeRO-{config.stage}, {config.dtype.name.lower()}{', optimizer on the host' * config.offload_optimizer}"
    path = str(shipped("assets") / "shop" / "student")
    rank = LearnerRank(  # pyright: ignore[reportAbstractUsage] (its class decorator writes the verbs)
        config, path, (), 2 * _STEPS, 0, lambda handle: handle, lambda: StagedSender(np.copy)
    )
    rank.setup(0, 1, *rank.address())
    ranks.append(rank)
    trajectories = _texts()
    batches = _batches(trajectories, config)
    wanted = _plain_loss(path, trajectories)
    found = rank.evaluate(batches, Likelihood())["loss"]
    rows = [Row.at_most("learner", f"{name}: loss", abs(found - wanted) / wanted, LIMITS[config.dtype])]
    losses = [rank.step(batches, Likelihood()).loss for _ in range(_STEPS)]
    falls = losses[-1] < losses[0]
    said = f"{losses[0]:.3f} to {losses[-1]:.3f} nats in {_STEPS} steps"
    outcome = Outcome.PASS if falls else Outcome.FAIL
    rows += [Row(check="learner", name=f"{name}: loss falls", outcome=outcome, figure=said), _offloading(rank, name)]
    return rows


def _offloading(rank: LearnerRank, name: str) -> Row:
    """Published weights before and after model and optimizer were in host memory."""
    name = f"{name}: offload and reload"
    before, held = rank.share(1), _allocated()
    try:
        rank.offload()
    except ConfigurationError as error:
        return Row(check="learner", name=name, outcome=Outcome.NOT_HERE, said=str(error))
    freed = held - _allocated()
    rank.reload()
    after = rank.share(2)
    same = [chunk.digest for chunk in before.chunks] == [chunk.digest for chunk in after.chunks]
    outcome = Outcome.PASS if same else Outcome.FAIL
    return Row(check="learner", name=name, outcome=outcome, figure=f"{freed >> 10} of {held >> 10} KiB were given back")


def _allocated() -> int:
    """Bytes on the GPU, or else the resident set of this process."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def _texts() -> list[Trajectory]:
    random = np.random.default_rng(0)
    made: list[Trajectory] = []
    for number in range(_TEXTS):
        context, tokens = (random.integers(3, 60, random.integers(4, _LONGEST)).astype(np.int32) for _ in range(2))
        made.append(
            Trajectory(
                prompt=Prompt(id=str(number), student_ids=context, teacher_ids=context),
                sample=0,
                token_ids=tokens,
                behavior=TokenScores(logprobs=np.full(len(tokens), -1, dtype=np.float32)),
                loss_mask=np.ones(len(tokens), dtype=bool),
                versions=np.zeros(len(tokens), dtype=np.int32),
                stop=StopReason.END,
            )
        )
    return made


def _batches(trajectories: list[Trajectory], config: LearnerConfig) -> list[Batch[Scores]]:
    scored = [Scored(trajectory=t, scores=Scores()) for t in trajectories]
    layout = Layout(ranks=1, tokens_per_microbatch=config.packed_tokens)
    return list(pack(scored, [np.ones(len(t)) for t in trajectories], layout, TokenMean())[0])


@torch.no_grad()
def _plain_loss(path: str, trajectories: list[Trajectory]) -> float:
    """Mean negative log-likelihood of all sampled tokens by transformers alone, in float64, text by text."""
    model = plain_model(path).double()
    lost, count = 0.0, 0
    for t in trajectories:
        context = torch.from_numpy(t.prompt.student_ids).long()
        written = torch.from_numpy(t.token_ids).long()
        logits = model(input_ids=torch.cat([context, written])[None]).logits[0, len(context) - 1 : -1]
        lost -= float(logits.log_softmax(-1).gather(-1, written[:, None]).sum())
        count += len(written)
    return lost / count
