"""Sleep and wake of an engine and a teacher on this machine: they answer afterwards what they answered before."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import psutil
import torch

from actors.config import CPU_KV_CACHE_BYTES, StudentConfig, environment
from actors.engine import VLLMEngine
from hf.plain_model import plain_model
from launch.cli.selftest.rows import Outcome, Row
from launch.config.shipped_files import shipped
from learner.publishing import Publisher, StagedSender
from opd.ports import GenerateRequest, PublishedWeights, SampledToken, Sampling, ScoreRequest, Sentinel, WeightShard
from opd.settings.devices import Device, Dtype
from teacher_service.backends.torch_forward import TorchTeacher
from teacher_service.config import TeacherConfig
from weight_sync.receiver import assemble

_TEXTS, _LONGEST, _DEADLINE_S = 8, 64, 100.0
_TOLERANCE = 0.01  # nats between engine and checkpoint, in float32


def sleep_and_wake() -> list[Row]:
    """The engine twice, with weights that it keeps and with weights that it was sent, and the teacher."""
    os.environ.update(environment(Device.AUTO))  # before vLLM is imported
    folder = shipped("assets") / "shop"
    return asyncio.run(_engine(folder / "student")) + asyncio.run(_teacher(folder / "teacher"))


async def _engine(path: Path) -> list[Row]:
    small = StudentConfig(path=str(path), max_model_len=128, kv_cache_bytes=CPU_KV_CACHE_BYTES, enforce_eager=True)
    config = replace(small, dtype=Dtype.FLOAT32, deadline_s=_DEADLINE_S)
    engine = VLLMEngine(config, 0, lambda array: array, sleeps=True)
    requests = [
        GenerateRequest(prompt_id=str(n), sample=0, context_ids=ids, sampling=Sampling(max_tokens=_LONGEST))
        for n, ids in enumerate(_texts())
    ]

    async def answers() -> list[np.ndarray]:
        written = await engine.generate(requests)
        return [part for one in written for part in (one.token_ids, np.asarray(one.behavior.logprobs))]

    rows = [await _row("engine: weights that it keeps", engine, answers)]
    await engine.receive(_published(path))
    rows.append(await _row("engine: weights that it was sent", engine, answers))
    await engine.close()
    return rows


async def _teacher(path: Path) -> list[Row]:
    teacher = TorchTeacher(TeacherConfig(path=str(path), dtype=Dtype.FLOAT32, deadline_s=_DEADLINE_S), np.copy)
    requests = [ScoreRequest(context_ids=ids[:2], token_ids=ids[2:], kinds=(SampledToken(),)) for ids in _texts()]

    async def answers() -> list[np.ndarray]:
        return [np.asarray(scores.logprobs) for (scores,) in await teacher.score(requests)]  # type: ignore[attr-defined]

    await teacher.ready()
    return [await _row("teacher", teacher, answers)]


async def _row(name: str, sleeper: Any, answers: Callable[[], Awaitable[Sequence[np.ndarray]]]) -> Row:
    before, held = await answers(), _held()
    began = perf_counter()
    await sleeper.sleep()
    freed = held - _held()
    await sleeper.wake()
    after = await answers()
    seconds = perf_counter() - began
    same = all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    figure = f"{freed >> 20} of {held >> 20} MiB were given back, {seconds:.1f} s until it had answered again"
    outcome = Outcome.PASS if same else Outcome.FAIL
    said = "" if same else "it answers otherwise than before"
    return Row(check="sleep and wake", name=name, outcome=outcome, figure=figure, said=said)


def _held() -> int:
    """Bytes in use on the GPU, or else the resident set of this process."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return total - free
    return psutil.Process().memory_info().rss


def _texts() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(3, 60, random.integers(8, 40)).astype(np.int32) for _ in range(_TEXTS)]


@torch.no_grad()
def _published(path: Path) -> PublishedWeights:
    """The checkpoint itself as version 1."""
    model, ids = plain_model(str(path)).float(), _texts()[0]
    named = dict(model.named_parameters())
    publisher = Publisher(
        list(named),
        [tuple(p.shape) for p in named.values()],
        [p.dtype for p in named.values()],
        chunk_bytes=1 << 20,
        rank=0,
        ranks=1,
        sender=StagedSender(np.copy),
    )
    values = [named[name].detach() for name in publisher.manifest.names]
    logits = model(input_ids=torch.from_numpy(ids).long()[None]).logits[0, :-1].log_softmax(-1)
    logprobs = logits.gather(-1, torch.from_numpy(ids[1:]).long()[:, None])[:, 0].numpy()
    shard = WeightShard(
        version=1,
        manifest=publisher.manifest,
        chunks=publisher.chunks(lambda first, last: nullcontext(values[first:last])),
        sentinel=Sentinel(ids=ids, logprobs=logprobs, tolerance=_TOLERANCE),
    )
    return assemble([shard])
