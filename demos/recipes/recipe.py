"""Common parts of the recipes: tokenizer of words, examples, and the command that makes and checks checkpoints."""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from demos.recipes.pretrain import BOS, EOS, Example, digests, make_reproducible, wrap_tokenizer
from demos.tasks.shop import SPECIAL_WORDS, Working

DIGESTS = "SHA256SUMS"
VOCAB_ROWS = 64  # the words of a task, rounded up: rows beyond them are never trained towards

Maker = Callable[[Path], None]


def word_tokenizer(vocabulary: Sequence[str]) -> PreTrainedTokenizerFast:
    """Word-level tokenizer; texts are split and joined at spaces, and <bos> is put in front."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.add_special_tokens([*SPECIAL_WORDS, "<unk>"])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    wrapped = wrap_tokenizer(tokenizer)
    wrapped.unk_token = "<unk>"
    return wrapped


def encoded(prompt: str, working: Working, vocabulary: Sequence[str]) -> Example:
    """Prompt and solution as token ids; the prompt is context, not trained."""
    id_of = {word: index for index, word in enumerate(vocabulary)}
    context = (BOS, *(id_of[word] for word in prompt.split()))
    completion = (*(id_of[word] for word in working.words), EOS)
    return Example(ids=context + completion, loss_mask=(False,) * len(context) + (*working.loss_mask, True))


def command_line(task: str) -> argparse.ArgumentParser:
    """Parser of a recipe's command; `only` and others may be added."""
    parser = argparse.ArgumentParser(description=f"Make the checkpoints of the {task} task from scratch.")
    parser.add_argument("--output", type=Path, default=Path("assets") / task)
    parser.add_argument("--only", help="name of the one checkpoint to make")
    parser.add_argument("--check", action="store_true", help="train nothing, measure what is there")
    return parser


def make_and_check(
    arguments: argparse.Namespace, makers: Mapping[str, Maker], measured: Callable[[Path, Sequence[str]], bool]
) -> None:
    """Make the checkpoints (unless `--check`), write their digests, compare and measure; exits with 1 on a miss.

    `measured(output, names)` prints what the checkpoints can do and says whether that is as it should be.
    """
    output: Path = arguments.output
    if arguments.only and arguments.only not in makers:
        sys.exit(f"--only needs one of {', '.join(makers)}, but got {arguments.only!r}.")
    names = [arguments.only] if arguments.only else list(makers)
    make_reproducible()
    if not arguments.check:
        for name in names:
            started = time.process_time()
            makers[name](output / name)
            print(f"{name}: made in {time.process_time() - started:.0f} CPU s")
        lines = _digest_lines(output, makers)
        (output / DIGESTS).write_text(lines, encoding="utf-8")
        print(lines, end="")
    if not (output / DIGESTS).is_file():
        sys.exit(f"--check needs {output / DIGESTS}, but there is none: make the checkpoints first.")
    same = (output / DIGESTS).read_text(encoding="utf-8") == _digest_lines(output, makers)
    print(f"{DIGESTS}: {'good' if same else 'DIFFERS from the files'}")
    sys.exit(0 if measured(output, names) and same else 1)


def _digest_lines(output: Path, makers: Mapping[str, Maker]) -> str:
    """Content of SHA256SUMS, in the format of ``sha256sum --check``."""
    files = {path: digest for path, digest in digests(output).items() if path.split("/")[0] in makers}
    return "".join(f"{digest}  {path}\n" for path, digest in files.items())
