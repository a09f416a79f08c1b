"""Checkpoints with the chat templates and special tokens of four families, over one token per byte."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import tiny_model

HERE = Path(__file__).parent
FOLDER = TemporaryDirectory(prefix="families-")  # removed when this process ends
PLACEHOLDERS = 8  # ids of special tokens, as many for every family: their vocabularies have one size


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Special tokens of a family, the one that ends a turn first; `bos` is None where texts begin without one."""

    end: str
    bos: str | None
    others: tuple[str, ...]


FAMILIES = {
    "qwen3": Family(end="<|im_end|>", bos=None, others=("<|im_start|>", "<|endoftext|>")),
    "llama3": Family(end="<|eot_id|>", bos="<|begin_of_text|>", others=("<|start_header_id|>", "<|end_header_id|>")),
    "gemma2": Family(end="<end_of_turn>", bos="<bos>", others=("<start_of_turn>", "<eos>")),
    "mistral": Family(end="</s>", bos="<s>", others=("[INST]", "[/INST]")),
}


@cache
def checkpoint(family: str, template: str = "") -> str:
    """A tiny random model with the tokenizer of `family`, with another family's `template` if one is named."""
    of = FAMILIES[family]
    folder = Path(FOLDER.name) / f"{family}-{template}"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    special = [of.end, *([of.bos] if of.bos else []), *of.others]
    special += [f"<|reserved_{i}|>" for i in range(PLACEHOLDERS - len(special))]
    words.add_special_tokens(special)
    if of.bos:
        start = (of.bos, words.token_to_id(of.bos))
        words.post_processor = processors.TemplateProcessing(
            single=f"{of.bos} $A", pair=f"{of.bos} $A $B", special_tokens=[start]
        )
    names = {"eos_token": of.end, "additional_special_tokens": [*of.others]}
    made = PreTrainedTokenizerFast(tokenizer_object=words, **names, **({"bos_token": of.bos} if of.bos else {}))
    made.chat_template = (HERE / f"{template or family}.jinja").read_text()
    made.save_pretrained(folder)
    rows, end = len(alphabet) + PLACEHOLDERS, words.token_to_id(of.end)
    tiny_model(vocab_size=rows, positions=4096, eos_token_id=end, bos_token_id=None).save_pretrained(folder)
    return str(folder)
