"""Whether a model reads packed sequences exactly is known before it is loaded, and tried when it is."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf.packable import Trial, check_head, check_layers, context_length
from hf.packed_model import PackedModel
from launch.config.run_config import run_config
from launch.plan.plan import make_plan
from learner.model import Student, load_student
from opd.errors import ConfigurationError, DataError
from opd.loss.packed_attention import NAME
from tests.fuzz.architectures import SHOP
from tests.fuzz.families import FAMILIES, POSITIONS, WINDOW, make
from tests.tiny_models import VOCABULARY


def test_the_names_that_are_published_are_those_of_the_folder(tmp_path: Path) -> None:
    make("GPT-NeoX", tmp_path)
    names = {name for name, _ in load_student(str(tmp_path), torch.float32, False).named()}
    assert "embed_out.weight" in names and "lm_head.weight" not in names
    assert "gpt_neox.layers.0.attention.query_key_value.bias" in names


FOLLOWS = [*SHOP, "teacher.mixup=0.5", "student.max_model_len=224"]


def test_a_teacher_that_cannot_follow_its_student_is_refused_in_the_plan(tmp_path: Path) -> None:
    for family in ("GPT-NeoX", "GPT-2"):
        make(family, tmp_path / family)
    neox, gpt2 = (f"path={tmp_path / family}" for family in ("GPT-NeoX", "GPT-2"))
    with pytest.raises(ConfigurationError, match=r"^teacher .* follows the student.*'embed_out\.weight'.*mixup=0"):
        make_plan(run_config([*FOLLOWS, f"student.{neox}", f"teacher.{neox}"]))  # stored under other names
    with pytest.raises(ConfigurationError, match=r"^teacher .* follows the student.*copy of the student's"):
        make_plan(run_config([*FOLLOWS, f"student.{gpt2}"]))  # another architecture
    with pytest.raises(ConfigurationError, match=r"moving average, which needs float32.*teacher\.dtype=FLOAT32"):
        make_plan(run_config([*FOLLOWS, f"student.{gpt2}", f"teacher.{gpt2}", "teacher.dtype=BFLOAT16"]))
    make("Qwen3-MoE", tmp_path / "experts")
    experts = f"path={tmp_path / 'experts'}"
    with pytest.raises(ConfigurationError, match=r"^teacher .* follows the student.*'model.*\.experts\.0\."):
        make_plan(run_config([*FOLLOWS, f"student.{experts}", f"teacher.{experts}"]))  # published one by one
    for dtype, share in (("FLOAT32", "0.5"), ("BFLOAT16", "1")):
        settings = [f"student.{gpt2}", f"teacher.{gpt2}", f"teacher.dtype={dtype}", f"teacher.mixup={share}"]
        make_plan(run_config([*FOLLOWS, *settings]))


def test_a_student_is_trained_without_dropout_wherever_its_rate_is_kept(tmp_path: Path) -> None:
    make("OPT", tmp_path)  # 0.1, as an attribute of its layers
    student = load_student(str(tmp_path), torch.float32, False)
    assert student.training
    ids = [torch.arange(3, 20)]
    assert torch.equal(student.logits(ids), student.logits(ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["Qwen3-Next", "LFM2"])
def test_a_state_that_leaks_is_seen_by_the_trial_in_both_dtypes(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    """The last fence: what `check_layers` refuses by kind would not pass the numbers either."""
    make(family, tmp_path)
    causal: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation="eager")
    trial = Trial.of(causal, VOCABULARY, "it")
    model = PackedModel(causal)
    causal.set_attn_implementation(NAME)
    with pytest.raises(ConfigurationError, match="does not read packed sequences exactly"), torch.no_grad():
        trial.check(lambda sequences: model.logits(model.hidden(sequences)), "it")


def _without_cap(causal: Any) -> None:
    for layer in causal.model.layers:
        layer.self_attn.attn_logit_softcapping = None


def _without_window(causal: Any) -> None:
    causal.config.sliding_window = 10**6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "break_it"), [("Gemma-2, head not capped", _without_cap), ("Mistral (window)", _without_window)]
)
def test_a_lost_cap_or_window_is_seen_by_the_trial_in_both_dtypes(
    tmp_path: Path, family: str, break_it: Callable[[Any], None], dtype: torch.dtype
) -> None:
    make(family, tmp_path, sharpness=16)
    causal: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, attn_implementation="eager")
    trial = Trial.of(causal, VOCABULARY, "it")
    break_it(causal)
    with pytest.raises(ConfigurationError, match="does not read packed sequences exactly"):
        trial.check(Student(causal).logits, "it")


def test_answers_that_are_no_numbers_do_not_pass_the_trial(tmp_path: Path) -> None:
    trial = Trial.of(make("Qwen2.5", tmp_path), VOCABULARY, "it")

    def nothing(sequences: Sequence[Tensor]) -> Tensor:
        return torch.full((sum(map(len, sequences)), VOCABULARY), torch.nan)

    with pytest.raises(ConfigurationError, match="does not read packed sequences exactly"):
        trial.check(nothing, "it")


def test_damaged_weights_are_called_so(tmp_path: Path) -> None:
    causal = make("Qwen2.5", tmp_path)
    causal.get_output_embeddings().weight.data[0] = torch.nan
    with pytest.raises(DataError, match="it answers with NaN"):
        Trial.of(causal, VOCABULARY, "it")


def test_asking_about_the_head_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    causal = make("GPT-2", tmp_path)
    ids = torch.arange(3, 9)[None]
    before = causal(ids).logits
    assert check_head(causal, "it", bias=False) is causal.get_output_embeddings()
    assert torch.equal(causal(ids).logits, before)


def test_layers_of_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    causal = make("Qwen2.5", tmp_path)
    causal.config.layer_types = ["full_attention", "holographic_attention"]
    with pytest.raises(ConfigurationError, match="holographic_attention"):
        check_layers(causal, "it")


@pytest.mark.parametrize(
    ("rope", "tokens"),
    [
        ({"rope_type": "default"}, POSITIONS),
        ({"rope_type": "linear", "factor": 4.0}, 4 * POSITIONS),
        ({"rope_type": "dynamic", "factor": 2.0}, 2 * POSITIONS),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, POSITIONS),
    ],
)
def test_rope_scaling_lengthens_the_context(rope: dict[str, Any], tokens: int) -> None:
    from transformers import AutoConfig

    kind, fields = FAMILIES["Qwen2.5"]
    assert context_length(AutoConfig.for_model(kind, **fields | {"rope_parameters": rope})) == tokens


def test_families_have_windows_shorter_than_what_is_read() -> None:
    assert 2 * WINDOW < 60  # the sequences of tests.fuzz.architectures
