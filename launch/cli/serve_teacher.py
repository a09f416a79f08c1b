"""`opd serve-teacher`: one teacher behind HTTP, for runs on other machines or several runs at once."""

import asyncio
import os
from collections.abc import Mapping, Sequence

from rich.console import Console

from launch.config.run_config import teacher_config
from launch.plan.checks.models import hidden_width
from launch.plan.hub import local_teacher
from opd.errors import ConfigurationError
from opd.settings.devices import resolve_device, resolve_dtype
from opd.settings.secret import Secret
from teacher_service.config import REMOTE, TOKEN_VARIABLE, TeacherConfig, environment

_READ = ("teacher", "experiment", "conf", "data", "allow_targets")


def serve_teacher(own: Mapping[str, str], overrides: Sequence[str], console: Console) -> int:
    """Serve the composed `teacher` at `own["host"]:own["port"]` until interrupted."""
    settings, dry_run = _own_settings(overrides)
    config = teacher_config(settings)
    if config.backend in REMOTE:
        raise ConfigurationError(
            f"opd serve-teacher serves a model of this machine, but teacher.backend is {config.backend.name}; set "
            "teacher.backend=TORCH or VLLM"
        )
    config, known_as = local_teacher(config)
    for name, value in environment(config.device, config.backend).items():
        os.environ.setdefault(name, value)
    asyncio.run(_serve(config, known_as, own, console, dry_run=dry_run))
    return 0


def _own_settings(overrides: Sequence[str]) -> tuple[Sequence[str], bool]:
    """Settings of the one teacher, and whether this is a dry run; refuses those that a server does not have."""
    rest = [o for o in overrides if o not in ("dry_run=true", "dry_run=false")]
    for override in rest:
        name = override.lstrip("+~").partition("=")[0]
        if name.partition(".")[0] not in _READ:
            raise ConfigurationError(
                f"opd serve-teacher serves the one teacher of teacher.*, and {name} is no setting of it; leave it out"
            )
    return rest, "dry_run=true" in overrides


async def _serve(
    config: TeacherConfig, known_as: str, own: Mapping[str, str], console: Console, *, dry_run: bool
) -> None:
    from teacher_service.backends import backend
    from teacher_service.frames import FrameLimits
    from teacher_service.server import LOOPBACK, ServerConfig, TeacherServer, check_address
    from teacher_service.server_identity import identity_of, served_kinds

    precision = resolve_dtype(config.dtype, resolve_device(config.device, "teacher"))
    listening = ServerConfig(
        host=own.get("host", "127.0.0.1"),
        port=_port(own.get("port", "8300")),
        hidden_bytes=hidden_width(config.path) * precision.itemsize,
        token=Secret(os.environ.get(TOKEN_VARIABLE, "")),
    )
    dtype = str(precision).removeprefix("torch.")
    identity = identity_of(config, dtype, FrameLimits(k=config.max_k))
    await check_address(listening)
    if dry_run:
        console.print(f"teacher {known_as} would be served at {listening.host}:{listening.port}", soft_wrap=True)
        return
    teacher = backend(config.backend)(config, lambda array: array)
    await teacher.ready()
    server = TeacherServer(teacher, identity, listening, served_kinds(config))
    url = await server.start()
    try:
        console.print(f"teacher {known_as} serves at {url}; teacher.fingerprint={identity.model}", soft_wrap=True)
        if listening.host not in LOOPBACK:
            console.print(
                "it listens beyond this machine, and HTTP is not encrypted: keep it in a private network",
                soft_wrap=True,
            )
        await asyncio.Event().wait()
    finally:
        await server.close()


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise ConfigurationError(f"port={text} is no port; give a number from 0 (any free one) to 65535")
    return int(text)
