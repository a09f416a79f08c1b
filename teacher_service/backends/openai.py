"""A teacher behind any OpenAI-compatible completions endpoint that gives `prompt_logprobs`, such as vLLM's own.

Asked with token ids, `max_tokens=1` and `prompt_logprobs=k`, so nothing is tokenized anew. Such an endpoint ranks its
own tokens at every position and adds the sampled one; it cannot score ids it is given, and has no hidden states. Rows
are objects keyed by token id, so a shifted row is one that lacks its token.
"""

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any

import aiohttp
import numpy as np

from hf.tokenizer_check import tokenizer_identity
from opd.deadlines import within
from opd.errors import ConfigurationError, DataError, OpdError
from opd.ports import ScoreAnswer, ScoreRequest, TopK
from opd.scorers.validation import validate_scores
from opd.settings.secret import Secret
from teacher_service.config import TeacherConfig, check_supports
from teacher_service.ranked_tokens import most_ids, ranked
from teacher_service.retries import NoAnswer, RetryLoop, WrongAnswer, fetch, session, together
from teacher_service.scoring import Bounds, Store, TeacherStats, kinds_of, length

PROMPTS = 64  # per exchange
ROW_BYTES = 160  # of JSON per log-probability, generously
FRAME_BYTES = 1 << 20  # of JSON around them
AT_ONCE = 4


class OpenAITeacher:
    """`opd.ports.LogprobTeacher` over a completions endpoint; answers `SampledToken` and `TopK`.

    Such an endpoint cannot say which weights it holds: `teacher.model` is only a name.
    """

    def __init__(self, config: TeacherConfig, store: Store, token: str) -> None:
        self._config, self._token = config, Secret(token)
        self._retries = RetryLoop(config)
        vocabulary = tokenizer_identity(config.path).rows
        self._bounds = Bounds(
            vocabulary=vocabulary,
            longest=config.max_batch_tokens,
            max_k=config.max_k,
            limits="teacher.max_batch_tokens; shorten it or raise the limit",
        )
        self._requests = self._scored = self._read = 0
        self._busy_s = 0.0

    async def ready(self) -> None:
        """Return when the endpoint has scored a text. Raises what is wrong with it otherwise."""
        ids = np.arange(1, 4, dtype=np.int32)
        await self.score([ScoreRequest(context_ids=ids[:1], token_ids=ids[1:], kinds=(TopK(k=1),))])

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreAnswer]:
        """Scores per request, in order. Raises `OpdError` when the endpoint gives no believable one."""
        check_supports(self._config, kinds_of(requests), "a scorer")
        self._bounds.check(requests)
        start = perf_counter()
        late = OpdError(
            f"the teacher at {self._config.url} did not score {len(requests)} completions within "
            f"{self._config.deadline_s:.0f} s; raise teacher.deadline_s, or add servers"
        )
        answers = await within(self._config.deadline_s, self._score(requests), late)
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

    async def _score(self, requests: Sequence[ScoreRequest]) -> list[ScoreAnswer]:
        answers: list[ScoreAnswer | None] = [None] * len(requests)
        gate = asyncio.Semaphore(AT_ONCE)
        async with session(self._config, self._token) as client:

            async def one(places: list[int]) -> None:
                part = [requests[i] for i in places]
                async with gate:
                    scored = await self._retries(lambda _: self._attempt(client, part))
                for place, answer in zip(places, scored, strict=True):
                    answers[place] = answer

            await together([one(places) for places in exchanges(requests, self._config.max_batch_tokens)])
        return [answer for answer in answers if answer is not None]

    async def _attempt(self, client: aiohttp.ClientSession, part: Sequence[ScoreRequest]) -> list[ScoreAnswer]:
        question = {
            "model": self._config.model,
            "prompt": [[*r.context_ids.tolist(), *r.token_ids.tolist()] for r in part],
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": most_ids(part[0]),
            "return_token_ids": True,
        }
        url = self._config.url.rstrip("/") + "/v1/completions"
        return _parsed(await fetch(client, "POST", url, room(part), json=question), part)


def exchanges(requests: Sequence[ScoreRequest], budget: int) -> Iterator[list[int]]:
    """Places of requests that travel together: equal k, at most `PROMPTS` and `budget` tokens."""
    part: list[int] = []
    tokens = 0
    for i in sorted(range(len(requests)), key=lambda i: (most_ids(requests[i]), i)):
        size = length(requests[i]) + 1
        if part and (
            len(part) == PROMPTS or tokens + size > budget or most_ids(requests[part[0]]) != most_ids(requests[i])
        ):
            yield part
            part, tokens = [], 0
        part.append(i)
        tokens += size
    if part:
        yield part


def room(part: Sequence[ScoreRequest]) -> int:
    """The most bytes that the answer to one exchange may have: the sampled token and the top-k at every position."""
    return FRAME_BYTES + ROW_BYTES * sum((most_ids(r) + 1) * (length(r) + 1) for r in part)


def _parsed(body: bytes, part: Sequence[ScoreRequest]) -> list[ScoreAnswer]:
    try:
        choices = {c["index"]: c for c in json.loads(body)["choices"]}
        answers = [_answer(request, choices[i]) for i, request in enumerate(part)]
    except json.JSONDecodeError as error:
        raise NoAnswer("the answer is no JSON") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise WrongAnswer(f"the answer lacks what was asked ({type(error).__name__}: {error})") from error
    try:
        validate_scores(part, answers)
    except DataError as error:
        raise WrongAnswer(str(error)) from error
    return answers


def _answer(request: ScoreRequest, choice: Mapping[str, Any]) -> ScoreAnswer:
    rows = choice["prompt_logprobs"]
    if rows is None:
        raise ConfigurationError(
            "the teacher's endpoint gives no prompt_logprobs; use one that does (vLLM), or teacher.backend=HTTP"
        )
    ids = [*request.context_ids.tolist(), *request.token_ids.tolist()]
    if choice.get("prompt_token_ids", ids) not in (ids, None):
        raise WrongAnswer("it scored other token ids than were sent")
    if len(rows) != len(ids):
        raise WrongAnswer(f"it scored {len(rows)} positions of {len(ids)}")
    rows = rows[len(request.context_ids) :]
    sampled = [row[str(token)]["logprob"] for row, token in zip(rows, request.token_ids.tolist(), strict=True)]
    logprobs = np.asarray(sampled, dtype=np.float32)
    k = most_ids(request)
    best = [sorted(((-e["logprob"], int(token)) for token, e in row.items()))[:k] for row in rows]
    ids = np.asarray([[token for _, token in row] for row in best], dtype=np.int32).reshape(len(best), k)
    values = np.asarray([[-minus for minus, _ in row] for row in best], dtype=np.float32).reshape(len(best), k)
    return tuple(ranked(kind, logprobs, ids, values) for kind in request.kinds)
