"""A teacher behind our own server (`opd serve-teacher`): binary frames, retried within a budget, every one checked.

An answer counts only if its frame is whole, names this call and this model, is about exactly the requests that were
sent, passes `opd.scorers.validation.validate_scores`, and answers a control question that tells shifted rows from right
ones. Whatever does not is thrown away and asked again.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import fields, replace
from time import perf_counter
from typing import TypeVar

import aiohttp
import numpy as np

from hf.digest import model_digest
from hf.tokenizer_check import tokenizer_identity
from opd.deadlines import within
from opd.errors import ConfigurationError, DataError, OpdError
from opd.ports import ScoreAnswer, ScoreRequest
from opd.scorers.validation import validate_scores
from opd.settings.secret import Secret
from opd.types import RemoteRows, Scores, TokenScores
from teacher_service.config import TeacherConfig
from teacher_service.control_question import aligned, control
from teacher_service.frames import (
    DIGEST_BYTES,
    FrameError,
    FrameLimits,
    Question,
    TooLarge,
    answer_bytes,
    decode_reply,
    encode_question,
    request_digest,
)
from teacher_service.known_kinds import OWN_KINDS, KnownKinds, known_kinds
from teacher_service.retries import NoAnswer, RetryLoop, WrongAnswer, fetch, session, together
from teacher_service.scoring import Store, TeacherStats, kinds_of, length
from teacher_service.server_identity import Identity, parse_identity

Result = TypeVar("Result")
IDENTITY_BYTES = 1 << 16
AT_ONCE = 4  # frames under way per call
NOISE = {"float32": 1e-3}  # nats between two forwards of one text; 16-bit models differ by more
COARSE = 0.25
WIDEST_HIDDEN = 4 * 8192  # bytes: no model that is distilled has wider hidden states


class HttpTeacher:
    """`opd.ports.LogprobTeacher` over the network. `store` keeps the hidden states that arrive."""

    def __init__(self, config: TeacherConfig, store: Store, token: str) -> None:
        self._config, self._store, self._token = config, store, Secret(token)
        self._retries = RetryLoop(config)
        self._kinds = known_kinds(config.score_kinds)
        self._known: Identity | None = None
        self._identity_lock = asyncio.Lock()
        self._requests = self._scored = self._read = 0
        self._busy_s = 0.0

    async def ready(self) -> None:
        """Return when the server's identity is known. Raises `ConfigurationError` if it is another than expected."""
        await self._within(self._identity(), "naming its model")

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreAnswer]:
        """Scores per request, in order. Raises `OpdError` when the server gives no believable one."""
        start = perf_counter()
        answers = await self._within(self._score(requests), f"scoring {len(requests)} completions")
        self._busy_s += perf_counter() - start
        self._requests += len(requests)
        self._scored += sum(len(r.token_ids) for r in requests)
        self._read += sum(length(r) for r in requests)
        return answers

    async def stats(self) -> TeacherStats:
        """Counts of this client: scored, retried and refused."""
        return TeacherStats(
            requests=self._requests,
            scored=self._scored,
            read=self._read,
            busy_s=self._busy_s,
            unanswered=self._retries.unanswered,
            quarantined=self._retries.quarantined,
        )

    async def _within(self, work: Awaitable[Result], what: str) -> Result:
        late = OpdError(
            f"the teacher at {self._config.url} did not finish {what} within {self._config.deadline_s:.0f} s; "
            "raise teacher.deadline_s, or add servers"
        )
        return await within(self._config.deadline_s, work, late)

    async def _identity(self) -> Identity:
        async with self._identity_lock:
            if self._known is None:
                async with session(self._config, self._token) as client:

                    async def ask(_: int) -> bytes:
                        return await fetch(client, "GET", self._url("/v1/identity"), IDENTITY_BYTES)

                    identity = parse_identity((await self._retries(ask)).decode(errors="replace"))
                await asyncio.to_thread(_check_identity, identity, self._config)
                self._known = identity
            return self._known

    def _url(self, path: str) -> str:
        return self._config.url.rstrip("/") + path

    async def _score(self, requests: Sequence[ScoreRequest]) -> list[ScoreAnswer]:
        if not requests:
            return []
        identity = await self._identity()
        self._check_kinds(requests, identity)
        gate = asyncio.Semaphore(AT_ONCE)
        async with session(self._config, self._token) as client:

            async def one(part: list[ScoreRequest]) -> list[ScoreAnswer]:
                async with gate:
                    return await self._retries(lambda number: self._attempt(client, identity, part, number))

            answers = await together([one(part) for part in frames(requests, identity.limits)])
        return [tuple(map(self._stored, answer)) for part in answers for answer in part]

    async def _attempt(
        self, client: aiohttp.ClientSession, identity: Identity, part: list[ScoreRequest], number: int
    ) -> list[ScoreAnswer]:
        check = control(part, number)
        asked = list(part)
        if check is not None:
            asked[check.about] = check.plain
            asked.append(check.question)
        call = secrets.token_bytes(DIGEST_BYTES)
        frame = await asyncio.to_thread(encode_question, Question(call=call, requests=tuple(asked)))
        url = self._url("/v1/score")
        body = await fetch(client, "POST", url, identity.limits.frame_bytes, data=frame)
        answers = await asyncio.to_thread(_checked_answers, body, call, asked, identity, self._kinds)
        if check is not None:
            noise = NOISE.get(identity.dtype, COARSE)
            if not aligned(_logprobs_of(answers[check.about][check.place]), _logprobs_of(answers[-1][0]), noise):
                raise WrongAnswer("the control question shows that its rows are not those of the tokens (shifted?)")
        return [answer[: len(request.kinds)] for request, answer in zip(part, answers, strict=False)]

    def _check_kinds(self, requests: Sequence[ScoreRequest], identity: Identity) -> None:
        asked = {kind.wire_name() for kind in kinds_of(requests)}
        lacking = sorted(asked - {*identity.supports})
        if lacking:
            raise ConfigurationError(
                f"the teacher at {self._config.url} supports the kinds of scores {', '.join(identity.supports)}, but "
                f"{lacking[0]} is asked; start opd serve-teacher with a teacher.backend that answers it, and with "
                "teacher.score_kinds if it is a class of your own"
            )

    def _stored(self, scores: Scores) -> Scores:
        held = _remote(scores)
        return replace(scores, **{name: self._moved(rows) for name, rows in held}) if held else scores

    def _moved(self, held: RemoteRows) -> RemoteRows:
        pieces = tuple((self._store(array), rows) for array, rows in held.pieces)
        width = max((array.shape[1] * array.itemsize for array, _ in held.pieces), default=0)
        return RemoteRows(pieces=pieces, row_nbytes=width)


