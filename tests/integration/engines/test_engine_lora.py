"""Adapters in a real engine: it writes what the learner's unmerged model says, and the checkpoint stays what it was."""

from tests.integration.engines.test_engine import (
    LONGEST,
    SEED,
    House,
    assert_each_wrote_its_part,
    crossing,
    published,
    requests,
    student,
    written,
)

# isort: split
import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from actors.config import StudentConfig
from actors.engine import VLLMEngine
from learner.config import LoraConfig
from learner.lora import adapt
from learner.model import Student
from opd.errors import DataError
from opd.ports import PublishedWeights, Sampling
from opd.settings.devices import Dtype

TARGETS = [("all-linear",), ("q_proj", "down_proj"), ("v_proj", "up_proj", "o_proj")]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """An engine that has never held whole published weights, as in a run with adapters."""
    origin = student(0, request.param)
    path = tmp_path_factory.mktemp("student")
    origin.save_pretrained(path)
    config = StudentConfig(
        path=str(path), max_model_len=LONGEST, dtype=Dtype.FLOAT32, kv_cache_bytes=16 << 20, deadline_s=60
    )
    engine = VLLMEngine(config, SEED, lambda handle: handle())
    loop = asyncio.new_event_loop()
    house = House(engine=engine, origin=origin, path=path, tied=request.param, loop=loop)
    house.run(engine.ready())
    yield house
    house.run(engine.close())
    loop.close()


def adapted(house: House, seed: int, targets: tuple[str, ...], std: float) -> Qwen3ForCausalLM:
    """The house's student with a random adapter, as the learner computes with it: not merged."""
    model = student(0, house.tied)
    adapt(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = std * torch.randn(p.shape, generator=generator)
    return model.requires_grad_(False)


def adapters(model: Qwen3ForCausalLM, version: int, without: str = "-") -> PublishedWeights:
    """What a learner that trains the adapters of `model` would publish, but for names with `without` in them."""
    named = {n.replace(".learner.weight", ".weight"): p for n, p in model.named_parameters() if "lora_" in n}
    kept = {n: p for n, p in named.items() if without not in n}
    return published(model, kept, version, tolerance=1e-4, chunk_bytes=2000, lora_scale=2.0)


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_an_engine_writes_what_the_learner_s_unmerged_model_says(house: House, targets: tuple[str, ...]) -> None:
    asked = requests(Sampling(max_tokens=40))
    house.receive(adapters(adapted(house, 1, ("all-linear",), std=0.0), 1))
    plain = house.generate(asked)
    for version in (2, 3):  # the second replaces the first, it is not added to it
        model = adapted(house, version, targets, std=0.3)
        held = adapters(model, version)
        assert len(held.chunks) > 1
        assert held.manifest.nbytes == 4 * sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
        assert house.receive(held) < 1e-4
        moved = 0.0
        for request, answer in zip(asked, house.generate(asked), strict=True):
            ids = np.concatenate([request.context_ids, answer.token_ids])
            said = written(model, ids, len(request.context_ids))
            np.testing.assert_allclose(answer.behavior.logprobs, said, atol=1e-4)
            moved = max(moved, float(np.abs(said - written(house.origin, ids, len(request.context_ids))).max()))
            assert answer.digests == {version: held.digest}
        assert moved > 0.1, "the adapter makes no difference, so nothing was shown"
        zero = adapters(adapted(house, 1, targets, std=0.0), 10 + version)
        assert house.receive(zero) < 1e-4
    again = house.generate(asked)
    for request, one, other in zip(asked, plain, again, strict=True):
        ids = np.concatenate([request.context_ids, other.token_ids])
        expected = written(house.origin, ids, len(request.context_ids))
        np.testing.assert_allclose(other.behavior.logprobs, expected, atol=1e-4)
        assert one.versions[0] == 1 and other.versions[0] == 13


def test_an_adapter_that_arrives_in_flight_writes_the_rest(house: House) -> None:
    models = {version: adapted(house, version, ("all-linear",), std=0.3) for version in (20, 21)}
    first, held = (adapters(model, version) for version, model in models.items())
    house.receive(first)
    crossed, _ = crossing(house, held, chunk=1)
    assert_each_wrote_its_part(crossed, models)


def test_adapters_that_do_not_fit_are_refused_and_good_ones_load_afterwards(house: House) -> None:
    model = adapted(house, 30, ("all-linear",), std=0.3)
    good = adapters(model, 30)
    deeper, wider = student(0, house.tied, num_hidden_layers=3), student(0, house.tied, hidden_size=96)
    for other in (deeper, wider):
        adapt(other, LoraConfig(r=2, target_modules=("q_proj",)), 0)
    for wrong, why in (
        (adapters(model, 31, without="1.mlp.up_proj.lora_B"), "lora_B.*is missing"),
        (adapters(deeper, 31), r"layers that the engine's checkpoint does not have.*layers\.2\.self_attn\.q_proj"),
        (adapters(wider, 31), r"does not fit a matrix of \(64, 64\)"),
    ):
        with pytest.raises(DataError, match=why):
            house.receive(wrong)
        with pytest.raises(DataError, match="no usable weights"):
            house.generate(requests(Sampling(max_tokens=4)))
        assert house.receive(good) < 1e-4


def test_the_student_names_its_adapters_as_adapters(house: House) -> None:
    model = adapted(house, 1, ("q_proj",), std=0.3).train()
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    shell = Student.__new__(Student)
    torch.nn.Module.__init__(shell)
    shell.causal, shell._stored = model, {}
    assert sorted(name for name, _ in shell.named()) == sorted(adapters(model, 1).manifest.names)
    assert {name for name, _ in shell.frozen()} == dict(house.origin.named_parameters()).keys()
