"""Questions with choices as prompts that ask for a letter: maps of the records of known data sets."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from opd.errors import DataError

ASKED = "Please reason step by step, and put the letter of your answer within \\boxed{}."
_GPQA = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def gpqa(record: Mapping[str, Any]) -> Mapping[str, str]:
    """Prompt and answer of a record of GPQA; the order of its choices is drawn from the question itself."""
    missing = [name for name in ("Question", *_GPQA) if not isinstance(record.get(name), str)]
    if missing:
        raise DataError(f"a record of GPQA needs a text in {missing[0]!r}, which this one has not; name another file")
    question = str(record["Question"]).strip()
    order = random.Random(f"choices/{question}").sample(range(len(_GPQA)), len(_GPQA))
    return lettered(question, [str(record[_GPQA[i]]).strip() for i in order], order.index(0))


def lettered(question: str, choices: Sequence[str], right: int) -> Mapping[str, str]:
    """A question with its choices under letters, and the letter of the right one (counted from 0).

    Example: `lettered("2 + 2?", ["3", "4"], 1)["answer"] == "B"`.
    """
    lines = [f"({chr(ord('A') + i)}) {choice}" for i, choice in enumerate(choices)]
    return {"prompt": "\n".join([question, "", *lines, "", ASKED]), "answer": chr(ord("A") + right)}
