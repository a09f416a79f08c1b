"""Rendering of conversations with a chat template, and a check that nothing was lost."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from opd.errors import DataError
from opd.types.prompt_rows import Messages

Render = Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]], str]
"""A template as a function of messages and tools; raises what templates raise."""
REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What a template, a program of the checkpoint's, can raise about a conversation."""
_MARK = "\u2603mark\u2603"


def why_no_system(render: Render) -> str:
    """Reason why a template cannot take a system message; "" if it can."""
    system = {"role": "system", "content": f"{_MARK}1"}
    asked = {"role": "user", "content": f"{_MARK}2"}
    try:
        text = render((system, asked), ())
    except REFUSALS as error:
        return f"refuses one: {_reason(error)}"
    return "" if system["content"] in text else "leaves it out"


def rendered(render: Render, messages: Messages, tools: Messages, where: str) -> str:
    """The conversation as text, up to where the assistant writes.

    Raises:
        DataError: the template refuses the conversation, or leaves a message, a tool call or a tool out.
    """
    messages = _with_contents(render, messages, tools, where)
    text = _call(render, messages, tools, where)
    for i, message in enumerate(messages):
        if not _shows_content(render, messages, tools, i, text, where):
            raise DataError(
                f"{where}: the chat template leaves out what message {i + 1} (role {message['role']!r}) says; use a "
                "role that it knows"
            )
        if message.get("tool_calls") and not _names_calls(message["tool_calls"], text):
            raise DataError(f"{where}: the chat template leaves out the tool calls of message {i + 1}; remove the row")
    if tools and _call(render, messages, (), where) == text:
        raise DataError(f"{where} has tools, but the chat template names none; clear prompts.tools_column")
    return text


def _call(render: Render, messages: Messages, tools: Messages, where: str) -> str:
    try:
        return render(messages, tools)
    except REFUSALS as error:
        raise DataError(
            f"{where}: the chat template refuses the conversation ({_reason(error)}); correct the row"
        ) from error


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _with_contents(render: Render, messages: Messages, tools: Messages, where: str) -> Messages:
    """The messages as the template can take them where one has no content beside its tool calls.

    Some templates ask whether there is content, and others write what they are given: those would write `None`.
    """
    if all(message["content"] is not None for message in messages):
        return messages
    empty = tuple(dict(m) | {"content": ""} if m["content"] is None else m for m in messages)
    try:
        text = render(messages, tools)
    except REFUSALS:  # whether it is the null that it refuses, the empty text will say
        return empty
    return empty if text.count("None") > _call(render, empty, tools, where).count("None") else messages


def _shows_content(render: Render, messages: Messages, tools: Messages, i: int, text: str, where: str) -> bool:
    """Whether the content of a message changes the rendered text; most are found word for word."""
    content = messages[i]["content"]
    if not content or not content.strip() or content.strip() in text:
        return True
    other = (*messages[:i], dict(messages[i]) | {"content": content + _MARK}, *messages[i + 1 :])
    return _call(render, other, tools, where) != text


def _names_calls(calls: Any, text: str) -> bool:
    names = (
        [c.get("function", c).get("name") for c in calls if isinstance(c, Mapping)] if isinstance(calls, list) else []
    )
    wanted = [name for name in names if isinstance(name, str)]
    return all(name in text or json.dumps(name)[1:-1] in text for name in wanted)
