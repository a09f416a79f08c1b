"""P1: cost of a scored token on the wire, in bytes and CPU: our frame, TRL's input, and plain JSON.

    python benchmarks/transport.py [rounds]

Each arm encodes the same answers (float32 log-probabilities, int32 ids) and decodes them back to arrays, both ends in
this process; arms take turns, the median and the spread (smallest to largest) of CPU time are printed. The floor is
what the arrays alone weigh, K ids and log-probabilities and one sampled token: 8 K + 4 bytes per token. Targets of the
project: at most 1.05 of the floor; at k=64 at least 50 times less CPU than base64 in JSON, 1,000 than lists.

The peer of today is TRL, whose trainers ask a vLLM server for `prompt_logprobs`: the arm has vLLM's own answer, written
by vLLM's own class, and reads it with TRL's own client (`pip install --no-deps --target FOLDER trl`, then
`PYTHONPATH=.:FOLDER`). Where either is not installed, the arm is left out.
"""

import base64
import json
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from statistics import median
from time import process_time_ns
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from opd.ports import TopK
from opd.types import TokenScores, TopKScores
from teacher_service.frames import FrameLimits, Reply, decode_reply, encode_reply

REQUESTS, TOKENS = 16, 256
LIMITS = FrameLimits()
TARGET_AT_64 = {"base64 in JSON": " (target 50)", "lists in JSON": " (target 1,000)"}
FIELDS = ("logprobs", "topk_ids", "topk_logprobs")


def answers(k: int) -> tuple[TopKScores, ...]:
    """Random scores of `REQUESTS` completions of `TOKENS` tokens."""
    random = np.random.default_rng(k)

    def one() -> TopKScores:
        values = -np.sort(random.exponential(3.0, (TOKENS, k)).astype(np.float32), axis=1)
        apart = 152_000 // k  # no id twice in a row: vLLM's answer is a mapping of ids
        ids = (random.integers(0, apart, (TOKENS, k)) + apart * np.arange(k)).astype(np.int32)
        return TopKScores(logprobs=values[:, 0].copy(), topk_ids=ids, topk_logprobs=values)

    return tuple(one() for _ in range(REQUESTS))


def frame(scores: Sequence[TokenScores]) -> bytes:
    digests = tuple(bytes(16) for _ in scores)
    kinds, answers = ((TopK,),) * len(scores), tuple((one,) for one in scores)
    return encode_reply(Reply(call=bytes(16), model=bytes(16), digests=digests, kinds=kinds, answers=answers))


def unframe(body: bytes) -> Sequence[TokenScores]:
    return [scores for (scores,) in decode_reply(body, LIMITS).answers if isinstance(scores, TokenScores)]


def base64_json(scores: Sequence[TokenScores]) -> bytes:
    def packed(array: np.ndarray) -> dict[str, Any]:
        data = base64.b64encode(array.tobytes()).decode()
        return {"data": data, "dtype": array.dtype.str, "shape": array.shape}

    return json.dumps([{f: packed(getattr(a, f)) for f in FIELDS} for a in scores]).encode()


def unbase64_json(body: bytes) -> Sequence[TokenScores]:
    def unpacked(value: dict[str, Any]) -> np.ndarray:
        return np.frombuffer(base64.b64decode(value["data"]), value["dtype"]).reshape(value["shape"])

    return [TopKScores(**{f: unpacked(a[f]) for f in FIELDS}) for a in json.loads(body)]


def list_json(scores: Sequence[TokenScores]) -> bytes:
    return json.dumps([{f: getattr(a, f).tolist() for f in FIELDS} for a in scores]).encode()


def unlist_json(body: bytes) -> Sequence[TokenScores]:
    types = {"logprobs": np.float32, "topk_ids": np.int32, "topk_logprobs": np.float32}
    return [TopKScores(**{f: np.asarray(a[f], types[f]) for f in FIELDS}) for a in json.loads(body)]


