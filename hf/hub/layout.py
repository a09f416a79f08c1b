"""Configurations and splits of a data set repository, from the names of its files and the head of its README.

The rules are those of the library `datasets` (its `data_files.py`), which a test compares this with: what the README
lists as `configs`, or else the names of files and folders. Pure.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import Any

import yaml

from hf.hub.ids import HubId
from opd.errors import ConfigurationError, DataError

DEFAULT = "default"
CONVERTED = "refs/convert/parquet"  # the branch with the hub's own copy of every data set as parquet
_CONVERTED_FILE = re.compile(r"[^/]+/[^/]+/\d{4}\.parquet")  # how that branch is laid out
_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SEPARATOR = "[-._ 0-9]"
_SHARD = re.compile(r"data/([^/]+?)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_NO_DATA = {"README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dummy_data.zip"} | {
    "dataset_dict.json"
}
_BESIDE = {
    "",
    ".py",
    ".md",
    ".sh",
    ".toml",
    ".cfg",
    ".yaml",
    ".yml",
    ".ipynb",
    ".pdf",
    ".png",
    ".jpg",
    ".jpeg",
    ".gif",
    ".svg",
}
_HEAD = re.compile(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", re.DOTALL)
_SHOWN = 20  # names that a sentence lists

Splits = Mapping[str, tuple[str, ...]]
"""Files by split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Files of one split in their order, under the whole name that finds them again."""

    name: HubId
    files: tuple[str, ...]


def choose(name: HubId, configs: Mapping[str, Splits], key: str, endings: Sequence[str]) -> Chosen:
    """The files that `name`, the value of the setting `key`, means; one of several is never chosen silently.

    `endings` are those that can be read. A single name behind the repository's may be the split of its only
    configuration.

    Raises:
        ConfigurationError: no such configuration or split, or several and none named; the sentence lists them.
    """
    if not any(configs.values()):
        raise ConfigurationError(f"{key}: the data set {name.repo!r} has no data files; name another")
    config, split = _split(name, configs, key)
    splits = configs[config]
    if split not in splits:
        asked = f"no split {split!r}" if split else "several splits"
        raise ConfigurationError(
            f"{key}: the configuration {config!r} of the data set {name.repo!r} has {asked} (splits: "
            f"{_listed(splits)}); write {key}={name.repo}:{config}:{next(iter(splits), 'SPLIT')}{_tail(name)}"
        )
    files = splits[split]
    wrong = next((file for file in files if not _readable(file, endings)), None)
    if wrong is not None:
        raise ConfigurationError(
            f"{key}: the data set {name.repo!r} holds {wrong!r}, which is of no format that is read here "
            f"({', '.join(endings)}); try the hub's own copy, {key}={name.repo}:{config}:{split}@{CONVERTED}"
        )
    return Chosen(name=HubId(kind=name.kind, repo=name.repo, config=config, split=split), files=files)


def _split(name: HubId, configs: Mapping[str, Splits], key: str) -> tuple[str, str]:
    """Configuration and split; the split is "" where one of several must be named."""
    config, split = name.config, name.split
    alone = next(iter(configs)) if len(configs) == 1 else DEFAULT if DEFAULT in configs else ""
    if config and not split and config not in configs and config in configs.get(alone, {}):
        config, split = alone, config
    config = config or alone
    if config not in configs:
        asked = f"no configuration {name.config!r}" if name.config else "several configurations"
        inside = f" (its splits: {_listed(configs[alone])})" if alone and name.config else ""
        raise ConfigurationError(
            f"{key}: the data set {name.repo!r} has {asked} (configurations: {_listed(configs)}){inside}; write "
            f"{key}={name.repo}:{next(iter(configs))}:{next(iter(configs[next(iter(configs))]), 'SPLIT')}{_tail(name)}"
        )
    splits = configs[config]
    return config, split or (next(iter(splits)) if len(splits) == 1 else "")


def _tail(name: HubId) -> str:
    return f"@{name.revision}" if name.revision else ""


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every[:_SHOWN]) + (f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else "")


def _readable(file: str, endings: Sequence[str]) -> bool:
    return any(f"{suffix}." in f"{file.lower()}." for suffix in endings)


def configurations(files: Sequence[str], readme: str, where: str) -> Mapping[str, Splits]:
    """Splits of every configuration.

    Raises:
        DataError: the README's list of configurations is malformed; `where` says whose it is.
    """
    data = sorted(file for file in files if _is_data(file))
    listed = _listed_configs(readme, where)
    if listed:
        found = {str(one.get("config_name", DEFAULT)): _of_config(one, data, where) for one in listed}
        return {name: splits for name, splits in found.items() if splits}
    if data and all(_CONVERTED_FILE.fullmatch(file) for file in data):
        return _converted(data)
    return {DEFAULT: splits} if (splits := _by_name(data)) else {}


def _listed_configs(readme: str, where: str) -> list[Mapping[str, Any]]:
    head = _HEAD.match(readme)
    if head is None:
        return []
    try:
        values = yaml.safe_load(head[1])
    except yaml.YAMLError as error:
        raise DataError(f"{where} has a README.md whose head is no YAML; name a revision that has another") from error
    configs = values.get("configs") if isinstance(values, dict) else None
    if configs is None:
        return []
    if not isinstance(configs, list) or not all(isinstance(one, dict) for one in configs):
        raise DataError(f"{where} has a README.md with configs that are no list; name a revision that has another")
    return configs


def _of_config(config: Mapping[str, Any], data: Sequence[str], where: str) -> Splits:
    """Files of one entry of `configs`, by its patterns or the names below its folder."""
    folder = str(config.get("data_dir") or "").strip("/")
    below = f"{folder}/" if folder and folder != "." else ""
    listed = config.get("data_files")
    if listed is None:
        inside = [file.removeprefix(below) for file in data if file.startswith(below)]
        return {split: tuple(f"{below}{file}" for file in files) for split, files in _by_name(inside).items()}
    found = {
        split: tuple(dict.fromkeys(file for pattern in patterns for file in _matching(f"{below}{pattern}", data)))
        for split, patterns in _patterns(listed, where).items()
    }
    return {split: files for split, files in found.items() if files}


def _patterns(listed: Any, where: str) -> Mapping[str, Sequence[str]]:
    """Patterns by split, of all the forms in which a README may have them."""
    match listed:
        case str():
            return {"train": [listed]}
        case list() if all(isinstance(one, str) for one in listed):
            return {"train": listed}
        case dict():
            return {str(split): [paths] if isinstance(paths, str) else list(paths) for split, paths in listed.items()}
        case list() if all(isinstance(one, dict) and {"split", "path"} <= one.keys() for one in listed):
            return {
                str(one["split"]): [one["path"]] if isinstance(one["path"], str) else list(one["path"])
                for one in listed
            }
    raise DataError(f"{where} has a README.md with data_files in no known form; name a revision that has another")


def _converted(data: Sequence[str]) -> Mapping[str, Splits]:
    """The hub's own copy: CONFIG/SPLIT/0000.parquet; a copy of the first rows alone is `partial-SPLIT`."""
    found: dict[str, dict[str, list[str]]] = {}
    for file in data:
        config, split, _ = file.split("/")
        found.setdefault(config, {}).setdefault(split, []).append(file)
    return {config: {split: tuple(files) for split, files in splits.items()} for config, splits in found.items()}