def frames(requests: Sequence[ScoreRequest], limits: FrameLimits) -> Iterator[list[ScoreRequest]]:
    """`requests` in parts that fit the server's limits, with room for a control question."""
    part: list[ScoreRequest] = []
    tokens = answered = 0
    for request in requests:
        read, back = len(request.context_ids) + len(request.token_ids), _both_ways(request)
        full = len(part) + 2 > limits.requests or 2 * (tokens + read) > limits.tokens
        if part and (full or 2 * (answered + back) > limits.frame_bytes):
            yield part
            part, tokens, answered = [], 0, 0
        part.append(request)
        tokens, answered = tokens + read, answered + back
    if part:
        yield part


def _both_ways(request: ScoreRequest) -> int:
    """Roughly the bytes of `request` and of its answer (of hidden states the widest there are)."""
    return 4 * (len(request.context_ids) + len(request.token_ids)) + answer_bytes(request, WIDEST_HIDDEN)


def _logprobs_of(scores: Scores) -> np.ndarray:
    assert isinstance(scores, TokenScores)
    return np.asarray(scores.logprobs)


def _remote(scores: Scores) -> list[tuple[str, RemoteRows]]:
    """The fields that name rows of arrays."""
    named = [(f.name, getattr(scores, f.name)) for f in fields(scores)]
    return [(name, value) for name, value in named if isinstance(value, RemoteRows)]


def _checked_answers(
    body: bytes, call: bytes, asked: Sequence[ScoreRequest], identity: Identity, known: KnownKinds = OWN_KINDS
) -> list[ScoreAnswer]:
    """The answers in `body`, or `NoAnswer` for a damaged frame and `WrongAnswer` for one that must not be used."""
    try:
        reply = decode_reply(body, identity.limits, known)
    except TooLarge as error:
        raise WrongAnswer(str(error)) from error
    except FrameError as error:
        raise NoAnswer(str(error)) from error
    if reply.model.hex() != identity.model:
        raise WrongAnswer(f"another model answered ({reply.model.hex()} in place of {identity.model})")
    if reply.call != call or reply.digests != tuple(request_digest(r) for r in asked):
        raise WrongAnswer("it answered other requests than were sent")
    try:
        validate_scores(asked, reply.answers)
    except DataError as error:
        raise WrongAnswer(str(error)) from error
    for scores in (scores for answer in reply.answers for scores in answer):
        _check_values(scores, identity)
    return list(reply.answers)


def _check_values(scores: Scores, identity: Identity) -> None:
    """Check what `validate_scores` does not: ids against the vocabulary, and hidden states for NaN and infinity."""
    ids = getattr(scores, "topk_ids", None)
    if ids is not None and ids.size and (ids.min() < 0 or ids.max() >= identity.rows):
        raise WrongAnswer(f"it names ids outside its vocabulary of {identity.rows}")
    if not all(_finite(array) for _, held in _remote(scores) for array, _ in held.pieces):
        raise WrongAnswer("its hidden states contain NaN or infinity")


def _finite(array: np.ndarray) -> bool:
    if array.dtype == np.uint16:  # bfloat16 words: all exponent bits set is no number
        return not bool(((array & 0x7F80) == 0x7F80).any())
    return bool(np.isfinite(array).all())


def _check_identity(served: Identity, config: TeacherConfig) -> None:
    """Raise `ConfigurationError` if the server's model is not the one this run is about."""
    ours = tokenizer_identity(config.path)
    subject = f"the teacher at {config.url}"
    if (served.vocabulary, served.rows) != (ours.digest, ours.rows):
        raise ConfigurationError(
            f"{subject} has another vocabulary ({served.vocabulary}, {served.rows} rows) than teacher.path "
            f"{config.path!r} ({ours.digest}, {ours.rows} rows); serve that model, or correct teacher.path"
        )
    expected = config.fingerprint or model_digest(config.path)
    if expected and expected != served.model:
        raise ConfigurationError(
            f"{subject} is model {served.model}, but {expected} is expected "
            f"({'teacher.fingerprint' if config.fingerprint else f'the weights in {config.path!r}'}); serve that one, "
            "or correct the setting"
        )
    if not served.model:
        raise ConfigurationError(f"{subject} has no weights to be known by; serve a folder with safetensors")
