"""Rows of OpenThoughts3 (`open-thoughts/OpenThoughts3-1.2M`) as prompts and answers, for `prompts.map`."""

from collections.abc import Mapping
from typing import Any


def first_exchange(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Record with the first question of its conversation as `prompt` and the answer to it as `answer`.

    Its conversations have the keys `from` (human, gpt) and `value`; everything else stays, for filters.

    Raises:
        ValueError: there is no question that is answered.
    """
    match record.get("conversations"):
        case [{"from": "human", "value": str(prompt)}, {"from": "gpt", "value": str(answer)}, *_]:
            return {**record, "prompt": prompt, "answer": answer}
        case _:
            raise ValueError("conversations begins with no human's question and gpt's answer")
