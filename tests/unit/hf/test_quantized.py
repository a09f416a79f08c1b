"""Quantized folders: their parameters and bytes, what can be divided, and what is refused of a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf.folder import Stored, read_config, read_headers
from hf.quantized import Quantization, parameters, quantization, quantized_head
from launch.config.run_config import run_config
from launch.plan import environment
from launch.plan.checks.devices import resolved
from launch.plan.checks.models import parameter_count
from launch.plan.memory.footprint import Phase, TeacherRole, footprint
from launch.plan.memory.parts import parts
from launch.plan.memory.shapes import ModelShape, read_shape, uneven
from launch.plan.plan import make_plan
from opd.errors import ConfigurationError, DataError
from tests.quantized_models import Form, quantized

TAUGHT = ["experiment=shop", "method=topk_reverse_kl", "teacher.dtype=BFLOAT16", "teacher.backend=VLLM"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Form, Path]:
    made = {form: tmp_path_factory.mktemp(form.name) for form in Form}
    for form, folder in made.items():
        quantized(form, folder, vocab_size=64, max_position_embeddings=256)  # ids as the embedded student has
    return made


@pytest.mark.parametrize("form", Form)
def test_parameters_are_those_of_the_plain_model_and_bytes_those_of_the_file(
    form: Form, folders: dict[Form, Path]
) -> None:
    path = str(folders[form])
    shape, file = read_shape(path), folders[form] / "model.safetensors"
    plain = 2 * 64 * 256 + 8 * 32 * 256 * 4 + 3 * 256 * 512 + 2 * 256 + 256 + 2 * 32
    assert parameter_count(path) == shape.parameters == plain
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert shape.quantized == shape.weights(2) == file.stat().st_size - header < 2 * plain
    role = TeacherRole(model=shape, bytes_each=2, tokens=8, rows=8, on_gpu=False)
    assert footprint(role, Phase.REST).weights == shape.quantized


def test_a_teacher_over_two_gpus_has_half_on_each_and_its_matrix_on_the_first(folders: dict[Form, Path]) -> None:
    told = [*TAUGHT, "learner.tokens_per_microbatch=64", f"teacher.path={folders[Form.FP8]}"]
    told += ["teacher.tensor_parallel=2"]
    found = {part.name: part.role for part in parts(resolved(run_config(told)), 0)}["teacher actor"]
    assert isinstance(found, TeacherRole) and found.parallel == 2
    rest = footprint(found, Phase.REST)
    assert (rest.weights, rest.heads) == (found.model.quantized // 2, 2 * 64 * 256)


def refused(*told: str) -> str:
    with pytest.raises((ConfigurationError, DataError)) as caught:
        make_plan(run_config([*told, "dry_run=true"]))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("form", Form)
def test_quantized_teachers_are_planned_in_vllm_alone(
    form: Form, folders: dict[Form, Path], processor: Callable[[str], None]
) -> None:
    processor("avx2 avx512f amx_tile")
    told = [*TAUGHT, f"teacher.path={folders[form]}"]
    assert make_plan(run_config([*told, "dry_run=true"])).exact_kl
    assert f"quant_method {form.value!r}), which teacher.backend=TORCH does not read; set" in refused(
        *told, "teacher.backend=TORCH"
    )
    assert "computed with in BFLOAT16; set teacher.dtype=BFLOAT16" in refused(*told, "teacher.dtype=FLOAT32")


def test_blocks_of_fp8_need_a_processor_that_can_multiply_them(
    folders: dict[Form, Path], processor: Callable[[str], None], tmp_path: Path
) -> None:
    weights = {"type": "float", "num_bits": 8, "strategy": "block", "block_structure": [128, 128]}
    other = spoilt(folders[Form.INT8], tmp_path / "other", config_groups={"group_0": {"weights": weights}})
    for folder in (folders[Form.FP8], other):
        told = [*TAUGHT, f"teacher.path={folder}"]
        for flags in ("avx2", "avx512f avx512_bf16", "avx512f amx_tiles"):
            processor(flags)
            assert "only with AMX (Sapphire Rapids and later), and this machine's has none; set" in refused(*told)
        assert make_plan(run_config([*told, "cluster=existing", "dry_run=true"])).exact_kl, (
            "another machine's processor"
        )
        processor("avx2 avx512f amx_tile")
        assert make_plan(run_config([*told, "dry_run=true"])).exact_kl
    processor("avx2")
    for form in (Form.INT8, Form.AWQ):
        assert make_plan(run_config([*TAUGHT, f"teacher.path={folders[form]}", "dry_run=true"])).exact_kl


def test_instructions_are_those_that_the_kernel_names(processor: Callable[[str], None]) -> None:
    processor("avx avx2 avx512fp16 amx_tile avx512_bf16")
    assert environment.instructions() == ("avx2", "avx512_bf16", "amx_tile")
    processor("")
    assert environment.instructions() == ()


def test_a_quantized_student_or_inner_teacher_is_refused(folders: dict[Form, Path]) -> None:
    path = folders[Form.INT8]
    assert "quantized weights, which cannot be trained" in refused("experiment=shop", f"student.path={path}")
    blended = ["experiment=shop", "method=trb", f"teacher.path={path}", "teacher.dtype=BFLOAT16"]
    assert "has quantized ones; choose the unquantized model" in refused(*blended, "teacher.backend=VLLM")


def spoilt(folder: Path, to: Path, **changes: Any) -> Path:
    """A copy of a folder whose quantization says something else."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_other_methods_and_sizes_that_do_not_divide_are_refused(
    folders: dict[Form, Path], processor: Callable[[str], None], tmp_path: Path
) -> None:
    processor("amx_tile")
    other = spoilt(folders[Form.INT8], tmp_path / "other", quant_method="gptq")
    assert "an engine reads fp8, awq, compressed-tensors here" in refused(*TAUGHT, f"teacher.path={other}")
    told = [*TAUGHT, f"teacher.path={folders[Form.FP8]}"]
    assert "divides each layer among 3 devices, but" in refused(*told, "teacher.tensor_parallel=3")
    assert "scales of blocks of 128 columns" in refused(*told, "teacher.tensor_parallel=4")
    with pytest.raises(ConfigurationError, match=r"which teacher.backend=TORCH cannot; set teacher.backend=VLLM"):
        run_config(["experiment=shop", "teacher.tensor_parallel=2"])


