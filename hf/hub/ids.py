"""Names on the hub as settings hold them: `ORG/NAME[@REVISION]`, of data sets `ORG/NAME[:CONFIG[:SPLIT]][@REVISION]`.

Pure, but for the question whether a path exists here: what exists is never a name on the hub.
"""

import os
import re
from dataclasses import dataclass, replace
from enum import Enum

_PART = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?"
_REPO = rf"(?P<repo>{_PART}/{_PART})"
_REVISION = r"(?:@(?P<revision>[\w./-]+))?"
_MODEL = re.compile(_REPO + _REVISION, re.ASCII)
_DATA = re.compile(rf"{_REPO}(?::(?P<config>[\w. +-]+))?(?::(?P<split>[\w.-]+))?{_REVISION}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LONGEST = 96  # characters of a repository's name that the hub allows
MAIN = "main"


class Kind(Enum):
    """Kind of a repository; the values are the hub's."""

    MODEL = "model"
    DATA = "dataset"

    @property
    def noun(self) -> str:
        """The kind in sentences."""
        return "model" if self is Kind.MODEL else "data set"


@dataclass(frozen=True, slots=True, kw_only=True)
class HubId:
    """Repository on the hub, a part of it and a revision; "" = not given.

    Example: `HubId(kind=Kind.DATA, repo="openai/gsm8k", config="main", split="train")`.
    """

    kind: Kind
    repo: str
    config: str = ""
    split: str = ""
    revision: str = ""

    def __str__(self) -> str:
        parts = ":".join(part for part in (self.repo, self.config, self.split) if part)
        return f"{parts}@{self.revision}" if self.revision else parts

    @property
    def branch(self) -> str:
        """Requested revision: a branch, a tag or a commit."""
        return self.revision or MAIN

    def at(self, commit: str) -> "HubId":
        """The same at an exact commit."""
        return replace(self, revision=commit)

    def same_content(self, other: "HubId") -> bool:
        """Whether both name the same part of the same repository, at whatever revision."""
        return replace(self, revision="") == replace(other, revision="")


def is_commit(revision: str) -> bool:
    """Whether a revision is a whole commit hash, which never moves."""
    return _COMMIT.fullmatch(revision) is not None


def hub_id(kind: Kind, text: str) -> HubId | None:
    """Name on the hub in `text`; None where that is a path that exists, or cannot be such a name.

    Example: `hub_id(Kind.MODEL, "Qwen/Qwen3-0.6B@main")`.
    """
    return None if os.path.lexists(text) else repository(kind, text)


def repository(kind: Kind, text: str) -> HubId | None:
    """Name on the hub in `text`, whatever exists here; None where it cannot be one."""
    found = (_MODEL if kind is Kind.MODEL else _DATA).fullmatch(text)
    if found is None:
        return None
    named = {name: value or "" for name, value in found.groupdict().items()}
    repo, revision = named["repo"], named.get("revision", "")
    plain = ".." not in text and "--" not in repo and not repo.endswith(".git") and "//" not in revision
    if len(repo) > _LONGEST or not plain or revision.strip("/.") != revision:
        return None
    return HubId(kind=kind, **named)
