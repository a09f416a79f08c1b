"""Answers of the hub that are no, and connections that fail, as one sentence each with the command that helps."""

from collections.abc import Sequence

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf.hub.ids import HubId
from opd.errors import ConfigurationError, OpdError

__all__ = ["Refused", "Unreachable", "get_token", "reason_of", "refusal"]

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_SHOWN = 12  # revisions that a sentence lists


class Refused(Exception):
    """The hub answers no; `error` is the library's."""

    def __init__(self, error: HfHubHTTPError) -> None:
        super().__init__(reason_of(error))
        self.error = error


class Unreachable(Exception):
    """No answer from the hub; the message is the reason."""

    def without_cache(self, name: HubId, key: str) -> str:
        """The sentence where the cache does not help either."""
        offline = "HF_HUB_OFFLINE" in str(self)
        remedy = (
            f"unset it, or fetch it where there is a connection (`hf download {_flag(name)}{name.repo}`) and copy the "
            "cache"
            if offline
            else "check the connection (a proxy is named by HTTPS_PROXY, a mirror by HF_ENDPOINT), or give a folder"
        )
        return (
            f"{key} {str(name)!r} is no path here, and the hub at {constants.ENDPOINT} cannot be asked for a "
            f"{name.kind.noun} of that name ({self}) which the cache {constants.HF_HUB_CACHE} does not have; {remedy}"
        )

    def broken(self, name: HubId, key: str, file: str) -> str:
        """The sentence about a file that did not arrive."""
        return (
            f"{key} {str(name)!r}: fetching {file!r} from {constants.ENDPOINT} failed ({self}); the same command goes "
            "on with what has not arrived"
        )


def reason_of(error: Exception) -> str:
    """The reason of a failure in a few words, without URLs (which may carry a signature)."""
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return f"it answers {error.response.status_code}"
    words = " ".join(str(error).split())
    plain = words if words and "://" not in words and len(words) < 200 else ""
    return f"{type(error).__name__}: {plain}" if plain else type(error).__name__


def refusal(refused: Refused, name: HubId, key: str, revisions: Sequence[str]) -> OpdError:
    """The error to raise about a refusal."""
    error, has_token = refused.error, bool(get_token())
    code = error.response.status_code if error.response is not None else 0
    at = f"the hub at {constants.ENDPOINT}"
    said = (error.response.headers.get("X-Error-Message") or "") if error.response is not None else ""
    if code == 401 and "credentials" in said.lower():
        return ConfigurationError(f"{key} {str(name)!r}: {at} does not accept the token; {_LOG_IN} with a new one")
    if isinstance(error, GatedRepoError):
        account = "the account of the token that is set has not been let in" if has_token else "no token is set"
        return ConfigurationError(
            f"{key} {str(name)!r} is gated, and {account}; accept its conditions on its page "
            f"({constants.ENDPOINT}/{_page(name)}), then {_LOG_IN}"
        )
    if isinstance(error, DisabledRepoError):
        return ConfigurationError(f"{key} {str(name)!r} has been disabled on {at}; choose another {name.kind.noun}")
    if isinstance(error, RevisionNotFoundError):
        more = f" and {len(revisions) - _SHOWN} more" if len(revisions) > _SHOWN else ""
        have = f" (have: {', '.join(revisions[:_SHOWN])}{more})" if revisions else ""
        return ConfigurationError(
            f"{key}: the {name.kind.noun} {name.repo!r} has no revision {name.branch!r}{have}; name one of these, or a "
            "whole commit hash"
        )
    if isinstance(error, RemoteEntryNotFoundError):
        return ConfigurationError(f"{key} {str(name)!r} lacks a file that it lists; name another revision")
    if isinstance(error, RepositoryNotFoundError) or code in (401, 404):
        seen = "with the token that is set" if has_token else "without a token"
        return ConfigurationError(
            f"{key} {str(name)!r} is no path here, and {at} shows no {name.kind.noun} {name.repo!r} {seen}; correct "
            f"the name or the path, or, if it is private, {_LOG_IN}"
        )
    if code == 403:
        return ConfigurationError(
            f"{key} {str(name)!r}: {at} forbids it{' to the token that is set' if has_token else ''}; {_LOG_IN} with "
            "a token that may read it"
        )
    return OpdError(f"{key} {str(name)!r}: {at} refuses it ({refused}); try again later, or give a folder")


def _flag(name: HubId) -> str:
    return f"--repo-type {name.kind.value} " if name.kind.value != "model" else ""


def _page(name: HubId) -> str:
    return f"datasets/{name.repo}" if name.kind.value == "dataset" else name.repo
