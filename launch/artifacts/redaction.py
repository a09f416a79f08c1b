"""Redaction of secrets in everything that is stored, sent or printed; the one place that decides what is secret.

Three kinds are known: a setting whose name says so, the login of a URL, and the value of an environment variable whose
name says so. A command line takes none of them (`check_arguments`), since Ray, wandb and `ps` show it; what a
configuration file brings is remembered (`remember`), and `masked` finds it in any text.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from opd.errors import ConfigurationError
from opd.settings.secret import HIDDEN, Secret, logins, names_a_secret, names_a_token, without_logins

AUTO = "AUTO"  # a number of tokens that the plan decides
_SHORTEST = 6  # characters: what is shorter stands in other words too
_NO_SECRET = re.compile(r"(_PATH|_FILE|_DIR|_MODE|_HOME|_SOCK|_NAME|_ID)$")
_KEY = re.compile(r"(^|_)KEY(_|$)")
_COUNT = re.compile(
    r"(max|min|new|num|batch|batched)_(\w+_)?tokens$|tokens_per_|^stop_after\.tokens$", re.IGNORECASE
)  # settings of ours
_INLINE = re.compile(r"['\"]?([\w.-]+)['\"]?\s*[:=]\s*([^,}\]]*)")  # key: value within {...} on a command line
_CUT = re.compile(r"\.\.\.| \[\d+ characters left out\] ")  # as `shown` and `OpdError` cut
_remembered: set[str] = set()


def redacted(node: Any) -> Any:
    """A configuration tree with secrets replaced.

    Secret is what stands under a key that contains `password`, `secret`, `api_key` or `credential`, and any
    *text* under a key that contains `token`: `hf_token` is one, `max_tokens: 77`, `tokens_per_microbatch: AUTO` and
    `tokenizer` are none.
    The login of a URL (`https://user:password@host`) is replaced too, and a secret that stands under another name as
    well, wherever it stands.
    """
    return _redacted(node, [*_known(), *_secrets_in(node)])


def masked(text: str) -> str:
    """`text` with every known secret replaced, and with the login of every URL."""
    return _without(text, _known())


def remember(node: Any) -> None:
    """Add the secrets of this configuration to those that `masked` replaces."""
    _remembered.update(_secrets_in(node))


def check_arguments(arguments: Sequence[str]) -> None:
    """Raise `ConfigurationError` about a secret on the command line, without repeating it."""
    known = _known()
    for argument in arguments:
        key, _, value = argument.partition("=")
        key = key.lstrip("+~")
        if logins(argument):
            raise ConfigurationError(_refusal(f"{_without(key, known)}=... has a login in its URL", "leave it out"))
        secret = _names(key, value) or any(_names(*pair) for pair in _INLINE.findall(value))
        if secret or any(one in argument for one in known):
            name = _without(key, known)
            variable = next((whose for one, whose in _of_environment().items() if one in argument), "")
            source = f" (the value of ${variable})" if variable else ""
            remedy = f"put it into the environment and write '{name}=${{oc.env:{variable or 'NAME'}}}'"
            raise ConfigurationError(_refusal(f"{name}=... has a secret in it{source}", remedy))


def check_logins(node: Any, where: str = "") -> None:
    """Raise `ConfigurationError` about a setting that has a login in its URL: sentences and logs repeat URLs."""
    match node:
        case Mapping():
            for key, value in node.items():
                check_logins(value, f"{where}.{key}".strip("."))
        case list() | tuple():
            for i, value in enumerate(node):
                check_logins(value, f"{where}[{i}]")
        case str() if logins(node):
            raise ConfigurationError(f"{where} has a login in its URL, which logs would repeat; leave it out, {_TOKEN}")


_TOKEN = "a teacher's token is read from OPD_TEACHER_TOKEN"


def _refusal(what: str, remedy: str) -> str:
    return f"{what}, but a command line is shown by ps and kept by Ray and wandb; {remedy}, {_TOKEN}"


def _names(key: str, value: str) -> bool:
    """Whether `value`, as it stands on a command line, is a secret because of its key."""
    bare = value.strip().strip("'\"")
    if not bare or bare.startswith("${") or bare in ("null", "[]", "{}"):
        return False
    return names_a_secret(key) or (names_a_token(key) and not _COUNT.search(key))


def _known() -> list[str]:
    """Every secret of this process, the longest first."""
    found = {one for one in _remembered if len(one) >= _SHORTEST} | _of_environment().keys()
    return sorted(found, key=len, reverse=True)


def _of_environment() -> dict[str, str]:
    """Secrets among the environment's values, and the variable of each.

    A number or an existing path is one only under a name that leaves no doubt: `MAX_TOKENS=100000` and
    `SSH_KEY_FOLDER=/home/me` would otherwise take a number or a folder from every command.
    """
    found: dict[str, str] = {}
    for name, value in os.environ.items():
        for login in logins(value):
            found |= {login: name, login.partition(":")[2]: name}
        upper, plain = name.upper(), value.isdecimal() or (value.startswith("/") and os.path.exists(value))
        doubtful = not plain and (names_a_token(name) or bool(_KEY.search(upper)))
        if not _NO_SECRET.search(upper) and (names_a_secret(name) or doubtful):
            found[value] = name
    return {value: name for value, name in found.items() if len(value) >= _SHORTEST}


def _without(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        if secret in text:
            text = text.replace(secret, HIDDEN)
        text = _without_rest(text, secret)
    return without_logins(text)


def _without_rest(text: str, secret: str) -> str:
    """`text` without the remainder of a secret that was truncated, before the cut and behind it."""
    for cut in reversed(list(_CUT.finditer(text))):
        before, behind = text[: cut.start()], text[cut.end() :]
        lengths = range(len(secret) - 1, _SHORTEST - 1, -1)
        if ends := next((n for n in lengths if behind.startswith(secret[-n:])), 0):
            behind = HIDDEN + behind[ends:]
        if begins := next((n for n in lengths if before.endswith(secret[:n])), 0):
            before = before[:-begins] + HIDDEN
        text = before + cut[0] + behind
    return text


def _redacted(node: Any, secrets: Sequence[str]) -> Any:
    match node:
        case Mapping():
            return {key: _value(str(key), value, secrets) for key, value in node.items()}
        case list() | tuple():
            return [_redacted(item, secrets) for item in node]
        case str():
            return _without(node, secrets)
        case Secret():
            return HIDDEN
    return node


def without_secret(override: str) -> str:
    """A command's `key=value` with the value replaced if it is a secret, by the rule of `check_arguments`."""
    key, equals, value = override.partition("=")
    return f"{key}{equals}{HIDDEN if _names(key.lstrip('+~'), value) else masked(value)}"