class Peer:
    """vLLM's answer to a request for `prompt_logprobs`, and TRL's client that reads it."""

    def __init__(self) -> None:
        from trl.generation.vllm_client import VLLMClient  # pyright: ignore[reportMissingImports]
        from vllm import __version__ as vllm_version
        from vllm.entrypoints.openai.completion.protocol import CompletionResponse, CompletionResponseChoice
        from vllm.entrypoints.serve.engine.protocol import UsageInfo
        from vllm.logprobs import Logprob

        self.name = f"vLLM {vllm_version}'s JSON, read by TRL {version('trl')}"
        self._client = VLLMClient
        self._response, self._choice, self._usage, self._logprob = (
            CompletionResponse, CompletionResponseChoice, UsageInfo, Logprob
        )  # fmt: skip

    def encode(self, scores: Sequence[TokenScores]) -> bytes:
        """The encoded answer; the sampled token is the likeliest one in `answers`, so it is no entry of its own."""

        def position(ids: np.ndarray, values: np.ndarray) -> dict[int, Any]:
            ranked = enumerate(zip(ids.tolist(), values.tolist(), strict=True), 1)
            return {i: self._logprob(logprob=value, rank=rank, decoded_token=None) for rank, (i, value) in ranked}

        def choice(number: int, answer: TopKScores) -> Any:
            rows = zip(answer.topk_ids, answer.topk_logprobs, strict=True)
            scored = [None, *(position(*row) for row in rows)]
            return self._choice(index=number, text="", finish_reason="length", prompt_logprobs=scored)

        choices = [choice(i, a) for i, a in enumerate(scores) if isinstance(a, TopKScores)]
        return self._response(model="teacher", choices=choices, usage=self._usage()).model_dump_json().encode()

    def decode(self, body: bytes) -> Sequence[TokenScores]:
        return [self._read(choice) for choice in json.loads(body)["choices"]]

    def _read(self, choice: dict[str, Any]) -> TopKScores:
        entries = choice["prompt_logprobs"]
        written = [0, *(int(next(iter(position))) for position in entries[1:])]
        read = self._client._format_sequence_logprobs(choice, written, 1, len(entries[1]))
        return TopKScores(
            logprobs=np.asarray(read["actual_logprobs"], np.float32)[:, 0],
            topk_ids=np.asarray(read["logprob_token_ids"], np.int32),
            topk_logprobs=np.asarray(read["logprobs"], np.float32),
        )


def add_peer() -> None:
    try:
        peer = Peer()
    except ImportError as error:
        print(f"TRL's arm is left out: {error}")
        return
    ARMS[peer.name] = (peer.encode, peer.decode)


Arm = tuple[Callable[[Sequence[TokenScores]], bytes], Callable[[bytes], Sequence[TokenScores]]]
ARMS: dict[str, Arm] = {
    "frame": (frame, unframe),
    "base64 in JSON": (base64_json, unbase64_json),
    "lists in JSON": (list_json, unlist_json),
}


def measure(k: int, rounds: int) -> dict[str, tuple[int, list[float]]]:
    """Per arm: bytes of the message, and CPU nanoseconds per token of encoding plus decoding, once per round."""
    scores = answers(k)
    sizes, spent = dict.fromkeys(ARMS, 0), {name: [] for name in ARMS}
    for turn in range(rounds + 1):
        for name, (encode, decode) in ARMS.items():
            repeats = 100 if name == "frame" else 1  # one frame takes less than the clock can tell
            body, back = b"", scores
            start = process_time_ns()
            for _ in range(repeats):
                body = encode(scores)
                back = decode(body)
            used = (process_time_ns() - start) / repeats / (REQUESTS * TOKENS)
            sizes[name] = len(body)
            _same(scores, back)
            if turn:  # the first is warm-up
                spent[name].append(used)
    return {name: (sizes[name], spent[name]) for name in ARMS}


def _same(scores: Sequence[Any], back: Sequence[Any]) -> None:
    for a, b in zip(scores, back, strict=True):
        assert all(np.array_equal(getattr(a, f), getattr(b, f)) for f in FIELDS), "an arm changed the numbers"


def main() -> None:
    """Measure at three depths and print."""
    add_peer()
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    table = Table(title=f"P1: {REQUESTS} x {TOKENS} tokens, {rounds} rounds, arms in turn")
    for heading in ("k", "arm", "bytes/token", "of the floor", "CPU ns/token (median, spread)", "CPU of a frame's"):
        table.add_column(heading, justify="right")
    for k in (1, 16, 64):
        measured = measure(k, rounds)
        floor, ours = 8 * k + 4, median(measured["frame"][1])
        for name, (size, used) in measured.items():
            per_token = size / (REQUESTS * TOKENS)
            spread = f"{median(used):,.1f} ({min(used):,.1f} to {max(used):,.1f})"
            target = TARGET_AT_64.get(name, "") if k == 64 else ""
            share = f"{per_token / floor:.3f}" + (" (target 1.05)" if name == "frame" else "")
            table.add_row(str(k), name, f"{per_token:.2f}", share, spread, f"{median(used) / ours:,.1f}x{target}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