@pytest.mark.parametrize("raw", [3, "fp8", [], {}, {"quant_method": 4}, {"bits": 4}])
def test_a_form_that_is_none_is_one_sentence(raw: Any) -> None:
    with pytest.raises(DataError, match="without a quant_method"):
        quantization({"quantization_config": raw}, "the teacher 'x'")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=9,
)
KEYS = st.sampled_from(["bits", "w_bit", "weight_block_size", "group_size", "config_groups", "weights"])


@given(st.dictionaries(KEYS, JSON, max_size=4))
def test_anything_beside_the_method_is_understood(raw: dict[str, Any]) -> None:
    found = quantization({"quantization_config": raw | {"quant_method": "awq"}}, "the teacher 'x'")
    assert found is not None and found.block > 0 and found.bits > 0


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 8), st.sampled_from([1, 32, 128]), st.booleans())
def test_what_divides_evenly_has_whole_heads_columns_and_blocks(
    heads: int, kv: int, number: int, block: int, square: bool
) -> None:
    form = Quantization(method="fp8", bits=8, block=block, square=square)
    model = ModelShape(
        parameters=1, layers=1, width=64, inner=1536, heads=heads, kv_heads=kv, head_dim=64, vocabulary=9, form=form
    )
    wrong = uneven(model, number)
    assert bool(wrong) >= bool(heads % number or 1536 % number)
    if not wrong and number > 1:
        assert not (kv % number and number % kv)
        assert not (1536 // number) % block and not (model.query // number) % block
    assert not uneven(model, 1)


def test_a_quantized_output_matrix_is_found(folders: dict[Form, Path]) -> None:
    stored = dict(read_headers(str(folders[Form.INT8]), "the teacher"))
    assert not quantized_head(stored, tied=False)
    as_int8 = stored | {"lm_head.weight": Stored(file=Path("x"), dtype="I8", shape=(64, 256))}
    assert quantized_head(as_int8, tied=False) == "lm_head.weight"
    packed = {name: tensor for name, tensor in stored.items() if not name.startswith("lm_head")}
    assert quantized_head(packed, tied=False) == "lm_head.weight" and not quantized_head(packed, tied=True)
    packed["lm_head.weight_packed"] = as_int8["lm_head.weight"]
    assert quantized_head(packed, tied=True) == "lm_head.weight_packed"
    known = quantization(read_config(str(folders[Form.AWQ]), "x"), "x")
    assert known == Quantization(method="awq", bits=4, block=32)
    assert sum(parameters(stored, None).values()) > 0
