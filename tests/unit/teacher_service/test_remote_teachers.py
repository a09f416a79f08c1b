"""Teachers on the network, against servers in this process: what is sent, what fits, and what is not believed."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from hf.digest import model_digest
from opd.errors import ConfigurationError, DataError, OpdError
from opd.ports import AtIds, LastHidden, SampledToken, ScoreAnswer, ScoreKind, ScoreRequest, TopK
from opd.settings.secret import Secret
from opd.types import HiddenScores, RemoteRows, TokenScores, TopKScores
from teacher_service.backends.http import HttpTeacher, _check_identity, _checked_answers, frames
from teacher_service.backends.openai import OpenAITeacher, exchanges, room
from teacher_service.config import Backend, TeacherConfig
from teacher_service.control_question import aligned, control
from teacher_service.frames import FrameLimits, Reply, encode_reply, request_digest
from teacher_service.retries import NoAnswer, WrongAnswer, fetch, session
from teacher_service.scoring import Bounds, Unreadable
from teacher_service.server import ServerConfig, TeacherServer
from teacher_service.server_identity import Identity, identity_of, parse_identity
from tests.one_kind import answered, singles
from tests.tiny_models import impatient

ASSETS = Path(__file__).resolve().parents[3] / "assets" / "shop" / "teacher"
TOKEN = "a-token-of-remote-teachers"
ROWS, WIDTH = 64, 8
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def text(context: Sequence[int], tokens: Sequence[int], kind: ScoreKind | None = None) -> ScoreRequest:
    return ScoreRequest(
        context_ids=np.array(context, dtype=np.int32),
        token_ids=np.array(tokens, dtype=np.int32),
        kinds=(kind or SampledToken(),),
    )


def config(backend: Backend, url: str, **fields: Any) -> TeacherConfig:
    """Without a second attempt, unless it is asked for."""
    quick: dict[str, Any] = {
        "retries": 0,
        "max_consecutive_failures": 1,
        "backoff_s": 0.001,
        "deadline_s": 20.0,
        **fields,
    }
    return TeacherConfig(path=str(ASSETS), backend=backend, url=url, model="m", **quick)


def against(handler: Handler, work: Callable[[str], Awaitable[Any]]) -> Any:
    """The result of `work(url)` while `handler` answers there, whatever is asked."""

    async def main() -> Any:
        app = web.Application(client_max_size=1 << 24)
        app.router.add_route("*", "/{path:.*}", handler)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            return await asyncio.wait_for(work(f"http://127.0.0.1:{runner.addresses[0][1]}"), 20)
        finally:
            await runner.cleanup()

    return asyncio.run(main())


# One exchange.


def fetched(handler: Handler, most: int = 100, read_s: float = 5.0) -> bytes:
    async def work(url: str) -> bytes:
        async with session(config(Backend.HTTP, url, read_s=read_s), Secret(TOKEN)) as client:
            return await fetch(client, "GET", url + "/here", most)

    return against(handler, work)


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("most", [0, 100])
def test_a_body_has_at_most_as_many_bytes_as_were_asked_for(announced: bool, most: int) -> None:
    def answering(nbytes: int) -> Handler:
        async def handler(request: web.Request) -> web.StreamResponse:
            if announced:
                return web.Response(body=b"x" * nbytes)
            response = web.StreamResponse()
            response.enable_chunked_encoding()
            await response.prepare(request)
            await response.write(b"x" * nbytes)
            return response

        return handler

    assert fetched(answering(most), most) == b"x" * most
    says = rf"has {most + 1} bytes, more than {most}" if announced else rf"has more than {most} bytes"
    with pytest.raises(WrongAnswer, match=says):
        fetched(answering(most + 1), most)


def test_what_comes_of_an_exchange_that_fails() -> None:
    async def elsewhere(request: web.Request) -> web.StreamResponse:
        if request.path != "/here":
            return web.Response(body=b"the other server's")
        raise web.HTTPFound("/there")

    async def slow(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(2)
        return web.Response()

    async def dead(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    async def wordy(_: web.Request) -> web.StreamResponse:
        return web.Response(status=503, text="y" * 600, headers={"Retry-After": "7"})

    with pytest.raises(ConfigurationError, match="status 302"):
        fetched(elsewhere)
    with pytest.raises(NoAnswer, match="no answer in time"):
        fetched(slow, read_s=0.1)
    with pytest.raises(NoAnswer, match="the connection failed"):
        fetched(dead)
    with pytest.raises(NoAnswer, match="status 503") as caught:
        fetched(wordy, most=1000)
    assert str(caught.value).count("y") == 500 and caught.value.wait_s == 7.0


@pytest.mark.parametrize(("token", "headers"), [(TOKEN, {"Authorization": f"Bearer {TOKEN}"}), ("", {})])
def test_an_attempt_has_the_times_of_its_settings_and_shows_the_token(token: str, headers: dict[str, str]) -> None:
    async def made() -> tuple[Any, dict[str, str]]:
        async with session(config(Backend.HTTP, "http://h", connect_s=3.0, read_s=11.0), Secret(token)) as client:
            return client.timeout, dict(client.headers)

    timeout, sent = asyncio.run(made())
    assert (timeout.total, timeout.sock_connect, timeout.sock_read) == (14.0, 3.0, 11.0)
    assert sent == headers


# Control questions.


def test_a_control_question_is_about_the_shortest_text_that_can_have_one() -> None:
    asked = [text(range(9), [9]), text([], [1]), text([1], [2, 3, 4, 5]), text([1], []), text([6, 5], [6, 7])]
    check = control(asked, 0)
    assert check is not None and check.about == 4
    same = text([3], [3])  # nothing in it to put in place of its last token
    check = control([same, asked[2]], 0)
    assert check is not None and check.about == 1
    assert control([same, *asked[1:2], asked[3]], 0) is None


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_a_control_question_changes_the_last_of_at_most_eight_tokens_into_each_other_of_the_text(
    context: list[int], tokens: list[int]
) -> None:
    cut = tokens[:8]
    others = {*context, *tokens} - {cut[-1]}
    request = text(context, tokens, TopK(k=3))
    tried = set[int]()
    for attempt in range(len(others)):
        check = control([request], attempt)
        assert check is not None and check.question.kinds == (SampledToken(),)
        assert check.question.context_ids.tolist() == context
        *kept, last = check.question.token_ids.tolist()
        assert kept == cut[:-1]
        tried.add(last)
    assert tried == others and request.token_ids.tolist() == tokens


@pytest.mark.parametrize(
    ("plain", "changed", "tolerance", "right"),
    [
        ([-1, -2, -3], [-1, -2, -4], 0.0, True),
        ([-1, -2, -4], [-1, -2, -3], 0.0, True),  # in either direction
        ([-1, -2, -3], [-1, -2, -3], 1.0, False),  # shifted to the right: nothing changed
        ([-1, -2, -3], [-1, -4, -3], 1.0, False),  # shifted to the left: one too early
        ([-1, -2, -3], [-1, -4, -9], 1.0, False),  # a change where none may be, whatever the last one is
        ([-1, -2, -3], [-1, -1, -9], 0.5, False),
        ([-4, -2, -3], [-1, -2, -9], 0.5, False),
        ([-1, -2, -3], [-1.25, -2, -4], 0.25, True),  # as much noise as is tolerated
        ([-1, -2, -3], [-1.25, -2, -4], 0.125, False),
        ([-1, -2, -3], [-1.25, -2, -3.75], 0.25, False),  # a change that is 3 times the noise
        ([-1, -2, -3], [-1.25, -2, -3.875], 0.25, True),
        ([-1, -2, -3, -7], [-1, -2, -4], 0.0, True),  # of a text that was cut
        ([-1], [-2], 0.0, True),
        ([0.0], [-1.5e-6], 0.0, True),
        ([0.0], [-0.5e-6], 0.0, False),  # less than rounding may do
    ],
)
def test_rows_are_aligned_when_the_last_number_alone_changes(
    plain: list[float], changed: list[float], tolerance: float, right: bool
) -> None:
    assert aligned(np.array(plain, np.float32), np.array(changed, np.float32), tolerance) is right


# Who a server is.


def known(**fields: Any) -> Identity:
    made = identity_of(config(Backend.HTTP, "http://h"), "float32", FrameLimits())
    return replace(made, **fields)


def test_an_identity_comes_back_as_it_went_and_another_protocol_is_refused() -> None:
    said = known(supports=("written", "at_ids"), limits=FrameLimits(requests=3))
    assert parse_identity(said.to_json()) == said
    fields = json.loads(said.to_json())
    assert fields["protocol"] == 2
    with pytest.raises(DataError, match="speaks protocol 1, this client 2"):
        parse_identity(json.dumps({"protocol": 1, "answers": ["written"]}))
    for wrong in ("", "[]", "{}", json.dumps(fields | {"more": 1}), json.dumps(fields | {"limits": {"more": 1}})):
        with pytest.raises(DataError, match="does not say who it is"):
            parse_identity(wrong)


def test_an_identity_is_that_of_the_folder_and_of_what_its_backend_answers() -> None:
    served = identity_of(config(Backend.OPENAI, "http://h"), "bfloat16", FrameLimits(k=5))
    assert (served.rows, served.dtype, served.limits) == (ROWS, "bfloat16", FrameLimits(k=5))
    assert served.supports == ("written", "topk") and known().supports == ("written", "topk", "at_ids", "hidden")
    assert served.model == model_digest(str(ASSETS)) and len(served.model) == 32


def test_the_digest_of_a_model_is_over_its_files_by_name_however_the_folder_lists_them(tmp_path: Path) -> None:
    names = [f"model-{i:02}.safetensors" for i in range(16)]
    expected = xxhash.xxh3_128()
    for name in names:
        expected.update(f"{name}:{len(name)};{name}".encode())
    for number, order in enumerate((names, names[::-1])):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert model_digest(str(folder)) == ""
        (folder / "config.json").write_text("{}")
        for name in order:
            (folder / name).write_text(name)
        assert model_digest(str(folder)) == expected.hexdigest()


def test_a_server_is_refused_unless_it_is_the_one_that_is_meant(tmp_path: Path) -> None:
    said, ours = known(), config(Backend.HTTP, "http://h")
    _check_identity(said, ours)
    _check_identity(replace(said, model="ab" * 16), replace(ours, fingerprint="ab" * 16))
    for file in ASSETS.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    light = replace(ours, path=str(tmp_path))
    _check_identity(replace(said, model="ab" * 16), light)  # nothing here to compare it with
    for wrong, setting, says in (
        (replace(said, vocabulary="other"), ours, "another vocabulary"),
        (replace(said, rows=ROWS + 1), ours, "another vocabulary"),
        (replace(said, model="ab" * 16), ours, r"is expected \(the weights in"),
        (said, replace(ours, fingerprint="ab" * 16), r"is expected \(teacher\.fingerprint\)"),
        (replace(said, model=""), light, "no weights to be known by"),
    ):
        with pytest.raises(ConfigurationError, match=says):
            _check_identity(wrong, setting)


# Our own server.


class Scholar:
    """`opd.ports.LogprobTeacher` whose numbers follow from the ids; `noise` is on all but the last of a last answer."""

    def __init__(self, noise: float = 0.0, takes_s: float = 0.0) -> None:
        self._noise, self._takes_s = noise, takes_s
        self._open = self.most = 0

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreAnswer]:
        self._open += 1
        self.most = max(self.most, self._open)
        await asyncio.sleep(self._takes_s)
        self._open -= 1
        answers = [self._answer(r) for r in requests]
        answers[-1].logprobs[:-1] -= np.float32(self._noise)
        return answered(answers)

    @staticmethod
    def _answer(request: ScoreRequest) -> TokenScores:
        written, tokens = -1.0 - request.token_ids.astype(np.float32), len(request.token_ids)
        if isinstance(request.kinds[0], LastHidden):
            rows = RemoteRows(pieces=((np.ones((tokens, WIDTH), np.float32), np.arange(tokens)),))
            return HiddenScores(logprobs=written, hidden=rows)
        return TokenScores(logprobs=written)


def scored(scholar: Scholar, requests: Sequence[ScoreRequest], *, slash: str = "", **fields: Any) -> list[Any]:
    """What a client is told by a server over `scholar`; `fields` are those of its identity."""

    async def main() -> list[ScoreAnswer]:
        async with AsyncExitStack() as stack:
            server = TeacherServer(scholar, known(**fields), ServerConfig(port=0, token=Secret(TOKEN)))
            stack.push_async_callback(server.close)
            setting = config(Backend.HTTP, await server.start() + slash)
            return await HttpTeacher(setting, lambda array: ("kept", array), TOKEN).score(requests)

    return singles(asyncio.run(asyncio.wait_for(main(), 20)))


@pytest.mark.parametrize(
    ("dtype", "noise", "right"),
    [("float32", 9e-4, True), ("float32", 1.5e-3, False), ("bfloat16", 0.2, True), ("bfloat16", 0.3, False)],
)
def test_a_control_question_allows_the_noise_of_the_dtype_and_no_more(dtype: str, noise: float, right: bool) -> None:
    asked = [text([1, 2], [3, 4, 5])]
    if right:
        (answer,) = scored(Scholar(noise), asked, dtype=dtype)
        assert np.asarray(answer.logprobs).tolist() == [-4, -5, -6]
        return
    with pytest.raises(OpdError, match="control question shows"):
        scored(Scholar(noise), asked, dtype=dtype)


def test_at_most_four_frames_of_a_call_are_under_way_and_all_are_answered_in_order() -> None:
    scholar = Scholar(takes_s=0.15)
    asked = [text([1], [2 + i, 1]) for i in range(10)]
    answers = scored(scholar, asked, slash="/", limits=FrameLimits(requests=2))
    assert [float(np.asarray(a.logprobs)[0]) for a in answers] == [-3.0 - i for i in range(10)]
    assert scholar.most == 4


def test_hidden_states_are_put_into_the_store_with_the_bytes_of_a_row() -> None:
    (answer,) = scored(Scholar(), [text([1], [2, 3, 4], LastHidden())])
    assert isinstance(answer, HiddenScores) and isinstance(answer.hidden, RemoteRows)
    ((handle, rows),) = answer.hidden.pieces
    assert handle[0] == "kept" and handle[1].shape == (3, WIDTH) and rows.tolist() == [0, 1, 2]
    assert answer.hidden.row_nbytes == 4 * WIDTH


@pytest.mark.parametrize("spare", [0, 1])
def test_an_identity_has_at_most_64_kib(spare: int) -> None:
    said = known().to_json().ljust(65_536 + spare)

    async def handler(_: web.Request) -> web.StreamResponse:
        return web.Response(text=said)

    def ready(url: str) -> Awaitable[None]:
        return HttpTeacher(config(Backend.HTTP, url), lambda array: array, TOKEN).ready()

    if not spare:
        against(handler, ready)
        return
    with pytest.raises(OpdError, match="65537 bytes, more than 65536"):
        against(handler, ready)


@pytest.mark.parametrize("backend", [Backend.HTTP, Backend.OPENAI])
def test_a_call_ends_at_the_deadline(backend: Backend) -> None:
    async def handler(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(5)
        return web.Response()

    async def work(url: str) -> None:
        kind = HttpTeacher if backend is Backend.HTTP else OpenAITeacher
        await kind(impatient(config(backend, url)), lambda array: array, TOKEN).score([text([1], [2])])

    with pytest.raises(OpdError, match=r"did not (finish scoring|score) 1 completions within 0 s"):
        against(handler, work)


SMALL = text([1], [2])  # 40 bytes there and back
DEEP = text([1], [2], LastHidden())  # and 32768 + 16 more for a hidden state


@pytest.mark.parametrize(
    ("request_", "limits", "sizes"),
    [
        (SMALL, FrameLimits(), [7]),
        (SMALL, FrameLimits(requests=4), [3, 3, 1]),  # one more is for the control question
        (SMALL, FrameLimits(tokens=8), [2, 2, 2, 1]),  # which may be as long as all of it
        (SMALL, FrameLimits(tokens=11), [2, 2, 2, 1]),
        (SMALL, FrameLimits(tokens=12), [3, 3, 1]),
        (SMALL, FrameLimits(frame_bytes=240), [3, 3, 1]),
        (SMALL, FrameLimits(frame_bytes=239), [2, 2, 2, 1]),
        (SMALL, FrameLimits(tokens=1), [1] * 7),  # what never fits is sent alone, and refused there
        (DEEP, FrameLimits(frame_bytes=131_296), [2, 2, 2, 1]),
        (DEEP, FrameLimits(frame_bytes=131_295), [1] * 7),
    ],
)
def test_frames_are_filled_up_to_the_limits(request_: ScoreRequest, limits: FrameLimits, sizes: list[int]) -> None:
    asked = [request_] * 7
    assert [len(part) for part in frames(asked, limits)] == sizes
    assert list(frames([], limits)) == []


def test_an_answer_is_believed_only_if_it_is_whole_and_ours() -> None:
    asked = [text([1], [2, 3], TopK(k=2))]
    said = TopKScores(
        logprobs=np.array([-1, -2], np.float32),
        topk_ids=np.array([[2, 4], [5, 3]], np.int32),
        topk_logprobs=np.array([[-1, -1.5], [-1, -2]], np.float32),
    )
    identity = known(model="ab" * 16)
    digests = tuple(request_digest(r) for r in asked)
    right = Reply(call=bytes(16), model=b"\xab" * 16, digests=digests, kinds=((TopK,),), answers=((said,),))

    def believed(reply: Reply | bytes, subject: Identity = identity) -> list[Any]:
        return singles(
            _checked_answers(reply if isinstance(reply, bytes) else encode_reply(reply), bytes(16), asked, subject)
        )

    (answer,) = believed(right)
    assert np.array_equal(answer.logprobs, said.logprobs)
    frame = encode_reply(right)
    tight = replace(identity, limits=FrameLimits(frame_bytes=len(frame) - 1))
    positive = replace(said, logprobs=np.array([-1, 2], np.float32))
    beyond = replace(said, topk_ids=np.array([[2, ROWS], [5, 3]], np.int32))
    cases: list[tuple[Reply | bytes, Identity, type[OpdError], str]] = [
        (frame[:-1], identity, NoAnswer, "digest"),
        (b"<html>", identity, NoAnswer, "too few"),
        (frame, tight, WrongAnswer, "are allowed"),
        (replace(right, model=bytes(16)), identity, WrongAnswer, "another model answered"),
        (replace(right, call=b"x" * 16), identity, WrongAnswer, "other requests"),
        (replace(right, digests=(bytes(16),)), identity, WrongAnswer, "other requests"),
        (replace(right, answers=((positive,),)), identity, WrongAnswer, "refused"),
        (replace(right, answers=((beyond,),)), identity, WrongAnswer, "outside its vocabulary"),
    ]
    for reply, subject, kind, says in cases:
        with pytest.raises(kind, match=says):
            believed(reply, subject)


# Any completions endpoint.

TABLE = np.random.default_rng(0).normal(size=(ROWS, ROWS)) * 2
TABLE -= np.log(np.exp(TABLE).sum(axis=1, keepdims=True))
TABLE[:, 7] = TABLE[:, 9] = TABLE[:, :10].max(axis=1)  # two that are equally likely, among the likeliest


class Endpoint:
    """Answers as vLLM's OpenAI-compatible server does, from `TABLE`: rows in no order, with the written token."""

    def __init__(self, takes_s: float = 0.0, spoil: Callable[[dict[str, Any]], None] = lambda choice: None) -> None:
        self._takes_s, self._spoil = takes_s, spoil
        self._open = self.most = 0
        self.asked: list[dict[str, Any]] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        assert (request.method, request.path) == ("POST", "/v1/completions")
        asked = await request.json()
        self.asked.append(asked)
        self._open += 1
        self.most = max(self.most, self._open)
        await asyncio.sleep(self._takes_s)
        self._open -= 1
        choices = [self._choice(i, ids, asked["prompt_logprobs"]) for i, ids in enumerate(asked["prompt"])]
        for choice in choices:
            self._spoil(choice)
        return web.json_response({"choices": choices[::-1]})

    @staticmethod
    def _choice(index: int, ids: list[int], k: int) -> dict[str, Any]:
        rows: list[Any] = [None]
        for before, written in pairwise(ids):
            best = np.argsort(-TABLE[before], kind="stable")[:k].tolist()
            names = [*best[::-1], *([] if written in best else [written])]
            rows.append({str(i): {"logprob": float(TABLE[before, i])} for i in names})
        return {"index": index, "prompt_logprobs": rows, "prompt_token_ids": ids}


