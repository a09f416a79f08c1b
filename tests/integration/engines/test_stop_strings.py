"""Texts that end completions, on a real vLLM: trained is what was generated, up to the token that completes one."""

import os

from actors.config import StudentConfig, environment
from opd.settings.devices import Device, Dtype

os.environ |= environment(Device.CPU)  # before anything imports vLLM

import asyncio
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from actors.engine import VLLMEngine
from hf.tokenizer import HuggingFaceTokenizer
from opd.ports import Completion, GenerateRequest, Sampling
from opd.types import StopReason
from tests.unit.inputs.chat.families import checkpoint

LONGEST = 40
REQUESTS = [
    GenerateRequest(
        prompt_id=str(i // 4),
        sample=i % 4,
        context_ids=np.array([60 + i // 4, 70], dtype=np.int32),
        sampling=Sampling(max_tokens=LONGEST, topk=2),
    )
    for i in range(24)
]


async def _generate(*stop: str) -> list[Completion]:
    config = StudentConfig(
        path=checkpoint("qwen3"), max_model_len=96, device=Device.CPU, dtype=Dtype.FLOAT32, stop=stop
    )
    engine = VLLMEngine(config, 7, lambda handle: handle())
    try:
        return await engine.generate(REQUESTS)
    finally:
        await engine.close()


def _first_end(text: Sequence[str], stop: Sequence[str]) -> int:
    """Tokens up to the one that completes a stop string; all of them if none does."""
    whole = ["".join(text[: i + 1]) for i in range(len(text))]
    return next((i + 1 for i, so_far in enumerate(whole) if any(one in so_far for one in stop)), len(text))


def test_a_completion_ends_with_the_token_that_completes_a_stop_string() -> None:
    """And is, token for token and with every log-probability, the beginning of what is generated without one."""
    free = asyncio.run(_generate())
    words = HuggingFaceTokenizer(checkpoint("qwen3"))
    texts = [[words.token(i) for i in c.token_ids.tolist()] for c in free]
    plain = [t for c in texts for t in pairwise(c[3:]) if all(len(x) == 1 and x.isascii() for x in t)]
    stop = ("".join(plain[0]), "".join(plain[7]), "<|im_start|>")
    ended = asyncio.run(_generate(*stop))
    cut = 0
    for whole, part, text in zip(free, ended, texts, strict=True):
        tokens = _first_end(text, stop)
        assert part.token_ids.tolist() == whole.token_ids[:tokens].tolist()
        np.testing.assert_array_equal(part.behavior.logprobs, whole.behavior.logprobs[:tokens])
        np.testing.assert_array_equal(part.behavior.topk_ids, whole.behavior.topk_ids[:tokens])
        assert len(part.versions) == tokens
        cut += tokens < len(text)
        assert part.stop is (StopReason.END if tokens < len(text) else whole.stop) or tokens == LONGEST
    assert cut > 1