def _value(key: str, value: Any, secrets: Sequence[str]) -> Any:
    if value is None or value == "":
        return value  # nothing was given; hiding that would hide a mistake
    plain = _points_to_another(value) or (value == AUTO and _COUNT.search(key))
    if names_a_secret(key) or (names_a_token(key) and _holds_text(value) and not plain):
        return HIDDEN
    return _redacted(value, secrets)


def _points_to_another(value: Any) -> bool:
    """Whether the value is that of another setting, as in `max_tokens: ${max_tokens}`."""
    return isinstance(value, str) and bool(re.fullmatch(r"\$\{[a-z_.]+\}", value))


def _secrets_in(node: Any) -> Iterator[str]:
    """Texts under secret keys of a configuration, long enough to be distinguished from other words."""
    match node:
        case Mapping():
            for key, value in node.items():
                named = names_a_secret(str(key)) or names_a_token(str(key))
                found = _texts(value) if named else _secrets_in(value)
                yield from (one for one in found if len(one) >= _SHORTEST and not _points_to_another(one))
        case list() | tuple():
            for item in node:
                yield from _secrets_in(item)
        case Secret():
            yield node.reveal()


def _texts(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case Secret():
            yield value.reveal()
        case list() | tuple():
            for item in value:
                yield from _texts(item)
        case Mapping():
            for item in value.values():
                yield from _texts(item)


def _holds_text(value: Any) -> bool:
    return next(_texts(value), None) is not None
