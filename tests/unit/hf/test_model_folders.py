"""Every damaged or contradictory model folder is one sentence when a run is planned."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from hf.folder import Stored, output_matrix, read_headers
from hf.folder_check import read_folder
from launch.config.run_config import run_config
from launch.plan.plan import make_plan
from opd.errors import ConfigurationError, DataError
from tests.fuzz.families import make
from tests.fuzz.model_folders import EITHER, REFUSED, tried

SHOP = Path(__file__).resolve().parents[3] / "assets" / "shop"
ASKED = ["experiment=shop", "method=topk_reverse_kl"]


@pytest.mark.parametrize("kind", REFUSED)
def test_a_folder_that_is_wrong_is_refused_with_one_sentence(kind: str) -> None:
    """A slice of `python -m tests.fuzz.model_folders`; the student's and the teacher's turn alternate."""
    role = ("student", "teacher")[list(REFUSED).index(kind) % 2]
    assert tried(kind, role, 1) == "refused"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", EITHER)
def test_a_folder_that_is_a_little_damaged_is_never_a_traceback(kind: str, seed: int) -> None:
    assert tried(kind, "student", seed) in ("refused", "planned")


def copied(folder: Path, **changes: Any) -> str:
    shutil.copytree(SHOP / "student", folder)
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | changes))
    return str(folder)


def refused(path: str, says: str, *more: str, role: str = "student") -> None:
    with pytest.raises((DataError, ConfigurationError), match=says) as caught:
        make_plan(run_config([*ASKED, f"{role}.path={path}", *more]))
    assert "\n" not in str(caught.value)


def test_a_context_longer_than_the_model_is_refused() -> None:
    longest = json.loads((SHOP / "student" / "config.json").read_text())["max_position_embeddings"]
    more = [f"student.max_model_len={longest + 1}", "learner.tokens_per_microbatch=200000"]
    with pytest.raises(ConfigurationError, match=rf"at most {longest} tokens .*max_model_len is {longest + 1}; lower"):
        make_plan(run_config([*ASKED, *more]))


def test_a_teacher_s_context_is_compared_with_the_longest_sequence(tmp_path: Path) -> None:
    folder = shutil.copytree(SHOP / "teacher", tmp_path / "t")
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"max_position_embeddings": 20}))
    refused(str(folder), "teacher .* reads at most 20 tokens .* but a sequence may have", role="teacher")


def test_an_adapter_says_how_to_merge_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "models/base"}')
    refused(str(tmp_path), r"LoRA adapter of 'models/base'; merge .*merge_and_unload\(\)")


def test_an_adapter_beside_whole_weights_is_refused(tmp_path: Path) -> None:
    """transformers would read the adapter's base model, vLLM the weights."""
    folder = copied(tmp_path / "m")
    (Path(folder) / "adapter_config.json").write_text('{"base_model_name_or_path": "models/base"}')
    refused(folder, r"has an adapter \(adapter_config.json\) beside whole weights")
    (Path(folder) / "model.safetensors").unlink()
    refused(folder, r"LoRA adapter of 'models/base'; merge")


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("checkpoint-5/config.json", r"has no config\.json; give the one that is meant: .*/checkpoint-5$"),
        ("step_5/actor/huggingface/config.json", r"give the one that is meant: .*/huggingface$"),
        ("m.gguf", "what it has is GGUF"),
        ("model_world_size_8_rank_0.pt", "shards of FSDP"),
    ],
)
def test_a_folder_without_a_model_says_what_it_has(file: str, says: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("{}")
    refused(str(tmp_path), says)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_said_to_be_one(file: str, tmp_path: Path) -> None:
    folder = copied(tmp_path / "m")
    (Path(folder) / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    refused(folder, "git lfs pull")


def test_no_folder_says_what_else_a_path_may_be() -> None:
    refused("./Qwen/Qwen3-0.6B", r"is none; correct the path, or give a name on the Hugging Face hub \(ORG/NAME\)")
    refused("Qwen/Qwen3-0.6B", r"is no path here, and the hub .* cannot be asked")


@pytest.mark.parametrize(("row", "tied"), [(-1, True), (0, True), (0, False), (None, True)])
def test_an_output_matrix_beside_a_tied_one_must_be_the_same(tmp_path: Path, row: int | None, tied: bool) -> None:
    """transformers would read it and vLLM would not, so engine and learner, or a teacher's two sides, would differ."""
    folder = tmp_path / "tied"
    copied(folder, tie_word_embeddings=tied)
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    if row is not None:
        head[row] += 1
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    if row is None or not tied:
        assert read_folder(str(folder), "student").stored
    else:
        refused(str(folder), "stores 'lm_head.weight' with other numbers .*tie_word_embeddings=true.*set it to false")


def test_heads_that_no_kernel_on_a_cpu_has_are_refused(tmp_path: Path) -> None:
    make("Qwen2.5", tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    from transformers import AutoConfig, AutoModelForCausalLM

    said |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**said)).save_pretrained(tmp_path)
    refused(str(tmp_path), "heads of width 16, which vLLM has no CPU kernel for", f"teacher.path={tmp_path}")


def test_the_widths_of_heads_are_those_of_vllm() -> None:
    import importlib.util

    from actors.config import CPU_HEAD_SIZES

    found = importlib.util.find_spec("vllm")
    assert found is not None and found.submodule_search_locations
    source = Path(found.submodule_search_locations[0]) / "v1/attention/backends/cpu_attn.py"
    assert f"return {list(CPU_HEAD_SIZES)}" in source.read_text()


def test_headers_are_read_without_the_numbers(tmp_path: Path) -> None:
    """A file larger than memory: 61 GiB without a byte of them on the disk."""
    header = json.dumps(
        {"lm_head.weight": {"dtype": "BF16", "shape": [2**15, 10**6], "data_offsets": [0, 2**16 * 10**6]}}
    )
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + 2**16 * 10**6)
    stored = read_headers(str(tmp_path), "student")
    assert stored["lm_head.weight"].size == 2**15 * 10**6
    assert output_matrix(stored) == "lm_head.weight"


def test_a_tied_output_matrix_is_the_embedding_whatever_it_is_called() -> None:
    one = Stored(file=Path("f"), dtype="F32", shape=(3, 2))
    assert output_matrix({"transformer.wte.weight": one, "transformer.h.0.attn.c_attn.weight": one}) == (
        "transformer.wte.weight"
    )
    assert output_matrix({"gpt_neox.embed_in.weight": one, "embed_out.weight": one}) == "embed_out.weight"
    assert output_matrix({"model.norm.weight": one}) is None


@pytest.mark.parametrize("family", ["Mixtral", "DeepSeek-V3", "GPT-NeoX", "GPT-2", "OPT"])
def test_a_whole_folder_agrees_with_itself_whatever_names_it_keeps(tmp_path: Path, family: str) -> None:
    make(family, tmp_path)
    assert read_folder(str(tmp_path), "teacher").stored
