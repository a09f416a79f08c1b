"""Few-shot files: solved examples as turns that stand before the question."""

from functools import cache

from launch.inputs.messages import whole
from launch.inputs.prompt_files import row_of
from launch.inputs.prompt_paths import files_of
from launch.inputs.records import Record, records
from opd.errors import DataError
from opd.types.prompt_rows import Columns, Messages

_ORDER = ("user", "assistant")


@cache
def read_examples(path: str, columns: Columns, suffix: str) -> Messages:
    """Turns of `path`, in the order of its records, which end with an assistant's.

    A record is a message (`role`, `content`), a list of them under `messages`, or a prompt with its answer in the
    columns of `columns`, with `suffix` behind the prompt. Raises `DataError` with file and line for another, and for
    turns that are not those of a user and an assistant by turns.
    """
    found = [
        (record.where, turn)
        for file in files_of(path, f"{columns.place}.few_shot")
        for record in records(file)
        for turn in _turns(record, columns, suffix)
    ]
    for i, (where, turn) in enumerate(found):
        if turn["role"] != _ORDER[i % 2]:
            more = f"; a system prompt is {columns.place}.system" if turn["role"] == "system" else ""
            raise DataError(
                f"{where}: few-shot examples are turns of user and assistant by turns, but turn {i + 1} is the "
                f"{turn['role']}'s; correct it{more}"
            )
    if not found or len(found) % 2:
        where = found[-1][0] if found else path
        raise DataError(
            f"{where}: few-shot examples end with an assistant's answer, but these {len(found)} turns do not; add it"
        )
    return tuple(turn for _, turn in found)


def _turns(record: Record, columns: Columns, suffix: str) -> Messages:
    if "role" in record.values:
        return whole([record.values], record.where, sparse=record.sparse)
    if "messages" in record.values and columns.prompt not in record.values:
        return whole(record.values["messages"], f"{record.where}: 'messages'", sparse=record.sparse)
    row = row_of(record, columns)
    if not isinstance(row.prompt, str):
        raise DataError(
            f"{record.where}: {columns.prompt!r} of a few-shot example must be text with an answer beside it; store "
            "conversations under 'messages', with their answers"
        )
    if not row.answer.strip():
        raise DataError(f"{record.where} has an empty {columns.answer}; a few-shot example needs its answer")
    return ({"role": "user", "content": row.prompt + suffix}, {"role": "assistant", "content": row.answer})