def told(endpoint: Endpoint, requests: Sequence[ScoreRequest], slash: str = "", **fields: Any) -> list[Any]:
    def work(url: str) -> Awaitable[list[ScoreAnswer]]:
        return OpenAITeacher(config(Backend.OPENAI, url + slash, **fields), lambda array: array, "").score(requests)

    return singles(against(endpoint.answer, work))


def test_an_endpoint_is_asked_for_what_is_needed_and_its_numbers_are_put_in_order() -> None:
    endpoint = Endpoint()
    asked = [text([1, 2], [3, 4], TopK(k=5)), text([5], [6]), text([8], [9, 1, 2], TopK(k=5))]
    answers = told(endpoint, asked, slash="/")
    common = {"model": "m", "max_tokens": 1, "temperature": 0.0, "return_token_ids": True}
    assert sorted(endpoint.asked, key=lambda one: one["prompt_logprobs"]) == [
        common | {"prompt": [[5, 6]], "prompt_logprobs": 0},
        common | {"prompt": [[1, 2, 3, 4], [8, 9, 1, 2]], "prompt_logprobs": 5},
    ]
    assert type(answers[1]) is TokenScores
    for request, answer in zip(asked, answers, strict=True):
        before = np.concatenate([request.context_ids, request.token_ids])[len(request.context_ids) - 1 : -1]
        np.testing.assert_allclose(answer.logprobs, TABLE[before, request.token_ids], rtol=1e-6)
        if isinstance(answer, TopKScores):  # of equally likely ones the smaller id first
            best = np.argsort(-TABLE[before], axis=1, kind="stable")[:, :5]
            assert np.array_equal(answer.topk_ids, best)
            np.testing.assert_allclose(answer.topk_logprobs, np.take_along_axis(TABLE[before], best, 1), rtol=1e-6)


