"""Rendering of conversations with a chat template, and a check that nothing was lost."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

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
        if message.get("tool_calls") and (why := _otherwise(render, messages, tools, i)):
            raise DataError(f"{where}: the chat template writes the arguments of message {i + 1}'s tool calls {why}")
    if tools and _call(render, messages, (), where) == text:
        raise DataError(f"{where} has tools, but the chat template names none; clear prompts.tools_column")
    return text


def _call(render: Render, messages: Messages, tools: Messages, where: str) -> str:
    try:
        return render(messages, tools)
    except TemplateSyntaxError as error:
        raise DataError(
            f"{where}: the chat template of the checkpoint is damaged ({_reason(error)}, its line {error.lineno}); "
            "copy it anew"
        ) from error
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


def _otherwise(render: Render, messages: Messages, tools: Messages, i: int) -> str:
    """Fault in how a template writes arguments of tool calls in a form that it does not expect; "" if there is none.

    Some expect an object and would quote a text once more, or put further braces around it; others expect a text and
    would write an object as Python does.
    """
    calls = messages[i]["tool_calls"]
    given = [a for call in calls if (a := _arguments(call)) is not None] if isinstance(calls, list) else []
    if not given:
        return ""
    forms: list[str] = []
    for form in (lambda found: found, lambda found: json.dumps(found, ensure_ascii=False)):
        other = {**messages[i], "tool_calls": [_with_arguments(call, form) for call in calls]}
        try:
            forms.append(render((*messages[:i], other, *messages[i + 1 :]), tools))
        except REFUSALS:  # it takes one form alone, in which the row is
            return ""
    objects, texts = ("".join(one.split()) for one in forms)
    found = [json.loads(a) if isinstance(a, str) else a for a in given]
    pythonic = any(repr(one) in forms[0] and json.dumps(one, ensure_ascii=False) not in forms[0] for one in found)
    if pythonic and any(not isinstance(a, str) for a in given):
        return "as Python writes an object, and not as JSON; store them as JSON text"
    if objects != texts and not pythonic and any(isinstance(a, str) for a in given):
        return "in another form if they are text (quoted once more, for instance); store them as an object"
    return ""


def _arguments(call: Any) -> Any:
    """Arguments of a tool call: an object, or the text of one; None for anything else."""
    of = call.get("function", call) if isinstance(call, Mapping) else None
    given = of.get("arguments") if isinstance(of, Mapping) else None
    try:
        found = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError):
        return None
    return given if isinstance(found, Mapping) and found else None


def _with_arguments(call: Any, form: Callable[[Any], Any]) -> Any:
    """A tool call with its arguments in another form."""
    given = _arguments(call)
    if given is None:
        return call
    changed = form(json.loads(given) if isinstance(given, str) else given)
    if "function" not in call:
        return {**call, "arguments": changed}
    return {**call, "function": {**call["function"], "arguments": changed}}


def opening(ask: Render, prompt: Render) -> str:
    """Text that a template writes before an answer and leaves out where a prompt ends, e.g. `<|im_start|>assistant`.

    `prompt` renders what ends where an assistant is to write, and `ask` the same without `add_generation_prompt`.
    """
    user, reply = {"role": "user", "content": f"{_MARK}1"}, {"role": "assistant", "content": f"{_MARK}2"}
    try:
        before, asked, whole = prompt((user,), ()), ask((user,), ()), ask((user, reply), ())
    except REFUSALS:  # a template that wants other messages: nothing is known
        return ""
    if before != asked or not whole.startswith(before) or reply["content"] not in whole:
        return ""
    return whole[len(before) :].partition(reply["content"])[0].strip()


def _names_calls(calls: Any, text: str) -> bool:
    names = (
        [c.get("function", c).get("name") for c in calls if isinstance(c, Mapping)] if isinstance(calls, list) else []
    )
    wanted = [name for name in names if isinstance(name, str)]
    return all(name in text or json.dumps(name)[1:-1] in text for name in wanted)
