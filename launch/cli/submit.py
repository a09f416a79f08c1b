"""`opd submit`: the same command on a running Ray cluster, through Ray's jobs API.

Ray reads its token settings when it is imported, so it is imported after they are made.
"""

import asyncio
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from launch.artifacts.redaction import check_arguments
from opd.deadlines import repeated
from opd.errors import ConfigurationError, OpdError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

AGENT_DEADLINE_S = 90.0
EXCLUDES = ("runs/", ".venv/", ".git/", "wandb/", "outputs/", "**/__pycache__/")
MOST_BYTES = 100 << 20  # what the cluster's dashboard takes in one piece
MIB = 1 << 20
INTERRUPTED = 130


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitOptions:
    """Destination of a job. Secrets are set where the cluster's nodes start: Ray shows a job's command to every client.

    The token comes from the environment (RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH).

    `exclude` are folders and files of `working_dir` that stay here, as in a .gitignore. Without `follow` the command
    returns as soon as the cluster has the job.
    """

    address: str
    working_dir: str = "."
    exclude: Sequence[str] = ()
    follow: bool = True


def check_token() -> None:
    """Refuse a cluster without a token: an open jobs API runs any client's code."""
    if not (os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")):
        raise ConfigurationError(
            "opd submit needs the cluster's token and found none; set RAY_AUTH_TOKEN_PATH to the file the head was "
            "started with (RAY_AUTH_MODE=token)"
        )
    os.environ["RAY_AUTH_MODE"] = "token"


def submit(command: Sequence[str], options: SubmitOptions, console: Console) -> int:
    """Send `opd <command>` as a job, follow its log, and return the job's exit status (0 = succeeded).

    The job joins the cluster it runs in (`cluster=existing`) unless `command` chooses another layout.
    """
    check_token()
    if not Path(options.working_dir).is_dir():
        raise ConfigurationError(
            f"working_dir {options.working_dir!r} is no folder; give the one with your code and data"
        )
    check_output(command)
    excludes = [*EXCLUDES, *options.exclude]
    check_size(Path(options.working_dir), excludes)
    arguments = list(command)
    if not any(part.startswith(("cluster=", "cluster.address=")) for part in arguments):
        arguments.append("cluster=existing")
    check_arguments([*arguments, f"address={options.address}"])
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    entrypoint = shlex.join(["python", "-m", "launch.cli", *arguments])
    runtime_env = {"working_dir": options.working_dir, "excludes": excludes}
    try:
        client = JobSubmissionClient(options.address)
        with packed(Path(options.working_dir)):
            job = _accepted(lambda: client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env))
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise OpdError(
            f"the cluster at {options.address} did not take the job ({_first(error)}); check the address (the "
            "dashboard's, e.g. http://127.0.0.1:8265) and the token"
        ) from error
    console.print(f"job {job}: {entrypoint}", soft_wrap=True)
    later = f"`ray job logs --follow --address={options.address} {job}` shows its log, `ray job stop` in place of logs"
    if not options.follow:
        console.print(f"{later} ends it", soft_wrap=True)
        return 0
    try:
        return asyncio.run(_follow(client, job, console))
    except KeyboardInterrupt:
        console.print(f"\njob {job} goes on: {later} ends it", soft_wrap=True)
        return INTERRUPTED


def check_output(command: Sequence[str]) -> None:
    """Refuse a run whose directory would lie in a temporary folder of the cluster.

    A job runs in a copy of the working directory that Ray makes on one of the nodes and removes again, so a relative
    path is nowhere. Checkpoints are written by every rank, so what comes back from one node alone would be a part.
    """
    if command[0] != "train":
        return
    given = [part.partition("=")[2] for part in command if part.lstrip("+").startswith("output_dir=")]
    place = given[-1].strip("'\"") if given else "runs"
    if not place.startswith("/"):
        raise ConfigurationError(
            f"opd submit needs an absolute output_dir=, got {place!r}{'' if given else ' (the default)'}: a job "
            "runs in a temporary folder of the cluster; give a folder that every node reaches and that stays, e.g. "
            "output_dir=/shared/runs"
        )


def check_size(folder: Path, excludes: Sequence[str], most: int = MOST_BYTES) -> None:
    """Refuse a working directory above the cluster's size limit, naming its largest parts, before it is packed."""
    from ray._private.runtime_env import packaging

    root, sizes = folder.resolve(), dict[str, int]()

    def add(path: Path) -> None:
        if path.is_file() and not path.is_symlink():
            first, *deeper = path.relative_to(root).parts
            name = f"{first}/" if deeper else first
            sizes[name] = sizes.get(name, 0) + path.stat().st_size

    with packed(folder):
        packaging._dir_travel(root, [packaging._get_excludes(root, list(excludes))], add, include_gitignore=True)
    total = sum(sizes.values())
    if total > most:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        named = ", ".join(f"{name} {sizes[name] / MIB:.0f} MiB" for name in largest)
        raise ConfigurationError(
            f"working_dir {str(folder)!r} is {total / MIB:.0f} MiB, but a cluster takes {most / MIB:.0f} MiB (largest: "
            f"{named}); leave folders out with exclude={largest[0]} (several: exclude=A,B) and name what the run needs "
            "of them by paths that the cluster's nodes have, or give another working_dir"
        )


@contextmanager
def packed(folder: Path) -> Iterator[None]:
    """Context in which a file of `folder` that vanishes is one sentence: other processes may write there."""
    try:
        yield
    except FileNotFoundError as error:
        if folder.resolve() not in Path(error.filename or "/").resolve().parents:
            raise
        raise ConfigurationError(
            f"working_dir {str(folder)!r} changed while it was read ({error.filename} is gone); try again, or leave "
            "out what other processes write: exclude=A,B"
        ) from error


def _accepted(submit_job: Callable[[], str]) -> str:
    """Id of the accepted job; repeated while a head that has just started has no job agent yet."""
    return repeated(submit_job, lambda error: "No available agent" in str(error), AGENT_DEADLINE_S, pause_s=1.0)


async def _follow(client: "JobSubmissionClient", job: str, console: Console) -> int:
    """Print the job's log until it ends."""
    from ray.job_submission import JobStatus

    async for text in client.tail_job_logs(job):
        console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
    while (status := client.get_job_status(job)) in (JobStatus.PENDING, JobStatus.RUNNING):  # noqa: ASYNC110 (it can only be polled)
        await asyncio.sleep(0.5)
    info = client.get_job_info(job)
    if status is JobStatus.SUCCEEDED:
        console.print(f"job {job} succeeded")
        return 0
    console.print(f"job {job} {status.value.lower()}: {info.message}", markup=False, soft_wrap=True)
    return info.driver_exit_code or 1


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