def test_an_endpoint_is_ready_when_it_has_scored_a_short_text() -> None:
    endpoint = Endpoint()

    def work(url: str) -> Awaitable[None]:
        return OpenAITeacher(config(Backend.OPENAI, url), lambda array: array, "").ready()

    against(endpoint.answer, work)
    assert [(one["prompt"], one["prompt_logprobs"]) for one in endpoint.asked] == [([[1, 2, 3]], 1)]


def test_at_most_four_exchanges_of_a_call_are_under_way() -> None:
    endpoint = Endpoint(takes_s=0.15)
    asked = [text([1], [2 + i], TopK(k=1)) for i in range(10)]
    answers = told(endpoint, asked, max_batch_tokens=2)
    np.testing.assert_allclose([np.asarray(a.logprobs)[0] for a in answers], TABLE[1, 2:12], rtol=1e-6)
    assert endpoint.most == 4 and len(endpoint.asked) == 10


@pytest.mark.parametrize(
    ("ks", "budget", "groups"),
    [
        ([1] * 7, 6, [[0, 1, 2], [3, 4, 5], [6]]),
        ([1] * 7, 7, [[0, 1, 2], [3, 4, 5], [6]]),
        ([1] * 3, 1, [[0], [1], [2]]),  # what never fits goes alone
        ([3, 0, 3, 1, 0], 100, [[1, 4], [3], [0, 2]]),  # equal k go together
        ([2] * 130, 10_000, [list(range(64)), list(range(64, 128)), [128, 129]]),
        ([], 5, []),
    ],
)
def test_exchanges_are_filled_with_requests_of_one_k(ks: list[int], budget: int, groups: list[list[int]]) -> None:
    asked = [text([1], [2], TopK(k=k) if k else SampledToken()) for k in ks]  # 2 tokens each
    assert list(exchanges(asked, budget)) == groups


