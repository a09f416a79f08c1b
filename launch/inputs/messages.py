"""Chat messages of a prompt file in the form of chat templates: whole, or refused with the row."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from launch.inputs.json_records import Number
from opd.errors import DataError

Message = Mapping[str, Any]
DEEPEST = 64  # levels of a tool's arguments or description
_SHAREGPT = {"from", "value"}
_ANSWERING = frozenset({"assistant", "gpt", "model", "bot", "chatbot", "ai"})
"""Roles of who answers, as data sets spell them; what is meant by the others, the chat template decides."""


_ROLES = {role: role for role in ("system", "user", "assistant", "tool", "developer")} | {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
}
"""Roles as chat templates have them, by what data sets write."""


def messages(value: Any, where: str, *, sparse: bool, drop_last_answer: bool, key: str) -> tuple[Message, ...]:
    """Conversation in `value`, ending where an assistant is to write.

    Text parts are joined, other parts refused; keys that are null are left out, except for the content of a message
    with tool calls. `sparse`: nulls in objects mean nothing (see `launch.inputs.records.Record`). `key` is the setting
    that allows to cut a last answer.
    """
    turns = list(whole(value, where, sparse=sparse))
    if _answers(turns[-1]):
        if not drop_last_answer:
            role = "an assistant's turn" if turns[-1]["role"] == "assistant" else f"a turn of {turns[-1]['role']!r}"
            raise DataError(
                f"{where} ends with {role}, which would stand in the prompt as if it were asked; cut it "
                f"off with {key}=true, or store the prompt without it"
            )
        turns.pop()
        if not turns or _answers(turns[-1]):
            raise DataError(f"{where} has no turn before the assistant's last one to answer to; remove the row")
    check_roles(turns, where)
    if not any(isinstance(m["content"], str) and m["content"].strip() for m in turns):
        raise DataError(f"{where} has messages without any text; remove the row")
    return tuple(turns)


def check_roles(turns: Sequence[Message], where: str) -> None:
    """Refuse a role that is another spelling of one that chat templates have: many would write it as it is."""
    for i, turn in enumerate(turns, start=1):
        meant = _ROLES.get(turn["role"].strip().casefold(), turn["role"])
        if meant != turn["role"]:
            raise DataError(
                f"{where} message {i} has the role {turn['role']!r}, which chat templates call {meant!r} and would "
                "write as it is; store it so, or change it with a function in prompts.map"
            )


def _answers(turn: Message) -> bool:
    return str(turn["role"]).strip().casefold() in _ANSWERING


def whole(value: Any, where: str, *, sparse: bool) -> tuple[Message, ...]:
    """All turns of the conversation in `value`, as they are."""
    if isinstance(value, list) and value and all(isinstance(i, Mapping) and i.keys() >= _SHAREGPT for i in value):
        raise DataError(
            f"{where} has messages with the keys 'from' and 'value' (ShareGPT); store them as role (user, assistant) "
            "and content"
        )
    if not isinstance(value, list) or not value or not all(map(_is_message, value)):
        raise DataError(f"{where} must be text or a list of messages with role and content, got {_items(value)}")
    return tuple(_message(item, f"{where} message {i}", sparse) for i, item in enumerate(value, start=1))


def _items(value: Any) -> str:
    """Description of what stands in place of messages: the first entry that is none, or that there are none."""
    if not isinstance(value, list) or not value:
        return "an empty list" if value == [] else kind(value)
    place, entry = next((i, item) for i, item in enumerate(value, start=1) if not _is_message(item))
    keys = f" with {sorted(map(str, entry))[:6]}" if isinstance(entry, Mapping) else ""
    return f"a list whose entry {place} is {kind(entry)}{keys}"


def tools(value: Any, where: str, *, sparse: bool) -> tuple[Mapping[str, Any], ...]:
    """Descriptions of the tools that a template may name; a null or an empty list is none."""
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, Mapping) and item for item in value):
        raise DataError(f"{where} must be a list of tool descriptions (objects), got {kind(value)}; correct the row")
    return tuple(_plain(item, where, sparse, DEEPEST) for item in value)


def text(value: str, where: str) -> str:
    """`value`, if it can be stored. Raises `DataError` for half of a surrogate pair."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise DataError(
            f"{where} has half of a surrogate pair ({half} at character {error.start + 1}), which is no text; correct "
            "the row"
        ) from error
    return value


def kind(value: Any) -> str:
    """Name of a value's type in the words of JSON."""
    names = {type(None): "null", bool: "a boolean", str: "text", list: "a list", dict: "an object", Number: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")


def number(value: Any, where: str) -> int | float:
    """A JSON number, or one of a typed format, as Python's; refused where that would change it."""
    if isinstance(value, Number):
        try:
            value = float(value.text) if set(value.text) & set(".eE") else int(value.text)
        except ValueError as error:
            raise DataError(f"{where} has a number of {len(value.text)} digits; write it as text") from error
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{where} is beyond what a float can hold, or no number; correct the row or write it as text")
    return value


def plain(value: Any, where: str, *, sparse: bool) -> Any:
    """A value as Python's own: numbers as its numbers, nulls of a typed format left out, nothing else changed."""
    return _plain(value, where, sparse, DEEPEST)


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and "role" in item and ("content" in item or "tool_calls" in item)


def _message(item: Message, where: str, sparse: bool) -> Message:
    fields = {text(k, where): _plain(v, where, sparse, DEEPEST) for k, v in item.items() if v is not None}
    fields.pop("content", None)
    role = fields.get("role")
    if not isinstance(role, str) or not role.strip():
        raise DataError(f"{where} needs a role that is text, and content; got {kind(role)}")
    content = _content(item.get("content"), where, bool(fields.get("tool_calls")))
    return {"role": role, "content": content} | fields


def _content(value: Any, where: str, calls: bool) -> str | None:
    if isinstance(value, str):
        return text(value, f"{where} content")
    if value is None and calls:
        return None
    if isinstance(value, list) and value:
        return "".join(_part(part, f"{where} part {i}") for i, part in enumerate(value, start=1))
    got = "an empty list" if value == [] else kind(value)
    raise DataError(f"{where} needs role and content, and content that is text or a list of text parts, got {got}")


def _part(part: Any, where: str) -> str:
    if not isinstance(part, Mapping):
        raise DataError(f"{where} must be an object with type and text, got {kind(part)}; correct the row")
    given = {k: v for k, v in part.items() if v is not None}
    if given.keys() != {"type", "text"} or given["type"] != "text" or not isinstance(given["text"], str):
        found = given.get("type") if isinstance(given.get("type"), str) else sorted(map(str, given))
        raise DataError(
            f"{where} is {found!r}, but only parts with type 'text' and a text can be read; remove the row or the part"
        )
    return text(given["text"], where)


def _plain(value: Any, where: str, sparse: bool, depth: int) -> Any:
    """A value with numbers as Python's and texts checked, nothing else changed."""
    if not depth:
        raise DataError(f"{where} nests more than {DEEPEST} levels; correct the row")
    match value:
        case None | bool():
            return value
        case str():
            return text(value, where)
        case Number() | int() | float():
            return number(value, where)
        case Mapping():
            return {
                text(k, where): _plain(v, where, sparse, depth - 1)
                for k, v in value.items()
                if v is not None or not sparse
            }
        case list():
            return [_plain(item, where, sparse, depth - 1) for item in value]
    raise DataError(f"{where} holds {kind(value)}, which JSON has not; store it as text")
