"""Records of IFEval as prompts whose answer is the list of instructions to be checked."""

import json
from collections.abc import Mapping
from typing import Any

from opd.errors import DataError

NOT_CHECKED = ("language:response_language",)  # they need a language detector


def ifeval(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Prompt and answer of a record of IFEval; the answer is a JSON list of its instructions with their arguments."""
    names, arguments = record.get("instruction_id_list"), record.get("kwargs")
    if not isinstance(names, list) or not isinstance(arguments, list) or len(names) != len(arguments):
        raise DataError(
            "a record of IFEval needs lists instruction_id_list and kwargs of one length, which this one has not; name "
            "another file"
        )
    given = [
        {"id": name} | {key: value for key, value in (one or {}).items() if value is not None}
        for name, one in zip(names, arguments, strict=True)
    ]
    return {"prompt": record.get("prompt"), "answer": json.dumps(given, ensure_ascii=False)}


def checkable(record: Mapping[str, Any]) -> bool:
    """Whether all instructions of a record that `ifeval` made can be checked here."""
    return not any(one["id"] in NOT_CHECKED for one in json.loads(str(record["answer"])))