def test_there_is_room_for_a_row_of_json_at_every_position() -> None:
    mib = 1_048_576
    assert room([text([1, 2], [3], TopK(k=4)), text([1], [2, 3], TopK(k=4))]) == mib + 160 * 5 * (3 + 3)
    assert room([text([1], [2])]) == mib + 160 * 2


def test_an_endpoint_that_scores_no_prompts_is_named() -> None:
    def nothing(choice: dict[str, Any]) -> None:
        choice["prompt_logprobs"] = None

    with pytest.raises(ConfigurationError, match="gives no prompt_logprobs"):
        told(Endpoint(spoil=nothing), [text([1], [2])])


@pytest.mark.parametrize("ids", ["none", "absent"])
def test_an_endpoint_may_leave_out_which_ids_it_read(ids: str) -> None:
    def silent(choice: dict[str, Any]) -> None:
        choice["prompt_token_ids"] = None
        if ids == "absent":
            del choice["prompt_token_ids"]

    (answer,) = told(Endpoint(spoil=silent), [text([1], [2])])
    np.testing.assert_allclose(answer.logprobs, TABLE[1, [2]], rtol=1e-6)


# What any teacher can read.

AT = np.zeros((2, 4), dtype=np.int32)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (text([1, 2, 3], [4, 5]), ""),  # 4 tokens are read: nothing follows the last one
        (text([1, 2, 3], [4, 5, 6]), "5 tokens, more than the 4"),
        (text([], [1]), "0 context"),
        (text([1], []), "0 completion"),
        (text([0], [9]), ""),
        (text([9], [0]), ""),
        (text([10], [1]), "context has ids outside"),
        (text([1], [10]), "completion has ids outside"),
        (text([-1], [1]), "context has ids outside"),
        (text([1], [-1]), "completion has ids outside"),
        (text([1], [2], TopK(k=4)), ""),
        (text([1], [2], TopK(k=5)), "k=5 is not within 1 and 4"),
        (text([1], [2], TopK(k=0)), "k=0 is not within 1 and 4"),
        (text([1], [2, 3], AtIds(ids=AT)), ""),
        (text([1], [2, 3], AtIds(ids=AT + 9)), ""),
        (text([1], [2, 3], AtIds(ids=AT + 10)), "asks at ids outside"),
        (text([1], [2, 3], AtIds(ids=AT - 1)), "asks at ids outside"),
        (text([1], [2, 3], AtIds(ids=AT[:1])), "shape"),
        (text([1], [2, 3], AtIds(ids=AT[:, :0])), "shape"),
        (text([1], [2, 3], AtIds(ids=np.zeros((2, 5), np.int32))), "shape"),
    ],
)
def test_a_teacher_reads_what_is_within_its_bounds(request_: ScoreRequest, says: str) -> None:
    bounds = Bounds(vocabulary=10, longest=4, max_k=4, limits="a test")
    if not says:
        bounds.check([request_])
        return
    with pytest.raises(Unreadable, match=f"score request 1 cannot be read by the teacher: .*{says}"):
        bounds.check([text([1], [2]), request_])
    with pytest.raises(Unreadable, match="within 1 and 10"):  # never more than there are
        replace(bounds, max_k=99).check([text([1], [2], TopK(k=11))])
