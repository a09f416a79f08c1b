"""A rank under ZeRO-3 starts with its own part of the student alone, and as if it had started with the whole.

Two of them: test_learner_ranks.py.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf.hollow_model import Source
from learner import engine, starting, training
from learner.config import LearnerConfig, LoraConfig
from learner.learner import LearnerRank
from learner.model import Student, load_student
from opd.errors import ConfigurationError, DataError, OpdError
from opd.settings.devices import Dtype
from tests.fuzz.families import make
from tests.integration.learner.test_experts import mixture
from tests.small_learner import SMOOTH, Likelihood, Start, batches_of, tiny

Contents = Callable[[LearnerRank], dict[str, torch.Tensor]]
CONFIG = replace(SMOOTH, zero_stage=3, weight_decay=0.1, gradient_checkpointing=True)


def started_whole(path: str, config: LearnerConfig, dtype: torch.dtype, device: torch.device, seed: int) -> Student:
    """The student as ranks would have it without `starting`: whole, and divided by DeepSpeed afterwards."""
    return starting.starting_student(path, replace(config, zero_stage=2), dtype, device, seed)


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("students")
    kinds = {"tied": tiny(folder / "tied", tied=True, seed=1), "untied": tiny(folder / "untied", tied=False, seed=2)}
    return kinds | {"experts": mixture(folder / "experts", "qwen3_moe")}


@pytest.mark.parametrize(
    ("kind", "dtype", "rank"),
    [("untied", "FLOAT32", 0), ("experts", "BFLOAT16", 0), ("untied", "BFLOAT16", 4)],
)
def test_a_divided_start_is_the_whole_one_to_the_last_bit(
    kind: str, dtype: str, rank: int, students: dict[str, Path], start: Start, contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Its sentinel, its losses and norms, its masters, moments and published weights after two steps."""
    config = replace(CONFIG, dtype=Dtype[dtype], lora=LoraConfig(r=rank))

    def trained() -> tuple[Tensor, list[Any], dict[str, torch.Tensor]]:
        learner = start(config, students[kind])
        first = torch.from_numpy(learner.share(0).sentinel.logprobs)
        return first, [learner.step(batches_of(s, config)[0], Likelihood()) for s in range(2)], contents(learner)

    divided = trained()
    monkeypatch.setattr(training, "starting_student", started_whole)
    whole = trained()
    assert torch.equal(divided[0], whole[0]) and divided[1] == whole[1]
    assert divided[2].keys() == whole[2].keys()
    assert all(torch.equal(value, whole[2][name]) for name, value in divided[2].items())


@pytest.mark.parametrize("kind", ["tied", "experts"])
def test_no_more_than_a_parameter_or_a_layer_is_whole_while_a_rank_starts(
    kind: str, students: dict[str, Path], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elements in memory beyond the parts, when the next parameter is read, and within every module's computation."""
    read, most = list[int](), list[int]()
    divide, filled = engine.divide, starting.filled_by_layer

    def whole_ones(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if p.untyped_storage().nbytes() > p.element_size())

    @contextmanager
    def computing(causal: PreTrainedModel, found: Mapping[nn.Parameter, Source]) -> Iterator[None]:
        for module in causal.modules():  # hooks are called in their order, so before those that empty it again
            module.register_forward_hook(lambda *_: most.append(whole_ones(causal)))
        with filled(causal, found):
            yield

    def watched(student: Student, values: Callable[[nn.Parameter], Tensor], config: LearnerConfig) -> None:
        def reading(parameter: nn.Parameter) -> Tensor:
            read.append(whole_ones(student))
            return values(parameter)

        divide(student, reading, config)
        read.append(whole_ones(student))

    monkeypatch.setattr(engine, "divide", watched)
    monkeypatch.setattr(starting, "filled_by_layer", computing)
    start(CONFIG, students[kind])
    plain = load_student(str(students[kind]), torch.float32, False).causal
    layer = sum(p.numel() for p in plain.base_model.layers[0].parameters())
    largest = max(layer, *(p.numel() for p in plain.parameters()))
    assert set(read) == {0}, "each parameter was divided before the next one was read"
    assert layer in most and max(most) <= largest
    assert 2 * largest < sum(p.numel() for p in plain.parameters()), "otherwise nothing would be proven"


def test_what_a_whole_student_is_refused_for_a_divided_one_is_too(
    students: dict[str, Path], start: Start, tmp_path: Path
) -> None:
    """The same sentences, by the head, by the layers and by the trial."""
    make("Phi-2", tmp_path / "head")
    make("Mamba", tmp_path / "layers")
    made = tiny(tmp_path / "numbers", tied=True, seed=3) / "model.safetensors"
    weights = load_file(made)
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, made, metadata={"format": "pt"})

    def refused(path: Path, stage: int, kind: type[OpdError]) -> str:
        with pytest.raises(kind, match=rf"^the student {re.escape(repr(str(path)))} ") as info:
            start(replace(CONFIG, zero_stage=stage), path)
        return str(info.value)

    kinds = {"head": ConfigurationError, "layers": ConfigurationError, "numbers": DataError}
    for name, kind in kinds.items():
        assert refused(tmp_path / name, 3, kind) == refused(tmp_path / name, 0, kind)
