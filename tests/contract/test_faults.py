"""A server that lies, breaks and dies: not one wrong row gets through, and giving up is one sentence."""

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp import web

from opd.errors import ConfigurationError, DataError, OpdError
from opd.ports import AtIds, LastHidden, SampledToken, ScoreAnswer, ScoreRequest, TopK
from opd.settings.secret import Secret
from opd.types import HiddenScores, RemoteRows, TokenScores, TopKScores
from teacher_service.backends.http import HttpTeacher
from teacher_service.backends.openai import OpenAITeacher
from teacher_service.config import SUPPORTS, Backend
from teacher_service.frames import Question, Reply, decode_question, encode_question, encode_reply, request_digest
from teacher_service.server import ServerConfig, TeacherServer
from teacher_service.server_identity import parse_identity
from tests.contract.conftest import (
    TOKEN,
    PullSender,
    Tiny,
    config_of,
    made_server,
    make_request,
    make_requests,
    make_tiny,
)
from tests.contract.endpoint import CompletionsEndpoint
from tests.fault_matrix import Witness
from tests.one_kind import answered, singles
from tests.tiny_models import VOCABULARY, completion_logprobs, tiny_model

Spoil = Callable[[list[TokenScores]], list[TokenScores]]
SAYS: dict[type, Any] = {TokenScores: SampledToken, TopKScores: TopK, HiddenScores: LastHidden}
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}


def each(change: Callable[[TokenScores], TokenScores]) -> Spoil:
    return lambda answers: [change(a) for a in answers]


