"""Upload of a model folder to a repository on the hub: a new one, or one that this program made."""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import close_session

from hf.hub.client import ATTEMPT_S, GRACE_S, SLOWEST, answered
from hf.hub.failures import Refused, Unreachable, reason_of
from hf.hub.ids import Kind, repository
from opd.errors import ConfigurationError, OpdError

MARK = "opd_export.json"  # the file by which a repository is known for one that this program made
_KEPT = (".gitattributes",)
_NEVER = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".py")


def check_target(name: str) -> str:
    """Repository in `push=`. Raises `ConfigurationError` where it is no name of one, or there is no token."""
    found = repository(Kind.MODEL, name)
    if found is None or found.revision:
        raise ConfigurationError(
            f"push={name} is no name of a repository; write push=ORG/NAME (or your account's name/NAME)"
        )
    if constants.HF_HUB_OFFLINE:
        raise ConfigurationError(f"push={name} needs the hub, but HF_HUB_OFFLINE is set; unset it")
    if not get_token():
        raise ConfigurationError(
            f"push={name} needs a token that may write; log in with `hf auth login`, or set HF_TOKEN"
        )
    return found.repo


def push_folder(folder: Path, repo: str, about: Mapping[str, Any], *, public: bool, overwrite: bool) -> str:
    """Push all files of `folder` as one commit, and remove what an earlier push left; returns the commit's address.

    `about` is stored beside them as `MARK`.

    Raises:
        ConfigurationError: the repository was made otherwise, or this token may not write there.
        OpdError: there is no connection.
    """
    files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
    wrong = next((name for name in files if name.endswith(_NEVER)), None)
    if wrong is not None:
        raise OpdError(f"push={repo}: {wrong!r} is of a kind that is never pushed; remove it from the export")
    size = sum(file.stat().st_size for file in files.values())
    return _within(
        GRACE_S + size / SLOWEST, repo, lambda: _push(files, repo, about, public=public, overwrite=overwrite)
    )


def _push(files: Mapping[str, Path], repo: str, about: Mapping[str, Any], *, public: bool, overwrite: bool) -> str:
    info = _info(repo)
    there = [] if info is None else [one.rfilename for one in info.siblings or ()]
    if info is None:
        _asked(repo, lambda: HfApi().create_repo(repo, private=not public))
    elif bool(info.private) == public:
        is_now, remedy = (
            ("private", "leave public=true out") if public else ("public", "add public=true if that is meant")
        )
        raise ConfigurationError(
            f"push={repo} exists and is {is_now}, and its visibility is changed on its page alone; {remedy}, or choose "
            "another name"
        )
    elif MARK not in there and set(there) - set(_KEPT) and not overwrite:
        raise ConfigurationError(
            f"push={repo} exists and was not made by opd export (it has no {MARK}, but {len(there)} files such as "
            f"{sorted(set(there) - set(_KEPT))[0]!r}); choose another name, or add overwrite=true to replace them"
        )
    stale = [name for name in there if name not in files and name not in (*_KEPT, MARK)]
    mark = (json.dumps(dict(about), indent=2, ensure_ascii=False) + "\n").encode()
    operations = [
        *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(file)) for name, file in files.items()),
        CommitOperationAdd(path_in_repo=MARK, path_or_fileobj=mark),
        *(CommitOperationDelete(path_in_repo=name) for name in stale),
    ]
    message = f"opd export of {about.get('run', 'a run')}, step {about.get('step', '?')}"
    done = _asked(repo, lambda: HfApi().create_commit(repo, operations, commit_message=message))
    return str(done.commit_url)


def _info(repo: str) -> Any:
    """Description of a repository by the hub, None where there is none that this token sees."""
    try:
        return answered(lambda: HfApi().repo_info(repo, timeout=ATTEMPT_S))
    except Refused as refused:
        if isinstance(refused.error, RepositoryNotFoundError):
            return None
        raise _refusal(repo, refused) from refused


def _asked(repo: str, ask: Callable[[], Any]) -> Any:
    """Answer to a request that changes something; it is not repeated, since the first one may have been carried out."""
    try:
        return ask()
    except HfHubHTTPError as error:
        raise _refusal(repo, Refused(error)) from error


def _refusal(repo: str, refused: Refused) -> OpdError:
    code = refused.error.response.status_code if refused.error.response is not None else 0
    if code == 401:
        return ConfigurationError(
            f"push={repo}: the hub does not accept the token; log in with `hf auth login`, or set HF_TOKEN to a new one"
        )
    if code in (403, 404):
        return ConfigurationError(
            f"push={repo}: the token that is set may not write there; make one with write access to "
            f"{repo.split('/')[0]}, or push to your own account's name"
        )
    return OpdError(f"push={repo}: the hub at {constants.ENDPOINT} refuses it ({refused}); try again later")


def _within(deadline_s: float, repo: str, work: Callable[[], str]) -> str:
    with ThreadPoolExecutor(1) as pool:
        wait = pool.submit(work)
        try:
            return wait.result(deadline_s)
        except TimeoutError as error:
            close_session()
            raise OpdError(
                f"push={repo}: not done within {deadline_s:.0f} s; the same command goes on with what has not arrived"
            ) from error
        except Unreachable as error:
            raise OpdError(
                f"push={repo}: the hub at {constants.ENDPOINT} cannot be reached ({error}); try again"
            ) from error
        except OpdError:
            raise
        except Exception as error:  # the library's own, of several packages
            raise OpdError(f"push={repo} failed ({reason_of(error)}); the same command tries again") from error
