"""Check of the user's own configuration files before Hydra reads them: plain data of bounded size, or refused."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from opd.errors import ConfigurationError

MOST_BYTES = 1 << 20
MOST_NODES = 20_000  # with all aliases written out
_PLAIN = "tag:yaml.org,2002:"
_TAGS = {_PLAIN + name for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge", "timestamp", "value")}


def check_files(files: Iterable[Path]) -> None:
    """Raise `ConfigurationError` about a file that would make an object, never end, or is no YAML."""
    for file in files:
        if reason := _problem(file):
            raise ConfigurationError(f"{file} {reason}; correct the file")


def _problem(file: Path) -> str:
    try:
        if file.stat().st_size > MOST_BYTES:
            return f"has {file.stat().st_size} bytes, more than any configuration ({MOST_BYTES})"
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        return _walked(root) if root is not None else ""
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else "line unknown: "
        return f"is no YAML ({line}{getattr(error, 'problem', None) or getattr(error, 'reason', '')})"
    except UnicodeDecodeError as error:
        return f"is no UTF-8 text (byte {error.start})"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except RecursionError:
        return "is nested too deeply"


def _walked(root: yaml.Node) -> str:
    sizes: dict[int, int] = {}  # nodes that a node stands for; 0 while it is looked at

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            if not sizes[id(node)]:
                raise _Refused(f"has an alias within itself (line {node.start_mark.line + 1})")
            return sizes[id(node)]
        sizes[id(node)] = 0
        if node.tag not in _TAGS:
            tag, line = node.tag.removeprefix(_PLAIN), node.start_mark.line + 1
            raise _Refused(f"has the tag {tag!r} (line {line}), which is no plain data")
        inner = [n for pair in node.value for n in (pair if isinstance(pair, tuple) else (pair,))]
        sizes[id(node)] = 1 + (sum(map(size, inner)) if isinstance(node, yaml.CollectionNode) else 0)
        if sizes[id(node)] > MOST_NODES:
            line = node.start_mark.line + 1
            raise _Refused(f"has aliases that stand for more than {MOST_NODES} values (line {line})")
        return sizes[id(node)]

    try:
        size(root)
    except _Refused as refused:
        return str(refused)
    return ""


class _Refused(Exception):
    """Error about a construct that such a file must not have."""


def dotted(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their dotted names, e.g. `("learner.lr", 0.001)`; an empty mapping is a value."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from dotted(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value