def _by_name(data: Sequence[str]) -> Splits:
    """Splits by the names of files and folders; without any all is `train`."""
    sharded: dict[str, list[str]] = {}
    for file in data:
        if found := _SHARD.fullmatch(file):
            sharded.setdefault(found[1], []).append(file)
    if sharded:
        return {split: tuple(sharded[split]) for split in sorted(sharded, key=_place)}
    for patterns in (_FOLDERS, _FILES):
        found_by = {
            split: tuple(dict.fromkeys(file for pattern in some for file in _matching(pattern, data)))
            for split, some in patterns.items()
        }
        if any(found_by.values()):
            return {split: files for split, files in found_by.items() if files}
    return {"train": tuple(data)} if data else {}


def _place(split: str) -> tuple[int, str]:
    known = list(_KEYWORDS)
    return (known.index(split) if split in known else len(known), split)


_FILES = {
    split: [p for word in words for p in (f"**/{word}{_SEPARATOR}*", f"**/*{_SEPARATOR}{word}{_SEPARATOR}*")]
    for split, words in _KEYWORDS.items()
}
_FOLDERS = {
    split: [
        p
        for word in words
        for p in (
            f"**/{word}/**",
            f"**/{word}{_SEPARATOR}*/**",
            f"**/*{_SEPARATOR}{word}/**",
            f"**/*{_SEPARATOR}{word}{_SEPARATOR}*/**",
        )
    ]
    for split, words in _KEYWORDS.items()
}


def _matching(pattern: str, data: Sequence[str]) -> list[str]:
    regex = _regex(pattern.removeprefix("./"))
    return [file for file in data if regex.fullmatch(file)]


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    """A glob as in fsspec: `**` is any folders, `*` and `?` stay within a name, `[...]` is a set of characters."""
    text, at = "", 0
    while at < len(pattern):
        rest = pattern[at:]
        if rest.startswith("**/"):
            text, at = f"{text}(?:.*/)?", at + 3
        elif rest.startswith("**"):
            text, at = f"{text}.*", at + 2
        elif rest[0] == "[" and (end := rest.find("]", 2)) > 0:
            inside = rest[1:end].replace("\\", "\\\\")
            negated = inside.startswith(("!", "^"))
            text, at = f"{text}[{'^' if negated else ''}{inside[negated:]}]", at + end + 1
        else:
            plain = {"*": "[^/]*", "?": "[^/]"}.get(rest[0], re.escape(rest[0]))
            text, at = text + plain, at + 1
    return re.compile(text)


def _is_data(file: str) -> bool:
    path = PurePosixPath(file)
    hidden = any(part.startswith((".", "__")) for part in path.parts)
    return not hidden and path.name not in _NO_DATA and path.suffix.lower() not in _BESIDE
