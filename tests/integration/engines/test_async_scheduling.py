"""An engine that schedules ahead, forced on a CPU: the same text as without, and every token under its own weights.

vLLM offers it for GPUs alone. Here its scheduler, batch queue and model runner do the same with streams that do
nothing, and a step's computation is over when the next is planned; what GPUs overlap cannot be seen.
"""

import os

from actors.config import StudentConfig, environment
from opd.settings.devices import Device, Dtype

os.environ |= environment(Device.CPU)  # before anything imports vLLM

import asyncio
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.engine import VLLMEngine
from opd.ports import Completion, Sampling
from tests.integration.engines.test_engine import (
    LONGEST,
    SEED,
    House,
    assert_each_wrote_its_part,
    crossing,
    requests,
    student,
    weights,
)


class _Idle:
    """A stream or event that has nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.record = self.synchronize = self.wait_stream = self.wait_event = lambda *_: None


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's platform of processors without its own last word about scheduling."""
    from vllm.platforms.cpu import CpuPlatform

    check: Any = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def forced(cls: type, vllm_config: Any) -> None:
        wanted = vllm_config.scheduler_config.async_scheduling
        check(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = wanted

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(forced))
    for name in ("Event", "Stream"):
        monkeypatch.setattr(torch.cuda, name, _Idle)
    monkeypatch.setattr(torch.cuda, "current_stream", _Idle)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())


def houses(path: Path) -> Iterator[House]:
    """An engine of each kind, one after the other."""
    origin = student(0, tied=True)
    origin.save_pretrained(path)
    for scheduling in (False, True):
        config = StudentConfig(
            path=str(path), max_model_len=LONGEST, dtype=Dtype.FLOAT32, kv_cache_bytes=16 << 20, max_num_seqs=8,
            deadline_s=60, async_scheduling=scheduling,
        )  # fmt: skip
        loop = asyncio.new_event_loop()
        made = House(engine=VLLMEngine(config, SEED, lambda h: h()), origin=origin, path=path, tied=True, loop=loop)
        made.run(made.engine.ready())
        yield made
        made.run(made.engine.close())
        loop.close()


def same(one: Completion, other: Completion) -> bool:
    return bool(
        np.array_equal(one.token_ids, other.token_ids)
        and np.array_equal(one.behavior.logprobs, other.behavior.logprobs)
        and one.stop is other.stop
    )


@pytest.mark.usefixtures("ahead")
def test_text_and_labels_are_those_of_an_engine_that_waits(tmp_path: Path) -> None:
    models = {version: student(version, tied=True) for version in (20, 21)}
    first, held = (weights(model, version) for version, model in models.items())
    asked, found, queues = requests(Sampling(max_tokens=24), prompts=6), list[list[Completion]](), list[int]()
    for house in houses(tmp_path):
        core: Any = house.engine._thread.run(lambda loop: loop.engine.engine_core).result(60)
        queues.append(core.engine_core.batch_queue_size)
        found.append(house.generate(asked))
        house.receive(first)
        crossed, receipt = crossing(house, held, chunk=3)
        assert receipt.gap < 1e-4
        assert_each_wrote_its_part(crossed, models)
    assert queues == [1, 2], "nothing was scheduled ahead"
    assert all(same(one, other) for one, other in zip(*found, strict=True))
