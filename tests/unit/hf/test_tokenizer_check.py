"""Whether two checkpoints speak the same tokens, and whether a folder is a checkpoint."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from hf.tokenizer_check import check_checkpoint, check_same_tokens, tokenizer_identity
from opd.errors import ConfigurationError, DataError, OpdError

WORDS = ("<pad>", "<bos>", "<eos>", "one", "two", "plus")


def checkpoint(
    folder: Path,
    words: Sequence[str] = WORDS,
    added: Sequence[str] = (),
    eos: str = "<eos>",
    template: str | None = None,
    rows: int = 64,
    **config: object,
) -> Path:
    """A folder with a tokenizer, a configuration and (empty) weights."""
    model = WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), bos_token="<bos>", eos_token=eos, pad_token="<pad>"
    )
    tokenizer.add_tokens(list(added))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": rows} | config))
    save_file({"w": np.zeros(1, dtype=np.float32)}, folder / "model.safetensors")
    return folder


def test_identity_says_what_the_tokenizer_is(tmp_path: Path) -> None:
    identity = tokenizer_identity(str(checkpoint(tmp_path, added=["<think>"], template="{{ messages }}")))
    assert identity.size == 7
    assert identity.rows == 64
    assert identity.tokens["<think>"] == 6
    assert identity.special == {"bos": 1, "eos": 2, "pad": 0, "unk": None}
    assert identity.template
    assert "tokens" not in repr(identity)


def test_nested_configurations_have_rows_too(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, text_config={"vocab_size": 128})
    assert tokenizer_identity(str(folder)).rows == 128


def test_equal_tokenizers_agree_whatever_their_models_pad(tmp_path: Path) -> None:
    student = tokenizer_identity(str(checkpoint(tmp_path / "a", rows=64)))
    teacher = tokenizer_identity(str(checkpoint(tmp_path / "b", rows=128)))
    assert student.digest == teacher.digest
    check_same_tokens(student, teacher)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (
            {"words": (*WORDS[:3], "two", "one", "plus")},
            "id 3 is 'one' for the student and 'two' for the teacher",
        ),
        ({"added": ["<think>"]}, "id 6 is None for the student and '<think>' for the teacher"),
        ({"eos": "plus"}, "the eos token is 2 for the student and 5 for the teacher"),
    ],
)
def test_the_first_difference_is_named(tmp_path: Path, other: dict[str, object], difference: str) -> None:
    student = tokenizer_identity(str(checkpoint(tmp_path / "a")))
    teacher = tokenizer_identity(str(checkpoint(tmp_path / "b", **other)))
    with pytest.raises(DataError, match=difference) as caught:
        check_same_tokens(student, teacher)
    assert str(tmp_path / "a") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(DataError, match="needs a tokenizer"):
        tokenizer_identity(str(tmp_path))


def test_a_checkpoint_is_checked_before_it_is_loaded(tmp_path: Path) -> None:
    def refused(folder: Path, why: str, kind: type[OpdError] = DataError) -> None:
        with pytest.raises(kind, match=f"teacher.*{why}"):
            check_checkpoint(str(folder), "teacher")

    check_checkpoint(str(checkpoint(tmp_path / "good")), "teacher")
    refused(tmp_path / "nowhere", "is none", ConfigurationError)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"no config\.json")
    (tmp_path / "empty" / "config.json").write_text("{")
    refused(tmp_path / "empty", r"damaged config\.json")
    (tmp_path / "empty" / "config.json").write_text("{}")
    refused(tmp_path / "empty", "without model_type")
    refused(checkpoint(tmp_path / "code", auto_map={"AutoModel": "m.M"}), "own Python code")
    (checkpoint(tmp_path / "bare") / "model.safetensors").unlink()
    refused(tmp_path / "bare", "needs safetensors")
