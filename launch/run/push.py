"""`opd export push=ORG/NAME`: an exported student as a repository on the hub."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf.hub.push import check_target, push_folder
from launch.artifacts.run_directory import RunDirectory
from launch.plan.hub import hide_token, recorded_in
from opd.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class PushRequest:
    """Target of a push: private unless `public`; a repository made otherwise is replaced with `overwrite` alone."""

    repo: str
    public: bool = False
    overwrite: bool = False

    @classmethod
    def of(cls, own: Mapping[str, str]) -> "PushRequest | None":
        """The request in the words of the command; None without one."""
        if "push" not in own:
            if idle := next((key for key in ("public", "overwrite") if key in own), None):
                raise ConfigurationError(f"{idle}={own[idle]} belongs to push=ORG/NAME; add that, or leave it out")
            return None
        hide_token()
        flags = {key: _flag(key, own.get(key, "false")) for key in ("public", "overwrite")}
        return cls(repo=check_target(own["push"]), public=flags["public"], overwrite=flags["overwrite"])


def _flag(key: str, text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ConfigurationError(f"{key} is true or false, got {text!r}; correct it")
    return text.lower() == "true"


def push(request: PushRequest, folder: Path, directory: RunDirectory, step: int) -> str:
    """Push `folder`, the exported student of a run; returns the commit's address."""
    about: dict[str, Any] = {
        "made_by": "opd export",
        "run": directory.name,
        "step": step,
        "inputs": {key: one.pinned for key, one in recorded_in(directory.path).items()},
    }
    return push_folder(folder, request.repo, about, public=request.public, overwrite=request.overwrite)
