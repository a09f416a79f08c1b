"""The student as a model: what is in it besides its parameters, what they are called, and what it reads of a folder."""

import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

from hf import packed_model
from learner import model
from learner.config import LoraConfig
from learner.lora import adapt
from learner.model import Student, load_head, load_student, sentinel_ids
from opd.errors import ConfigurationError, DataError
from opd.loss.packed_attention import NAME, attend, mask
from tests.fuzz.families import make
from tests.tiny_models import VOCABULARY, logprobs, save, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save(tiny_model(7, tied=False), tmp_path_factory.mktemp("student")))


def fresh() -> Any:
    return tiny_model(7, tied=False).requires_grad_(True)


def test_the_packed_attention_is_known_to_transformers_once_there_are_students(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever else makes it known: a learner runs in a process of its own."""
    for known in (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping):
        monkeypatch.delitem(known, NAME)
    assert model.load_causal is packed_model.load_causal, "the learner imports what makes it known"
    runpy.run_path(str(packed_model.__file__))
    assert AttentionInterface()[NAME] is attend and AttentionMaskInterface()[NAME] is mask


def test_parameters_have_the_names_of_their_checkpoint_with_and_without_adapters() -> None:
    """Every parameter of a layer under the layer's name there; what is not renamed keeps its own."""
    causal = fresh()
    own = [name for name, _ in causal.named_parameters()]
    stored = {name: name.replace("model.layers.", "h.").replace("lm_head", "embed_out") for name in own}
    whole = Student(causal, stored)
    assert [name for name, _ in whole.named()] == list(stored.values()) and not list(whole.frozen())
    assert [name for name, _ in Student(fresh()).named()] == own
    adapt(whole.causal, LoraConfig(r=2, target_modules=("q_proj",)), 0)
    layers = [f"h.{i}.self_attn.q_proj" for i in range(2)]
    assert [n for n, _ in whole.named()] == [f"{n}.lora_{m}.weight" for n in layers for m in "AB"]
    assert sorted(name for name, _ in whole.frozen()) == sorted(stored.values())
    assert all(p.requires_grad for _, p in whole.named()) and not any(p.requires_grad for _, p in whole.frozen())


def test_a_student_whose_output_has_a_bias_is_refused_by_the_name_of_its_folder(tmp_path: Path) -> None:
    """Its learner multiplies hidden states by the matrix and adds nothing."""
    make("Phi-2", tmp_path)
    sentence = rf"^the student {re.escape(repr(str(tmp_path)))} needs a plain output matrix, but .* has a bias"
    with pytest.raises(ConfigurationError, match=sentence):
        load_student(str(tmp_path), torch.float32, False)


def test_biases_go_by_their_layer_s_name() -> None:
    causal = tiny_model(7, tied=False, attention_bias=True).requires_grad_(True)
    stored = {n: n.replace("self_attn", "attention") for n, _ in causal.named_parameters()}
    names = [name for name, _ in Student(causal, stored).named()]
    assert names == list(stored.values()) and sum(name.endswith(".bias") for name in names) == 8


class Rates(nn.Module):
    """Ways in which layers of transformers keep a rate, and what only looks like one."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.inside = nn.Dropout(0.3), nn.Sequential(nn.Dropout(0.2))
        self.attention_dropout, self.dropout = 0.1, 0.4
        self.drop_path = 2  # no rate
        self.use_dropout, self.scaling, self.p = True, 0.5, 0.7


def test_no_dropout_is_left_and_nothing_else_is_changed() -> None:
    """The policy that is trained must be the policy that wrote."""
    causal = fresh()
    causal.extra = Rates()
    rates = Student(causal).causal.get_submodule("extra")
    assert isinstance(rates, Rates)
    inside = rates.inside[0]
    assert isinstance(inside, nn.Dropout)
    assert (rates.plain.p, inside.p, rates.attention_dropout, rates.dropout) == (0, 0, 0, 0)
    assert (rates.drop_path, rates.use_dropout, rates.scaling, rates.p) == (2, True, 0.5, 0.7)
    assert isinstance(rates.use_dropout, bool)


def test_the_sentinel_s_text_is_always_the_same() -> None:
    """Readings of one run are compared with those of the run that goes on from its checkpoint."""
    ids = sentinel_ids(192)
    assert ids.dtype == np.int32 and len(ids) == 24
    assert (
        ids.tolist()[:6] == [121, 25, 128, 78, 168, 91]
        and int(sentinel_ids(7, 500).max()) == 6
        and len(sentinel_ids(7, 500)) == 500
    )


def test_a_student_reads_log_probabilities_without_a_graph_and_in_float32(folder: str) -> None:
    student = load_student(folder, torch.bfloat16, False)
    ids = torch.from_numpy(sentinel_ids(VOCABULARY)).long()
    found = student.logprobs(ids)
    assert found.dtype == torch.float32 and not found.requires_grad and len(found) == len(ids) - 1
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = logprobs(plain, ids.numpy())[:-1].gather(-1, ids[1:, None])[:, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0.2)
    exact = load_student(folder, torch.float32, False)
    torch.testing.assert_close(exact.logprobs(ids), expected, rtol=0, atol=1e-5)
    assert exact.vocabulary == VOCABULARY and exact.training


def test_sequences_that_are_packed_do_not_see_each_other(folder: str) -> None:
    student = load_student(folder, torch.float32, False)
    sequences = [torch.arange(3, 3 + n) for n in (5, 1, 9)]
    with torch.no_grad():
        packed = student.logits(sequences)
    alone = [logprobs(tiny_model(7, tied=False), s.numpy()) for s in sequences]
    torch.testing.assert_close(packed.log_softmax(-1), torch.cat(alone), rtol=0, atol=1e-4)


@pytest.mark.parametrize("asked", [True, False])
def test_activations_are_computed_anew_if_and_only_if_that_was_asked_for(asked: bool, folder: str) -> None:
    """Not by the older way (reentrant), which drops gradients of frozen students with adapters."""
    causal = load_student(folder, torch.float32, asked).causal
    assert causal.is_gradient_checkpointing == asked
    ways = [f.keywords for m in causal.modules() if (f := getattr(m, "_gradient_checkpointing_func", None)) is not None]
    assert all(way == {"use_reentrant": False} for way in ways) and bool(ways) == asked


def test_a_teacher_s_output_matrix_is_read_alone(folder: str, tmp_path: Path) -> None:
    head = load_head(folder, torch.bfloat16, VOCABULARY)
    assert head.dtype == torch.bfloat16
    assert torch.equal(head, tiny_model(7, tied=False).lm_head.weight.detach().bfloat16())
    for rows in (VOCABULARY - 1, VOCABULARY + 1):
        with pytest.raises(ConfigurationError, match=rf"has {VOCABULARY} rows and the student's {rows}; use a top-k"):
            load_head(folder, torch.float32, rows)
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="has none in its safetensors; choose another"):
        load_head(str(tmp_path), torch.float32, VOCABULARY)


def test_an_adapter_begins_from_its_seed_alone() -> None:
    """... does nothing yet, is of the student's dtype, and takes no random number from anybody else."""
    made = []
    for ambient, seed in ((1, 5), (2, 5), (2, 6)):
        causal = fresh().bfloat16()
        torch.manual_seed(ambient)
        state = torch.get_rng_state()
        adapt(causal, LoraConfig(r=2), seed)
        assert torch.equal(torch.get_rng_state(), state)
        made.append({n: p.detach() for n, p in causal.named_parameters() if p.requires_grad})
        assert all(p.dtype == torch.bfloat16 for p in made[-1].values())
        assert all(bool(p.any()) == (".lora_A." in n) for n, p in made[-1].items())
    one, again, other = made
    assert all(torch.equal(p, again[n]) for n, p in one.items())
    assert not all(torch.equal(p, other[n]) for n, p in one.items())