def with_logprobs(change: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    return each(lambda a: replace(a, logprobs=change(np.array(a.logprobs))))


def set_first(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[0] = value
        return array

    return change


def rolled(by: int) -> Spoil:
    """Every row holds what belongs to a neighbor."""

    def change(answer: TokenScores) -> TokenScores:
        return answer.take(np.roll(np.arange(len(answer.logprobs)), by))

    return each(change)


def ids_changed(answers: list[TokenScores]) -> list[TokenScores]:
    """Each id is one too high, as of a tokenizer with one more special token."""
    return [
        replace(a, topk_ids=(np.asarray(a.topk_ids) + 1) % VOCABULARY) if isinstance(a, TopKScores) else a
        for a in answers
    ]


def nan_states(answers: list[TokenScores]) -> list[TokenScores]:
    def change(answer: TokenScores) -> TokenScores:
        if not isinstance(answer, HiddenScores) or not isinstance(answer.hidden, RemoteRows):
            return answer
        pieces = tuple((np.full_like(array, np.nan), rows) for array, rows in answer.hidden.pieces)
        return replace(answer, hidden=RemoteRows(pieces=pieces))

    return [change(a) for a in answers]


LIES: dict[str, Spoil] = {
    "nan": with_logprobs(set_first(np.nan)),
    "infinite": with_logprobs(set_first(-np.inf)),
    "positive": with_logprobs(set_first(0.5)),
    "too short": each(lambda a: a.take(np.arange(len(a.logprobs) - 1))),
    "too few": lambda answers: answers[:-1],
    "shifted left": rolled(-1),
    "shifted right": rolled(1),
    "answers of the neighbor": lambda answers: answers[1:] + answers[:1],
    "other ids": ids_changed,
    "nan states": nan_states,
}
ACCIDENTS = ["429", "500", "half a body", "bit flip", "dead", "slow", "no frame", "replay", "another model", "swapped"]
STRANGE = ["replay", "another model", "swapped"]  # whole frames, but not ours
ROUNDS = 2


class LyingServer(TeacherServer):
    """Does what its schedule says with each call, and counts what it did."""

    plan: Iterator[str] = iter(())
    done: Counter[str]
    other: TeacherServer
    last: bytes = b""

    async def _score(self, request: web.Request) -> Any:
        fault = next(self.plan, "")
        self.done[fault] += 1
        question = decode_question(await request.read(), self._identity.limits)
        if fault in ("429", "500"):
            return web.Response(status=int(fault), text="no")
        if fault == "slow":
            await asyncio.sleep(3)
        if fault == "dead":
            assert request.transport is not None
            request.transport.close()
        body = await self._spoilt(question, fault)
        if fault == "half a body":
            response = web.StreamResponse(headers={"Content-Length": str(len(body))})
            await response.prepare(request)
            await response.write(body[: len(body) // 2])
            assert request.transport is not None
            request.transport.close()
            return response
        return web.Response(body=body)

    async def _spoilt(self, question: Question, fault: str) -> bytes:
        teacher = self.other._teacher if fault == "another model" else self._teacher
        answers = await teacher.score(question.requests)
        digests = tuple(request_digest(r) for r in question.requests)
        if fault in LIES:
            answers = answered(LIES[fault](singles(answers)))
            digests = digests[: len(answers)]
        if fault == "swapped":
            digests, answers = digests[::-1], answers[::-1]
        model = self.other._model if fault == "another model" else self._model
        kinds = tuple((SAYS[type(scores)],) for scores in singles(answers))
        reply = Reply(call=question.call, model=model, digests=digests, kinds=kinds, answers=tuple(answers))
        frame = encode_reply(reply)
        stale, self.last = self.last or encode_question(question), frame
        if fault == "bit flip":
            return frame[:90] + bytes([frame[90] ^ 4]) + frame[91:]
        return {"no frame": b"<html>", "replay": stale}.get(fault, frame)


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    yield made
    made.close()


@pytest.fixture(scope="module")
def liar(
    tiny: Tiny, loop: asyncio.AbstractEventLoop, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LyingServer, str]]:
    server = made_server(tiny, LyingServer)
    assert isinstance(server, LyingServer)
    server.other = made_server(make_tiny(tmp_path_factory.mktemp("other") / "teacher", 9, tied=False))
    url = loop.run_until_complete(server.start())
    yield server, url
    loop.run_until_complete(server.close())


def client(tiny: Tiny, url: str, shelf: PullSender | None = None, **fields: Any) -> HttpTeacher:
    config = config_of(
        tiny,
        backend=Backend.HTTP,
        url=url,
        **({"read_s": 2.0, "retries": 9, "max_consecutive_failures": 9, "backoff_s": 0.002} | fields),
    )
    return HttpTeacher(config, (shelf or PullSender()).store, TOKEN)


def written_by(tiny: Tiny, request: ScoreRequest, seed: int) -> ScoreRequest:
    """`request` with a completion that the model itself would write: what a teacher is really asked about."""
    random, ids = np.random.default_rng(seed), request.context_ids
    for _ in range(len(request.token_ids)):
        one = ScoreRequest(context_ids=ids, token_ids=ids[:1], kinds=(SampledToken(),))
        p = completion_logprobs(tiny.plain, one)[0].double().exp().numpy()
        ids = np.append(ids, random.choice(len(p), p=p / p.sum())).astype(np.int32)
    return replace(request, token_ids=ids[len(request.context_ids) :])


def wrong_rows(tiny: Tiny, asked: list[ScoreRequest], answers: list[ScoreAnswer], shelf: PullSender) -> int:
    """Rows that differ from a plain forward."""
    wrong = 0
    for request, answer in zip(asked, singles(answers), strict=True):
        full = completion_logprobs(tiny.plain, request).numpy()
        rows = np.arange(len(full))
        bad = np.abs(full[rows, request.token_ids] - answer.logprobs) > 2e-5
        if isinstance(answer, TopKScores):
            bad |= (np.abs(full[rows[:, None], answer.topk_ids] - answer.topk_logprobs) > 2e-5).any(1)
        if isinstance(answer, HiddenScores) and isinstance(answer.hidden, RemoteRows):
            head = tiny.plain.lm_head.weight
            states = answer.hidden.fetch(shelf.fetch)
            bad |= np.abs((states @ head.T).log_softmax(-1).numpy() - full).max(1) > 2e-5
        wrong += int(bad.sum())
    return wrong


@pytest.mark.faults(
    "teacher server breaks off", "teacher server lies", "teacher server mixes answers up",
    "teacher server changes its model",
)  # fmt: skip
def test_no_wrong_row_gets_through(tiny: Tiny, liar: tuple[LyingServer, str], loop: Any, witness: Witness) -> None:
    server, url = liar
    server.done = Counter()
    random = np.random.default_rng(0)
    faults = [*LIES, *ACCIDENTS] * ROUNDS
    random.shuffle(faults)
    plan = ["", *(f for fault in faults for f in ([fault] if random.random() < 0.6 else [fault, ""]))]
    server.plan = iter(plan)
    shelf = PullSender()
    teacher = client(tiny, url, shelf)
    every = [written_by(tiny, r, i) for i, r in enumerate(make_requests(SUPPORTS[Backend.HTTP], 20))]
    rows = wrong = calls = 0
    while sum(server.done.values()) < len(plan):
        kinds = random.permutation(20)[:6]
        asked = [every[i] for i in kinds]
        # every lie must be visible in the call it is told in
        asked += [every[0], every[1], every[4]]
        answers = loop.run_until_complete(teacher.score(asked))
        wrong += wrong_rows(tiny, asked, answers, shelf)
        rows += sum(len(r.token_ids) for r in asked)
        calls += 1
    assert (wrong, rows > 500) == (0, True)
    stats = loop.run_until_complete(teacher.stats())
    assert {name: server.done[name] for name in (*LIES, *ACCIDENTS)} == dict.fromkeys((*LIES, *ACCIDENTS), ROUNDS)
    assert stats.quarantined == ROUNDS * (len(LIES) + len(STRANGE))  # each was noticed
    assert stats.unanswered >= ROUNDS * (len(ACCIDENTS) - len(STRANGE))  # and a busy machine may be slow by itself
    witness("teacher server lies", sum(server.done[name] for name in LIES))
    witness("teacher server mixes answers up", server.done["replay"] + server.done["swapped"])
    witness("teacher server changes its model", server.done["another model"])
    witness("teacher server breaks off", sum(server.done[name] for name in ACCIDENTS if name not in STRANGE))


@pytest.mark.parametrize("lie", ["shifted left", "shifted right", "nan"])
@pytest.mark.parametrize("kind", [0, 1, 3, 4])
def test_each_kind_alone_shows_a_lie(tiny: Tiny, liar: Any, loop: Any, lie: str, kind: int) -> None:
    server, url = liar
    server.done, server.plan = Counter(), iter([lie] * 2)
    shelf = PullSender()
    teacher = client(tiny, url, shelf)
    asked = [written_by(tiny, make_request(kind, 70 + kind), kind)]
    assert wrong_rows(tiny, asked, loop.run_until_complete(teacher.score(asked)), shelf) == 0
    assert loop.run_until_complete(teacher.stats()).quarantined == 2


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("shifted left", r"not asked again after 3 wrong answers in a row .*none of which was used"),
        ("another model", r"not asked again after 3 wrong answers in a row .*another model answered"),
        ("500", r"no believable answer in 10 attempts .*status 500"),
        ("slow", r"no believable answer in 10 attempts .*no answer in time"),
    ],
)
def test_giving_up_is_one_sentence(tiny: Tiny, liar: Any, loop: Any, fault: str, says: str) -> None:
    server, url = liar
    server.done, server.plan = Counter(), iter([fault] * 10)
    teacher = client(tiny, url, max_consecutive_failures=3, read_s=0.1 if fault == "slow" else 30)
    for _ in range(2 if "not asked" in says else 1):  # and it stays given up
        with pytest.raises(OpdError, match=says) as caught:
            loop.run_until_complete(teacher.score([make_request(0, 1)]))
        assert "\n" not in str(caught.value)
    if fault == "slow":  # an attempt may end before the server comes to it
        assert 1 <= server.done[fault] <= 10
    else:
        assert server.done[fault] == (3 if "not asked" in says else 10)


@pytest.mark.faults("teacher server restarts")
def test_a_server_that_restarts_is_waited_for(tiny: Tiny, loop: Any, witness: Witness) -> None:
    first = made_server(tiny)
    url = loop.run_until_complete(first.start())
    teacher, asked, shelf = client(tiny, url, retries=12, backoff_s=0.05), [make_request(1, 2)], PullSender()
    again = made_server(tiny)
    again._config = ServerConfig(port=int(url.rsplit(":", 1)[1]), token=Secret(TOKEN))

    async def scene() -> list[ScoreAnswer]:
        await teacher.ready()
        await first.close()
        waiting = asyncio.ensure_future(teacher.score(asked))
        await asyncio.sleep(0.3)
        await again.start()
        return await waiting

    answers = loop.run_until_complete(scene())
    assert wrong_rows(tiny, asked, answers, shelf) == 0
    assert loop.run_until_complete(teacher.stats()).unanswered > 0
    witness("teacher server restarts")
    loop.run_until_complete(again.close())


def test_another_model_or_vocabulary_is_noticed_before_anything_is_asked(
    tiny: Tiny, liar: Any, loop: Any, tmp_path: Any
) -> None:
    _, url = liar
    cases: list[tuple[dict[str, Any], str]] = [
        ({"fingerprint": "0" * 32}, r"is model [0-9a-f]{32}, but 0{32} is expected \(teacher\.fingerprint\)"),
        ({"path": str(make_tiny(tmp_path / "other", 5, tied=False).path)}, r"is expected \(the weights in"),
        ({"path": str(wider(tmp_path / "wide"))}, r"another vocabulary .*161 rows\); serve that model"),
    ]
    for fields, says in cases:
        with pytest.raises(ConfigurationError, match=says):
            loop.run_until_complete(client(tiny, url, **fields).ready())
    with pytest.raises(DataError, match="does not say who it is"):
        parse_identity("{}")


def wider(folder: Any) -> Any:
    from tests.tiny_models import save

    return save(tiny_model(vocab_size=VOCABULARY + 1), folder)


@pytest.mark.parametrize("spoilt", ["shifted", "other ids", "short", "no field", "positive", "500", "no json"])
def test_an_endpoint_that_answers_nonsense_is_not_believed(tiny: Tiny, loop: Any, spoilt: str) -> None:
    endpoint = CompletionsEndpoint(tiny.plain)
    url = loop.run_until_complete(endpoint.start())
    config = config_of(tiny, backend=Backend.OPENAI, url=url, model="m", max_consecutive_failures=9)
    teacher, asked = OpenAITeacher(config, PullSender().store, ""), [make_request(1, 8), make_request(1, 9)]
    left = [2]

    def spoil(answer: dict[str, Any]) -> Any:
        left[0] -= 1
        if left[0] < 0:
            return answer
        for choice in answer["choices"]:
            rows = choice["prompt_logprobs"]
            if spoilt == "shifted":
                choice["prompt_logprobs"] = [None, *rows[2:], rows[1]]
            elif spoilt == "other ids":
                choice["prompt_token_ids"] = [i + 1 for i in choice["prompt_token_ids"]]
            elif spoilt == "short":
                choice["prompt_logprobs"] = rows[:-1]
            elif spoilt == "no field":
                del choice["prompt_logprobs"]
            elif spoilt == "positive":
                for entry in rows[-1].values():
                    entry["logprob"] = 1.0
        bodies = {"500": web.Response(status=500), "no json": web.Response(text="<html>")}
        return bodies.get(spoilt, answer)

    endpoint.spoil = spoil
    answers = loop.run_until_complete(teacher.score(asked))
    assert wrong_rows(tiny, asked, answers, PullSender()) == 0
    stats = loop.run_until_complete(teacher.stats())
    assert stats.unanswered + stats.quarantined == 2
    loop.run_until_complete(endpoint.close())


def test_the_server_refuses_what_it_must_with_a_clear_status(tiny: Tiny, loop: Any) -> None:
    server = made_server(tiny, requests=3, tokens=90, frame_bytes=4096)
    url = loop.run_until_complete(server.start())
    good = make_request(1, 0, tokens=5)
    tokens = len(good.token_ids)
    far = np.full(tokens, VOCABULARY, dtype=np.int32)
    long = np.ones(100, dtype=np.int32)

    def frame(*requests: ScoreRequest) -> bytes:
        return encode_question(Question(call=bytes(16), requests=requests))

    cases = [
        (401, {}, frame(good), "needs its token"),
        (401, {"Authorization": f"Bearer {TOKEN}x"}, frame(good), "needs its token"),
        (400, AUTHORIZED, b"junk", "too few for a frame"),
        (400, AUTHORIZED, frame(good)[:-1], "digest"),
        (413, AUTHORIZED, bytes(5000), ""),
        (413, AUTHORIZED, frame(good, good, good, good), "4 requests, but 3"),
        (413, AUTHORIZED, frame(replace(good, context_ids=long)), "tokens, but 90"),
        (422, AUTHORIZED, frame(replace(good, token_ids=far)), "outside the vocabulary"),
        (422, AUTHORIZED, frame(replace(good, kinds=(TopK(k=51),))), "51 log-probabilities"),
        (422, AUTHORIZED, frame(replace(good, kinds=(AtIds(ids=far[:, None]),))), "outside the vocabulary"),
        (200, AUTHORIZED, frame(good), ""),
    ]

    async def post(headers: dict[str, str], body: bytes) -> tuple[int, str]:
        async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/score", headers=headers, data=body) as r:
            return r.status, (await r.read()).decode(errors="replace")

    for status, headers, body, says in cases:
        got, text = loop.run_until_complete(post(headers, body))
        assert (got, says in text) == (status, True), text
        assert got == 200 or (len(text.splitlines()) <= 1 and "Traceback" not in text)
    assert loop.run_until_complete(get_status(url)) == 401
    loop.run_until_complete(server.close())


async def get_status(url: str) -> int:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/v1/identity") as response:
        return response.status


def test_refusals_are_not_retried(tiny: Tiny, loop: Any) -> None:
    server = made_server(tiny, k=4)
    url = loop.run_until_complete(server.start())
    deep = client(tiny, url)
    with pytest.raises(DataError, match="status 422"):
        loop.run_until_complete(deep.score([make_request(1, 0)]))
    stranger = HttpTeacher(config_of(tiny, backend=Backend.HTTP, url=url), PullSender().store, "wrong" * 5)
    with pytest.raises(ConfigurationError, match=r"refuses our token.*OPD_TEACHER_TOKEN"):
        loop.run_until_complete(stranger.ready())
    assert loop.run_until_complete(deep.stats()).unanswered == 0
    loop.run_until_complete(server.close())


def test_too_many_calls_at_once_are_told_to_come_again(tiny: Tiny, loop: Any) -> None:
    server = made_server(tiny, tokens=100)  # so that one call of ours is many of the server's
    server._config = replace(server._config, pending=1)
    url = loop.run_until_complete(server.start())
    shelf = PullSender()
    teacher = client(tiny, url, shelf, retries=30)
    asked = [r for r in make_requests(SUPPORTS[Backend.HTTP], 12) if not isinstance(r.kinds[0], LastHidden)]
    answers = loop.run_until_complete(teacher.score(asked))
    assert wrong_rows(tiny, asked, answers, shelf) == 0
    loop.run_until_complete(server.close())


def test_a_server_without_a_token_does_not_start() -> None:
    for token in ("", "short", "ü" * 20):
        with pytest.raises(ConfigurationError, match=re.escape("OPD_TEACHER_TOKEN")):
            ServerConfig(token=Secret(token))
    assert TOKEN not in repr(ServerConfig(token=Secret(TOKEN)))
