"""The engine measures what it differs from the learner by before it takes weights, and judges them by that."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from actors.config import StudentConfig
from actors.engine import VLLMEngine
from actors.sleep import EngineSleep
from actors.startup import EngineLimits
from opd.errors import ConfigurationError, DataError
from opd.ports import Manifest, PublishedWeights, Sentinel, WeightAck
from opd.settings.devices import Device, Dtype
from weight_sync.receiver import ReceivedWeights

IDS = np.arange(40, dtype=np.int32)
SAID = -np.linspace(0.1, 6.0, 39).astype(np.float32)  # by the checkpoint
NEW = -np.linspace(6.0, 0.1, 39).astype(np.float32)  # by a later version
NOISE = np.random.default_rng(0).normal(size=39).astype(np.float32)


class Loop:
    """An engine loop whose model says, in turn, what it is told; `held` counts readings before weights came."""

    def __init__(self, said: Sequence[np.ndarray]) -> None:
        self.said = list(said)
        self.calls: list[str] = []
        self.engine = SimpleNamespace(
            collective_rpc=lambda method, **_: self.calls.append(method),
            set_weight_version=lambda label: None,
            reset_prefix_cache=lambda **_: None,
        )
        self.failed: list[Exception] = []

    def finish(self, ids: list[int], params: Any) -> Any:
        self.calls.append("read")
        return SimpleNamespace(prompt_logprobs=SimpleNamespace(logprobs=self.said.pop(0)))

    def drain(self) -> None:
        self.calls.append("drain")

    def fail(self, error: Exception) -> None:
        self.failed.append(error)


def engine(dtype: Dtype = Dtype.FLOAT32) -> VLLMEngine:
    """One that has not started vLLM."""
    made = VLLMEngine.__new__(VLLMEngine)
    made._config = StudentConfig(path="m", max_model_len=64, device=Device.CPU, dtype=dtype)
    made._limits = EngineLimits(vocabulary=99, longest=64, ends=(2,))
    made._refusal, made._floor, made._version, made._digest = None, None, 0, ""
    made._updates, made._update_s = 0, 0.0
    made._sleep = EngineSleep(on_gpu=False, reloads=False)
    return made


def load(engine: VLLMEngine, loop: Loop, version: int, said: np.ndarray, tolerance: float = 0.0) -> WeightAck:
    manifest = Manifest(names=(), dtypes=("float32",), shapes=(), nbytes=0)
    delivered = ReceivedWeights(version=version, digest="d", manifest=manifest, runs=(), buffers=())
    sentinel = Sentinel(ids=IDS, logprobs=said, tolerance=tolerance, origin=SAID)
    weights = PublishedWeights(version=version, manifest=manifest, chunks=(), digest="d", sentinel=sentinel)
    return engine._load(weights, delivered, loop)  # type: ignore[arg-type]


def test_the_floor_is_measured_once_and_before_any_weight_is_touched() -> None:
    made, loop = engine(), Loop([SAID + 1e-6 * NOISE, NEW, SAID])
    assert load(made, loop, 5, NEW).gap == 0
    assert loop.calls.index("read") < loop.calls.index("start_weight_update") == loop.calls.index("drain") + 1
    assert load(made, loop, 6, SAID).version == 6 and loop.calls.count("read") == 3


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-3])
def test_rounding_of_any_size_is_taken_and_other_weights_are_not(noise: float) -> None:
    """A bfloat16 engine under a float32 learner as well as two of float32."""
    made = engine(Dtype.BFLOAT16 if noise == 1e-3 else Dtype.FLOAT32)
    loop = Loop([SAID + noise * NOISE, NEW + 2 * noise * NOISE[::-1], SAID + noise * NOISE, NEW])
    load(made, loop, 1, NEW)
    with pytest.raises(DataError, match=r"does not hold version 2 as the learner has it.*but may by"):
        load(made, loop, 2, NEW)  # the engine still says what the checkpoint says
    assert loop.failed and made._version == 1
    assert load(made, loop, 3, NEW).version == 3 and made._refusal is None


def test_numbers_that_do_not_fit_are_no_lie_and_touch_nothing() -> None:
    made, loop = engine(), Loop([SAID + 0.5 * NOISE])
    with pytest.raises(ConfigurationError, match=r"read the unchanged checkpoint 'm' differently.*set student.dtype"):
        load(made, loop, 1, NEW)
    assert loop.calls == ["read"] and made._refusal is None and not loop.failed


def test_an_explicit_tolerance_bounds_the_maximum() -> None:
    made, loop = engine(), Loop([SAID, NEW + 0.01, NEW + 0.2])
    assert load(made, loop, 1, NEW, tolerance=0.1).gap == pytest.approx(0.01, rel=1e-3)
    with pytest.raises(DataError, match=r"0.2 at most, but may by inf nats on average"):
        load(made, loop, 2, NEW, tolerance=0.1)
