"""A completions endpoint that answers as vLLM's OpenAI-compatible server does (its `CompletionResponse`)."""

from typing import Any

import numpy as np
from aiohttp import web
from transformers import Qwen3ForCausalLM

from tests.tiny_models import logprobs


class CompletionsEndpoint:
    """`spoil` may change an answer before it is sent, or give a response of its own."""

    def __init__(self, model: Qwen3ForCausalLM) -> None:
        self._model = model
        self._runner: web.AppRunner | None = None
        self.asked: list[dict[str, Any]] = []
        self.spoil: Any = lambda answer: answer

    async def start(self) -> str:
        """Listen; returns the URL."""
        app = web.Application()
        app.router.add_post("/v1/completions", self._complete)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def close(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        self.asked.append(asked)
        if "prompt_logprobs" in asked:
            answer = {"choices": [self._choice(i, ids, asked) for i, ids in enumerate(asked["prompt"])]}
        else:
            answer = {"choices": [self._completion(asked)]}
        spoilt = self.spoil(answer)
        return spoilt if isinstance(spoilt, web.StreamResponse) else web.json_response(spoilt)

    def _choice(self, index: int, ids: list[int], asked: dict[str, Any]) -> dict[str, Any]:
        full = logprobs(self._model, np.asarray(ids, dtype=np.int32)).numpy()
        rows = [None, *(self._row(full[t], ids[t + 1], asked["prompt_logprobs"]) for t in range(len(ids) - 1))]
        return {"index": index, "text": "", "prompt_logprobs": rows, "prompt_token_ids": ids}

    def _completion(self, asked: dict[str, Any]) -> dict[str, Any]:
        """A sampled text; as in vLLM, a token id that ends it is its last one."""
        random = np.random.default_rng(asked["seed"])
        ids, of = list[int](asked["prompt"]), list[float]()
        reason = "length"
        while len(of) < asked["max_tokens"]:
            full = logprobs(self._model, np.asarray(ids, dtype=np.int32)).numpy()[-1].astype(np.float64)
            p = np.exp(full - full.max())
            token = int(full.argmax() if asked["temperature"] == 0 else random.choice(len(p), p=p / p.sum()))
            ids.append(token)
            of.append(float(full[token]))
            if token in asked["stop_token_ids"]:
                reason = "stop"
                break
        return {
            "index": 0,
            "text": "",
            "token_ids": ids[len(asked["prompt"]) :],
            "prompt_token_ids": asked["prompt"],
            "finish_reason": reason,
            "logprobs": {"token_logprobs": of, "tokens": [], "text_offset": [], "top_logprobs": []},
        }

    @staticmethod
    def _row(full: np.ndarray, written: int, k: int) -> dict[str, Any]:
        ranks = np.empty(len(full), dtype=int)
        order = np.argsort(-full, kind="stable")
        ranks[order] = np.arange(1, len(full) + 1)
        chosen = [written, *(i for i in order[:k].tolist() if i != written)]
        return {str(i): {"logprob": float(full[i]), "rank": int(ranks[i]), "decoded_token": None} for i in chosen}
