"""Text written by a teacher behind an OpenAI-compatible completions endpoint that names token ids, such as vLLM's.

Asked with token ids and answered with them (`return_token_ids`), so nothing is tokenized anew. Every setting of
sampling is in the question: what it left out the server would take from the model's generation_config.json.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np

from opd.deadlines import within
from opd.errors import ConfigurationError, DataError, OpdError
from opd.ports import Completion, GenerateRequest
from opd.rollouts.seeds import sampling_seed
from opd.rollouts.validation import validate_completions
from opd.settings.secret import Secret
from opd.types import NO_VERSION, StopReason, TokenScores
from teacher_service.backends.openai import FRAME_BYTES, ROW_BYTES
from teacher_service.config import TeacherConfig
from teacher_service.retries import NoAnswer, RetryLoop, WrongAnswer, fetch, session, together

AT_ONCE = 64  # completions under way; the server batches them
_ENDED = {"stop": StopReason.END, "length": StopReason.LENGTH}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """End ids and stop strings of a completion; `rows` is the size of the vocabulary of logits."""

    ids: tuple[int, ...]
    texts: tuple[str, ...] = ()
    rows: int = 0


class OpenAIWriter:
    """`opd.ports.TextEngine` over a completions endpoint; the seed of a completion is that of an engine of ours."""

    def __init__(self, config: TeacherConfig, ending: Ending, seed: int, token: str) -> None:
        self._config, self._ending, self._seed, self._token = config, ending, seed, Secret(token)
        self._retries = RetryLoop(config)
        self._url = config.url.rstrip("/") + "/v1/completions"

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """One completion per request, in order.

        Raises:
            DataError: a request asks for what no such endpoint has.
            OpdError: the endpoint gives no believable completion, or none within `teacher.deadline_s` each.
        """
        for request in requests:
            if request.blend is not None or request.sampling.topk:
                what = "a blend with a student" if request.blend is not None else f"topk={request.sampling.topk}"
                raise DataError(
                    f"prompt {request.prompt_id!r} asks for {what}, but the teacher at {self._config.url} writes over "
                    "HTTP, with the log-probability of each token alone; use a teacher of this run"
                )
        gate = asyncio.Semaphore(AT_ONCE)
        async with session(self._config, self._token) as client:
            return await together([self._one(client, gate, request) for request in requests])

    async def _one(
        self, client: aiohttp.ClientSession, gate: asyncio.Semaphore, request: GenerateRequest
    ) -> Completion:
        late = OpdError(
            f"the teacher at {self._config.url} did not write a completion of {request.sampling.max_tokens} tokens at "
            f"most within {self._config.deadline_s:.0f} s; raise teacher.deadline_s, or add servers"
        )
        async with gate:
            return await within(self._config.deadline_s, self._retries(lambda _: self._attempt(client, request)), late)

    async def _attempt(self, client: aiohttp.ClientSession, request: GenerateRequest) -> Completion:
        question = self.question(request)
        room = FRAME_BYTES + ROW_BYTES * (request.sampling.max_tokens + len(request.context_ids))
        return _parsed(await fetch(client, "POST", self._url, room, json=question), request, self._ending.rows)

    def question(self, request: GenerateRequest) -> dict[str, Any]:
        """JSON of one completion's question."""
        sampling, ending = request.sampling, self._ending
        return {
            "model": self._config.model,
            "prompt": request.context_ids.tolist(),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": sampling_seed(self._seed, request.prompt_id, request.sample, NO_VERSION),
            "logprobs": 0,
            "return_token_ids": True,
            "stop_token_ids": list(ending.ids),
            "stop": list(ending.texts),
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
        }


def _parsed(body: bytes, request: GenerateRequest, rows: int) -> Completion:
    try:
        (choice,) = json.loads(body)["choices"]
        completion = _completion(choice, request)
    except json.JSONDecodeError as error:
        raise NoAnswer("the answer is no JSON") from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise WrongAnswer(f"the answer lacks what was asked ({type(error).__name__}: {error})") from error
    try:
        validate_completions([request], [completion], rows)
    except DataError as error:
        raise WrongAnswer(str(error)) from error
    return completion


def _completion(choice: Mapping[str, Any], request: GenerateRequest) -> Completion:
    ids = choice.get("token_ids")
    if ids is None:
        raise ConfigurationError(
            "the teacher's endpoint gives no token_ids for return_token_ids=true; use one that does (vLLM 0.10.2 or "
            "later), or a teacher.backend that runs here"
        )
    if choice.get("prompt_token_ids", None) not in (None, request.context_ids.tolist()):
        raise WrongAnswer("it went on from other token ids than were sent")
    if (reason := choice["finish_reason"]) not in _ENDED:
        raise WrongAnswer(f"finish_reason is {reason!r} and neither 'stop' nor 'length'")
    return Completion(
        token_ids=np.asarray(ids, dtype=np.int32),
        behavior=TokenScores(logprobs=np.asarray(choice["logprobs"]["token_logprobs"], dtype=np.float32)),
        versions=np.full(len(ids), NO_VERSION, dtype=np.int32),
        stop=_ENDED[reason],
    )
