"""Students that are mixtures of experts: a step is autograd's, and every matrix keeps the name of its checkpoint."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from hf.folder import read_headers
from launch.config.run_config import run_config
from launch.plan.plan import make_plan
from learner.checkpoints.merge import Origin, export_checkpoint
from learner.config import LoraConfig
from opd.errors import ConfigurationError
from opd.settings.devices import Dtype
from tests.integration.learner.test_learner import naive_step
from tests.moe_student import save_student
from tests.small_learner import SMOOTH, VOCABULARY, Likelihood, Start, batches_of, keep, parameters

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
KINDS = {"qwen3_moe": "mlp.experts.1.up_proj.weight", "mixtral": "block_sparse_moe.experts.1.w3.weight"}


def mixture(folder: Path, kind: str) -> Path:
    """A random mixture of experts with opinions, saved in `folder`."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(std=0.15)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.parametrize(("kind", "stage"), [("qwen3_moe", 0), ("mixtral", 2), ("qwen3_moe", 3)])
def test_a_step_is_the_naive_one_and_names_are_the_checkpoint_s(
    kind: str, stage: int, start: Start, tmp_path: Path
) -> None:
    """In what is published, in what is exported, and in what a checkpoint is merged to: each matrix by itself."""
    folder = mixture(tmp_path / "student", kind)
    config = replace(SMOOTH, zero_stage=stage, tokens_per_microbatch=70, publish_chunk_bytes=20_000)
    config = replace(config, gradient_checkpointing=stage == 2)
    rank = start(config, folder)
    before = parameters(rank.share(0))
    stored = read_headers(str(folder), "student")
    assert {name: tuple(value.shape) for name, value in before.items()} == {n: s.shape for n, s in stored.items()}
    assert all(torch.equal(before[name], value) for name, value in load_file(folder / "model.safetensors").items())

    report = rank.step(batches_of(1, config)[0], Likelihood())
    naive = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert report.loss == pytest.approx(naive_step(naive, 1, None), abs=1e-5)
    naive.save_pretrained(tmp_path / "naive")
    after = parameters(rank.share(1))
    for name, value in load_file(tmp_path / "naive" / "model.safetensors").items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-5, msg=name)
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert f"model.layers.1.{KINDS[kind]}" in moved and any(".gate.weight" in name for name in moved)

    rank.export(tmp_path / "export")
    keep(rank, tmp_path / "shards", 1)
    origin = Origin(student=str(folder), dtype=Dtype.FLOAT32, lora=LoraConfig(), seed=0)
    export_checkpoint(tmp_path / "shards", origin, tmp_path / "merged")
    for each in ("export", "merged"):
        exported = load_file(tmp_path / each / "model.safetensors")
        assert exported.keys() == stored.keys()
        assert all(torch.equal(exported[name], value) for name, value in after.items()), each


def test_adapters_leave_the_experts_as_they_are(start: Start, tmp_path: Path) -> None:
    folder = mixture(tmp_path / "student", "qwen3_moe")
    rank = start(replace(SMOOTH, lora=LoraConfig(r=2)), folder)
    rank.step(batches_of(1, SMOOTH)[0], Likelihood())
    adapted = {name.partition("layers.")[2].split(".")[1] for name in parameters(rank.share(1))}
    assert adapted == {"self_attn"}
    rank.export(tmp_path / "export")
    exported, own = (load_file(path / "model.safetensors") for path in (tmp_path / "export", folder))
    assert exported.keys() == own.keys()
    assert {name for name in own if not torch.equal(own[name], exported[name])} == {
        f"model.layers.{i}.self_attn.{part}_proj.weight" for i in range(2) for part in "qkvo"
    }
    described = json.loads((tmp_path / "export" / "adapter" / "adapter_config.json").read_text())
    assert sorted(described["target_modules"]) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "export" / "adapter")
    ids = torch.arange(3, 20)[None]
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    torch.testing.assert_close(peft(ids).logits, whole(ids).logits, rtol=0, atol=1e-4)


def test_adapters_of_experts_are_refused(start: Start, tmp_path: Path) -> None:
    """When the run is planned, and by the learner."""
    folder = mixture(tmp_path / "student", "qwen3_moe")
    experts = ("gate_proj", "up_proj", "down_proj")
    with pytest.raises(ConfigurationError, match=r"mlp\.experts, which is no linear layer"):
        start(replace(SMOOTH, lora=LoraConfig(r=2, target_modules=experts)), folder)
    save_student(tmp_path / "shop")
    settings = ["experiment=shop", "learner=lora", "learner.lora.target_modules=[q_proj,up_proj]"]
    with pytest.raises(ConfigurationError, match=r"names 'up_proj', as matrices of experts are called.*such as q_proj"):
        make_plan(run_config([*settings, f"student.path={tmp_path / 'shop'}"]))
