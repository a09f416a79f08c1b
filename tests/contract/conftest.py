"""Teachers of every backend over one tiny model, and requests to ask them."""

import os

from opd.settings.devices import Device
from teacher_service.config import Backend, TeacherConfig, environment

os.environ |= environment(Device.CPU, Backend.VLLM)  # before anything imports vLLM

import asyncio
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from transformers import Qwen3ForCausalLM

from opd.ports import AtIds, LastHidden, LogprobTeacher, SampledToken, ScoreKind, ScoreKinds, ScoreRequest, TopK
from opd.scorers.validation import validate_scores
from opd.settings.secret import Secret
from teacher_service.backends import backend
from teacher_service.backends.http import HttpTeacher
from teacher_service.backends.torch_forward import TorchTeacher
from teacher_service.frames import FrameLimits
from teacher_service.server import ServerConfig, TeacherServer
from teacher_service.server_identity import identity_of
from tests.contract.endpoint import CompletionsEndpoint
from tests.one_kind import singles
from tests.shelf import PullSender
from tests.tiny_models import VOCABULARY, save, tiny_model

TOKEN = "a-token-of-the-contract-suite"
POSITIONS = 96
T = TypeVar("T")


@dataclass
class Class:
    """A teacher of one backend with the loop it lives in, and the plain model it must agree with."""

    backend: Backend
    teacher: Any
    config: TeacherConfig
    plain: Qwen3ForCausalLM
    shelf: PullSender
    loop: asyncio.AbstractEventLoop

    @property
    def supports(self) -> ScoreKinds:
        return self.config.supports

    def run(self, work: Awaitable[T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, 60))

    def score(self, requests: Sequence[ScoreRequest]) -> list[Any]:
        """The scores of requests of one kind each, verified."""
        assert isinstance(self.teacher, LogprobTeacher)
        answers = self.run(self.teacher.score(requests))
        validate_scores(requests, answers)
        return singles(answers)


@dataclass(frozen=True)
class Tiny:
    """The model all teachers of this suite hold."""

    path: Path
    plain: Qwen3ForCausalLM


def make_tiny(path: Path, seed: int, tied: bool) -> Tiny:
    plain = tiny_model(seed, tied=tied, positions=POSITIONS, std=0.15)
    return Tiny(path=save(plain, path), plain=plain)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("contract") / "teacher", 0, tied=False)


def config_of(tiny: Tiny, **fields: Any) -> TeacherConfig:
    """Small batches, so that requests are cut and packed in many ways, and little patience."""
    few = {"max_batch_tokens": 200, "head_chunk": 7, "max_k": 50, "deadline_s": 60, "kv_cache_bytes": 16 << 20}
    quick = {"connect_s": 2.0, "read_s": 10.0, "retries": 4, "backoff_s": 0.01}
    every: dict[str, Any] = {"path": str(tiny.path)} | few | quick | fields
    return TeacherConfig(**every)


def made_server(tiny: Tiny, cls: type[TeacherServer] = TeacherServer, **limits: int) -> TeacherServer:
    """A server over a torch teacher, not yet started."""
    config = config_of(tiny)
    teacher = TorchTeacher(config, lambda array: array)
    identity = identity_of(config, "float32", replace(FrameLimits(k=config.max_k), **limits))
    return cls(teacher, identity, ServerConfig(port=0, token=Secret(TOKEN)))


def open_class(chosen: Backend, tiny: Tiny) -> Iterator[Class]:
    """The teacher while it serves."""
    loop, shelf = asyncio.new_event_loop(), PullSender()
    closing: list[Any] = []
    config = config_of(tiny, backend=chosen, url="http://x", model="tiny")
    if chosen is Backend.HTTP:
        server = made_server(tiny, tokens=1600)
        config = replace(config, url=loop.run_until_complete(server.start()))
        closing.append(server)
        teacher: Any = HttpTeacher(config, shelf.store, TOKEN)
    elif chosen is Backend.OPENAI:
        endpoint = CompletionsEndpoint(tiny.plain)
        config = replace(config, url=loop.run_until_complete(endpoint.start()))
        closing.append(endpoint)
        teacher = backend(chosen)(config, shelf.store, TOKEN)
    else:
        teacher = backend(chosen)(config, shelf.store)
        closing += [teacher] if chosen is not Backend.TORCH else []
    opened = Class(backend=chosen, teacher=teacher, config=config, plain=tiny.plain, shelf=shelf, loop=loop)
    opened.run(teacher.ready())
    yield opened
    for thing in closing:
        opened.run(thing.close())
    loop.close()


def wants(tokens: int, random: np.random.Generator) -> list[ScoreKind]:
    """One want of every kind, and two depths."""
    return [
        SampledToken(),
        TopK(k=5),
        TopK(k=50),
        AtIds(ids=np.argsort(random.random((tokens, VOCABULARY)), axis=1)[:, :4].astype(np.int32)),
        LastHidden(),
    ]


def make_request(kind: int, seed: int, tokens: int = 0) -> ScoreRequest:
    """A random context and completion; `kind` indexes `wants`."""
    random = np.random.default_rng(seed)
    context, tokens = int(random.integers(1, 20)), tokens or int(random.integers(1, 40))
    return ScoreRequest(
        context_ids=random.integers(0, VOCABULARY, context).astype(np.int32),
        token_ids=random.integers(0, VOCABULARY, tokens).astype(np.int32),
        kinds=(wants(tokens, random)[kind],),
    )


def make_requests(supports: ScoreKinds, count: int, seed: int = 0) -> list[ScoreRequest]:
    """`count` requests of the kinds a backend answers, mixed."""
    every = [make_request(i % 5, seed + i) for i in range(2 * count)]
    return [r for r in every if type(r.kinds[0]) in supports][:count]
