"""Quantized teachers, and teachers over two devices, in vLLM against transformers with the same numbers."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.plan.environment import instructions
from opd.ports import ScoreRequest, TopK
from opd.settings.devices import Device, Dtype
from teacher_service.backends.vllm_scoring import HiddenTeacher
from teacher_service.config import Backend, TeacherConfig, environment
from tests.quantized_models import Form, quantized
from tests.tiny_models import VOCABULARY, completion_logprobs

SLOW = pytest.mark.slow
# Nats on average. W8A8 rounds activations, too, and vLLM does so on CPUs with AMX for AWQ.
TOLERATED = {Form.FP8: 0.015, Form.AWQ: 0.05, Form.INT8: 0.05}
REFUSED = {1: "requires AMX tile support", 2: "WorkerProc initialization failed"}


def requests() -> list[ScoreRequest]:
    random = np.random.default_rng(0)

    def ids(count: int) -> np.ndarray:
        return random.integers(0, VOCABULARY, count).astype(np.int32)

    return [ScoreRequest(context_ids=ids(8), token_ids=ids(24), kinds=(TopK(k=VOCABULARY),)) for _ in range(8)]


def answers(path: Path, parallel: int) -> list[Any]:
    config = TeacherConfig(
        path=str(path),
        backend=Backend.VLLM,
        device=Device.CPU,
        dtype=Dtype.BFLOAT16,
        tensor_parallel=parallel,
        max_batch_tokens=300,
        kv_cache_bytes=16 << 20,
    )

    async def scored() -> list[Any]:
        teacher = HiddenTeacher(config, lambda array: array)
        await teacher.ready()
        try:
            return await teacher.score(requests())
        finally:
            await teacher.close()

    return asyncio.run(scored())


@pytest.mark.parametrize(
    ("form", "parallel"),
    [
        (Form.FP8, 1),
        pytest.param(Form.INT8, 1, marks=SLOW),
        pytest.param(Form.AWQ, 1, marks=SLOW),
        pytest.param(Form.FP8, 2, marks=SLOW),
    ],
)
def test_a_quantized_teacher_says_what_its_numbers_say(
    form: Form, parallel: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(Device.CPU, Backend.VLLM).items():
        monkeypatch.setenv(name, value)
    model = quantized(form, tmp_path)
    if form is Form.FP8 and "amx_tile" not in instructions():  # why the plan refuses it there
        with pytest.raises(Exception, match=REFUSED[parallel]):
            answers(tmp_path, parallel)
        return
    gaps = list[np.ndarray]()
    for (scores,), request in zip(answers(tmp_path, parallel), requests(), strict=True):
        full = completion_logprobs(model, request)
        at = full.gather(1, torch.from_numpy(scores.topk_ids).long())
        gaps.append(np.abs(scores.topk_logprobs - at.numpy()))
    gap = float(np.concatenate(gaps).mean())
    print(f"{form.name}, {parallel}: {gap:.4f} nats on average, {np.concatenate(gaps).max():.3f} at most")
    assert gap < TOLERATED[form]
