"""Adapters in the learner: they alone are trained, published and kept, and their gradients are autograd's."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from learner.config import LearnerConfig, LoraConfig, environment
from opd.errors import ConfigurationError
from opd.settings.devices import Device, Dtype
from tests.integration.learner.test_learner import SMALL, naive_step
from tests.processes import own_port
from tests.small_learner import (
    SMOOTH,
    STAGES,
    STEPS,
    Likelihood,
    Start,
    batches_of,
    keep,
    lay_down,
    parameters,
    pick_up,
    rank_of,
    tiny,
)
from weight_sync.lora import merged, pairs
from weight_sync.receiver import assemble, collect

HERE = Path(__file__).resolve()
LORA = LoraConfig(r=4, lora_alpha=8)
CONFIG = replace(SMOOTH, lora=LORA)
LAYERS = 7 * 2  # linear layers of the tiny students: four of attention and three of the MLP, twice


class Naive(torch.nn.Module):
    """The base with `W + scale B A` written into every adapted layer, so that autograd does the rest."""

    def __init__(self, path: Path, adapters: Mapping[str, Tensor], scale: float) -> None:
        super().__init__()
        self.base = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).requires_grad_(False)]
        self.adapters = torch.nn.ParameterDict({n.replace(".", "/"): p.clone() for n, p in adapters.items()})
        self.scale = scale

    def named(self) -> dict[str, Tensor]:
        return {n.replace("/", "."): p for n, p in self.adapters.items()}

    def forward(self, **inputs: Any) -> Any:
        base = self.base[0]
        changed = {
            f"{layer}.weight": base.get_parameter(f"{layer}.weight") + self.scale * b @ a
            for layer, (a, b) in pairs(self.named().items()).items()
        }
        return functional_call(base, changed, kwargs=inputs)


def spread(rank: Any) -> None:
    """Let B be something: at its start only B has a gradient, since what reaches A goes through B = 0."""
    for step in range(2):
        rank.step(batches_of(10 + step, CONFIG)[0], Likelihood())


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_an_adapter_that_has_learned_nothing_is_the_base(kind: str, models: dict[str, Path], start: Start) -> None:
    """Exactly, at any rank, full ones included: B is 0."""
    whole = start(SMOOTH, models[kind])
    batches = batches_of(1, SMOOTH)[0]
    expected, sentinel = whole.evaluate(batches, Likelihood()), whole.share(0).sentinel.logprobs
    for r in (1, 32):
        rank = start(replace(SMOOTH, lora=LoraConfig(r=r, lora_alpha=64)), models[kind])
        share = rank.share(0)
        assert rank.evaluate(batches, Likelihood()) == expected
        assert np.array_equal(share.sentinel.logprobs, sentinel)
        assert all(value.any() == ("lora_A" in name) for name, value in parameters(share).items())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_step_is_the_naive_one(kind: str, stage: int, models: dict[str, Path], start: Start) -> None:
    config = replace(CONFIG, zero_stage=stage, gradient_checkpointing=stage == 1, tokens_per_microbatch=70)
    rank = start(config, models[kind])
    for step in range(3):
        before = parameters(rank.share(step))
        naive = Naive(models[kind], before, LORA.scale)
        batches = batches_of(step, config)[0]
        assert len(batches) > 1
        report = rank.step(batches, Likelihood())
        after = parameters(rank.share(step + 1))
        first = step == 0
        if first:  # later steps would need the moments of those before
            assert report.loss == pytest.approx(naive_step(naive, step, None), abs=1e-5)
            for name, value in naive.named().items():
                torch.testing.assert_close(after[name], value.detach(), rtol=0, atol=1e-5, msg=name)
            assert max(float((after[n] - p).abs().max()) for n, p in before.items()) > 1e-3
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == before.keys() and len(moved) == 2 * LAYERS


def test_gradients_of_both_matrices_are_autograd_s(models: dict[str, Path], start: Start, tmp_path: Path) -> None:
    rank = start(CONFIG, models["untied"])
    spread(rank)
    before = parameters(rank.share(0))
    keep(rank, tmp_path, 2)
    fresh = start(CONFIG, models["untied"])
    # The same weights, but moments of zero: what AdamW does next is a function of the gradient alone.
    with safe_open(str(tmp_path / "rank_0.safetensors"), framework="pt") as file:
        assert any(file.get_tensor(k).any() for k in file.keys() if k.startswith("exp_avg/"))  # noqa: SIM118
    fresh._training._student.causal.load_state_dict(  # type: ignore[union-attr]
        {n.replace(".weight", ".learner.weight"): v for n, v in before.items()}, strict=False
    )
    assert all(torch.equal(v, before[n]) for n, v in parameters(fresh.share(0)).items())
    naive = Naive(models["untied"], before, LORA.scale)
    report = fresh.step(batches_of(3, CONFIG)[0], Likelihood())
    assert report.loss == pytest.approx(naive_step(naive, 3, None), abs=1e-5)
    after = parameters(fresh.share(1))
    for name, value in naive.named().items():
        torch.testing.assert_close(after[name], value.detach(), rtol=0, atol=1e-5, msg=name)
    for part in ("lora_A", "lora_B"):
        assert max(float((after[n] - p).abs().max()) for n, p in before.items() if part in n) > 1e-4


def test_what_is_published_and_kept_is_the_adapter_and_nothing_else(
    models: dict[str, Path], start: Start, tmp_path: Path
) -> None:
    rank, whole = start(CONFIG, models["untied"]), start(SMOOTH, models["untied"])
    base = AutoModelForCausalLM.from_pretrained(models["untied"], dtype=torch.float32)
    linear = [m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert len(linear) == LAYERS
    expected = 4 * sum(LORA.r * (m.in_features + m.out_features) for m in linear)
    share = assemble([rank.share(1)])
    assert share.manifest.nbytes == sum(len(np.asarray(c.handle)) for c in share.chunks) == expected
    assert share.manifest.lora_scale == 2.0
    assert expected < assemble([whole.share(1)]).manifest.nbytes / 2
    keep(rank, tmp_path / "adapters", 1)
    state = load_file(tmp_path / "adapters" / "rank_0.safetensors")
    assert sum(t.numel() * 4 for n, t in state.items() if n != "random") == 3 * expected, "master and two moments"


@pytest.mark.parametrize(("stage", "dtype"), STAGES, ids=str)
def test_a_run_cut_anywhere_ends_bit_by_bit_as_the_whole(
    stage: int, dtype: Dtype, models: dict[str, Path], start: Start, tmp_path: Path
) -> None:
    config = replace(CONFIG, zero_stage=stage, dtype=dtype, eps=1e-8, lr=1e-2, weight_decay=0.1)
    whole = start(config, models["tied"])
    reports = []
    for step in range(STEPS):
        keep(whole, tmp_path / f"step_{step}", step)
        reports.append(whole.step(batches_of(step, config)[0], Likelihood()))
    for cut in (0, 3):
        resumed = start(config, models["tied"])
        assert resumed.load(tmp_path / f"step_{cut}") == cut
        assert [resumed.step(batches_of(s, config)[0], Likelihood()) for s in range(cut, STEPS)] == reports[cut:]
        assert assemble([resumed.share(STEPS)]).digest == assemble([whole.share(STEPS)]).digest
    with pytest.raises(ConfigurationError, match="needs a student with model="):
        start(replace(config, lora=LoraConfig()), models["tied"]).load(tmp_path / "step_3")


@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.BFLOAT16], ids=str)
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_the_export_is_what_an_engine_makes_of_it_and_peft_reads_the_adapter(
    kind: str, dtype: Dtype, models: dict[str, Path], start: Start, tmp_path: Path
) -> None:
    config = replace(CONFIG, zero_stage=1, dtype=dtype)
    rank = start(config, models[kind])
    spread(rank)
    adapters = parameters(share := rank.share(2))
    rank.export(tmp_path / "model")
    torch_dtype = getattr(torch, dtype.value)
    base = AutoModelForCausalLM.from_pretrained(models[kind], dtype=torch_dtype)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert exported.dtype == torch_dtype
    layers = pairs(adapters.items())
    for name, value in exported.named_parameters():
        expected = base.get_parameter(name)
        if (pair := layers.get(name.removesuffix(".weight"))) is not None:
            expected = merged(expected.detach(), *pair, LORA.scale)
            assert not torch.equal(expected, base.get_parameter(name)), name
        assert torch.equal(value, expected), name
    read = PeftModel.from_pretrained(base, str(tmp_path / "model" / "adapter")).eval()
    said = json.loads((tmp_path / "model" / "adapter" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["peft_type"]) == (4, 8, "LORA")
    ids = torch.from_numpy(share.sentinel.ids).long()
    with torch.no_grad():
        logprobs = read(input_ids=ids[None]).logits[0, :-1].float().log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    gap = float((logprobs - torch.from_numpy(share.sentinel.logprobs)).abs().max())
    assert gap < (1e-5 if dtype is Dtype.FLOAT32 else 0.05)


@pytest.mark.parametrize(
    ("targets", "refusal"),
    [(["q_projection"], r"does not fit the student.*name linear layers"), (["embed_tokens"], "no linear layer")],
)
def test_layers_that_cannot_have_an_adapter_are_refused(
    targets: list[str], refusal: str, models: dict[str, Path], start: Start
) -> None:
    with pytest.raises(ConfigurationError, match=rf"learner\.lora\.target_modules.*{refusal}"):
        start(replace(SMOOTH, lora=LoraConfig(r=2, target_modules=targets)), models["tied"])


# ---- two ranks, in processes of their own ----


def _shared(ranks: int, stage: int, dtype: Dtype) -> LearnerConfig:
    shape = {"ranks": ranks, "zero_stage": stage, "dtype": dtype, "eps": 1e-8, "lr": 1e-2}
    return replace(CONFIG, **shape, tokens_per_microbatch=40, publish_chunk_bytes=SMALL)


def main(rank: int, world: int, port: int, folder: Path) -> None:
    """One rank of two: three steps under every stage, with a checkpoint that is read back, and an export."""
    seen = {}
    for stage, dtype in STAGES:
        config, name = _shared(world, stage, dtype), f"{stage} {dtype.name}"
        learner = rank_of(config, folder / "student")
        learner.setup(rank, world, "127.0.0.1", port)
        losses = [learner.step(batches_of(step, config)[rank], Likelihood()).loss for step in range(2)]
        keep(learner, folder / f"checkpoint {name}", 2)
        losses.append(learner.step(batches_of(2, config)[rank], Likelihood()).loss)
        share = learner.share(3)
        lay_down(share, folder / f"last {name}")
        again = rank_of(config, folder / "student")
        again.setup(rank, world, "127.0.0.1", port)
        again.load(folder / f"checkpoint {name}")
        again.step(batches_of(2, config)[rank], Likelihood())
        assert [c.digest for c in again.share(3).chunks] == [c.digest for c in share.chunks], name
        again.export(folder / f"export {name}")
        seen[name] = losses
    again.close()
    (folder / f"seen_{rank}").write_text(json.dumps(seen))


def test_two_ranks_train_adapters_like_one_under_every_stage(start: Start, tmp_path: Path) -> None:
    student = tiny(tmp_path / "student", tied=True, seed=1)
    port = own_port()
    variables = (
        os.environ | environment(Device.CPU) | {"PYTHONPATH": f"{HERE.parents[3]}:{os.environ.get('PYTHONPATH', '')}"}
    )
    config = _shared(1, 0, Dtype.FLOAT32)
    alone = start(config, student)
    ranks = [
        subprocess.Popen([sys.executable, str(HERE), str(r), "2", str(port), str(tmp_path)], env=variables)
        for r in range(2)
    ]
    try:
        losses = [alone.step(batches_of(step, config)[0], Likelihood()).loss for step in range(3)]
        assert [rank.wait(timeout=500) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    last = alone.share(3)
    expected = parameters(last)
    first, second = (json.loads((tmp_path / f"seen_{r}").read_text()) for r in range(2))
    assert first == second
    for name, seen in first.items():
        exact = "FLOAT32" in name
        assert seen == pytest.approx(losses, **({"abs": 1e-4} if exact else {"rel": 2e-2})), name
        whole = pick_up(tmp_path / f"last {name}", last)
        held = dict(collect(whole, np.asarray, name).tensors())
        assert {c.owner for c in whole.chunks} == {0, 1} and held.keys() == expected.keys()
        for parameter, value in held.items():
            if exact:
                torch.testing.assert_close(value, expected[parameter], rtol=0, atol=2e-3, msg=f"{name} {parameter}")
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / f"export {name}", dtype="auto")
        base = AutoModelForCausalLM.from_pretrained(student, dtype=exported.dtype)
        for layer, (a, b) in pairs(held.items()).items():
            value = merged(base.get_parameter(f"{layer}.weight").detach(), a, b, LORA.scale)
            assert torch.equal(exported.get_parameter(f"{layer}.weight"), value), f"{name} {layer}"
        if exact:
            assert alone.load(tmp_path / f"checkpoint {name}") == 2
            assert alone.step(batches_of(2, config)[0], Likelihood()).loss == pytest.approx(losses[2], abs=1e-5), name


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), Path(sys.argv[4]))
