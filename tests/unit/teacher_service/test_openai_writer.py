"""Text written over a completions endpoint: what is asked, what is believed, and what is refused."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from transformers import Qwen3ForCausalLM

from opd.errors import ConfigurationError, DataError, OpdError
from opd.ports import Completion, GenerateRequest, Sampling, TeacherBlend, TextEngine
from opd.rollouts.seeds import sampling_seed
from opd.types import NO_VERSION, StopReason
from teacher_service.backends.openai_writer import Ending, OpenAIWriter
from teacher_service.config import Backend, TeacherConfig
from tests.contract.endpoint import CompletionsEndpoint
from tests.tiny_models import VOCABULARY, logprobs, tiny_model

ENDS = tuple(range(8))  # many, so that some texts end


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return tiny_model(0, std=0.15)


@asynccontextmanager
async def writing(
    model: Qwen3ForCausalLM, spoil: Callable[[Any], Any] = lambda answer: answer, **fields: Any
) -> AsyncIterator[tuple[OpenAIWriter, CompletionsEndpoint]]:
    endpoint = CompletionsEndpoint(model)
    endpoint.spoil = spoil
    quick: dict[str, Any] = {"retries": 0, "backoff_s": 0.001, "deadline_s": 20.0, "max_consecutive_failures": 1}
    try:
        config = TeacherConfig(
            path="unread", backend=Backend.OPENAI, url=await endpoint.start(), model="m", **(quick | fields)
        )
        yield OpenAIWriter(config, Ending(ids=ENDS, texts=("\n\n",), rows=VOCABULARY), 7, "a-token"), endpoint
    finally:
        await endpoint.close()


def request(number: int, context: Sequence[int] = (9, 10), **sampling: Any) -> GenerateRequest:
    return GenerateRequest(
        prompt_id=f"p{number}",
        sample=number,
        context_ids=np.array(context, dtype=np.int32),
        sampling=Sampling(**({"max_tokens": 6} | sampling)),
    )


def written(model: Qwen3ForCausalLM, asked: Sequence[GenerateRequest], **options: Any) -> list[Completion]:
    async def run() -> list[Completion]:
        async with writing(model, **options) as (writer, _):
            assert isinstance(writer, TextEngine)
            return await writer.generate(asked)

    return asyncio.run(run())


def test_completions_are_the_model_s_own_in_order_and_again_the_same(model: Qwen3ForCausalLM) -> None:
    asked = [request(i, (9, 10 + i), temperature=float(i % 3 > 0)) for i in range(12)]
    texts = written(model, asked)
    assert {text.stop for text in texts} == {StopReason.END, StopReason.LENGTH}
    for one, text in zip(asked, texts, strict=True):
        whole = np.concatenate([one.context_ids, text.token_ids])
        rows = logprobs(model, whole).numpy()[len(one.context_ids) - 1 : -1]
        np.testing.assert_allclose(text.behavior.logprobs, rows[np.arange(len(text.token_ids)), text.token_ids], 1e-5)
        assert (text.stop is StopReason.END) == (int(text.token_ids[-1]) in ENDS)
        assert set(text.versions.tolist()) == {NO_VERSION} and not text.digests
    for before, after in zip(texts, written(model, asked[::-1])[::-1], strict=True):
        np.testing.assert_array_equal(before.token_ids, after.token_ids)


def test_the_question_leaves_no_setting_of_sampling_to_the_server(model: Qwen3ForCausalLM) -> None:
    async def run() -> list[dict[str, Any]]:
        async with writing(model) as (writer, endpoint):
            await writer.generate([request(3, temperature=0.5, top_p=0.9)])
            return endpoint.asked

    (question,) = asyncio.run(run())
    neutral = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert neutral.items() <= question.items()
    assert (question["temperature"], question["top_p"], question["max_tokens"]) == (0.5, 0.9, 6)
    assert question["seed"] == sampling_seed(7, "p3", 3, NO_VERSION) and question["prompt"] == [9, 10]
    assert question["stop_token_ids"] == list(ENDS) and question["stop"] == ["\n\n"]


def changed(**fields: Any) -> Callable[[Any], Any]:
    def spoil(answer: dict[str, Any]) -> dict[str, Any]:
        (choice,) = answer["choices"]
        return {"choices": [choice | {name: of(choice) for name, of in fields.items()}]}

    return spoil


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda _: {"choices": []}, "lacks what was asked"),
        (lambda _: [], "lacks what was asked"),
        (lambda _: web.Response(text="<html>"), "no JSON"),
        (lambda _: web.Response(status=500, text="out of memory"), "status 500"),
        (changed(token_ids=lambda c: c["token_ids"][:-1]), "rows of logprobs"),
        (changed(token_ids=lambda _: []), "got 0"),
        (changed(token_ids=lambda c: [*c["token_ids"][:-1], VOCABULARY]), "token id is"),
        (changed(token_ids=lambda c: [*c["token_ids"][:-1], 2**40]), "lacks what was asked"),
        (changed(logprobs=lambda c: {"token_logprobs": [0.5] * len(c["token_ids"])}), "above 0"),
        (changed(logprobs=lambda c: {"token_logprobs": [None] * len(c["token_ids"])}), "NaN|lacks what was asked"),
        (changed(prompt_token_ids=lambda _: [1]), "other token ids than were sent"),
        (changed(finish_reason=lambda _: "abort"), "neither 'stop' nor 'length'"),
    ],
)
def test_what_is_not_believable_is_one_sentence(model: Qwen3ForCausalLM, spoil: Any, sentence: str) -> None:
    with pytest.raises(OpdError, match=sentence):
        written(model, [request(0)], spoil=spoil)


def test_an_endpoint_without_token_ids_is_refused_and_not_asked_again(model: Qwen3ForCausalLM) -> None:
    asked = list[int]()

    def spoil(answer: dict[str, Any]) -> dict[str, Any]:
        asked.append(1)
        return changed(token_ids=lambda _: None)(answer)

    with pytest.raises(ConfigurationError, match="gives no token_ids"):
        written(model, [request(0)], spoil=spoil, retries=5)
    assert len(asked) == 1


def test_an_answer_that_fails_once_is_asked_for_again(model: Qwen3ForCausalLM) -> None:
    answers = iter([web.Response(status=503)])
    spoil = lambda answer: next(answers, answer)  # noqa: E731
    (text,) = written(model, [request(0)], spoil=spoil, retries=2)
    np.testing.assert_array_equal(text.token_ids, written(model, [request(0)])[0].token_ids)


@pytest.mark.parametrize(
    "asked",
    [
        request(0, topk=4),
        GenerateRequest(
            prompt_id="p",
            sample=0,
            context_ids=np.array([9], dtype=np.int32),
            sampling=Sampling(max_tokens=2),
            blend=TeacherBlend(teacher="default", budget=0.1),
        ),
    ],
)
def test_what_no_endpoint_has_is_refused_before_it_is_asked(model: Qwen3ForCausalLM, asked: GenerateRequest) -> None:
    with pytest.raises(DataError, match="writes over HTTP"):
        written(model, [asked])


def test_a_slow_endpoint_ends_in_a_sentence(model: Qwen3ForCausalLM, tmp_path: Path) -> None:
    async def slow(_: web.Request) -> web.Response:
        await asyncio.sleep(30)
        return web.Response()

    async def run() -> None:
        app = web.Application()
        app.router.add_post("/v1/completions", slow)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        config = TeacherConfig(path=str(tmp_path), backend=Backend.OPENAI, url=url, model="m", deadline_s=1.0)
        try:
            await OpenAIWriter(config, Ending(ids=ENDS), 0, "").generate([request(0)])
        finally:
            await runner.cleanup()

    with pytest.raises(OpdError, match=r"did not write a completion of 6 tokens at most within 1 s"):
        asyncio.run(run())
