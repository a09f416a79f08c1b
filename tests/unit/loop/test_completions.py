"""What vLLM hands back becomes a completion whose every token knows the weights that wrote it, and is checked."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from actors.engine import _completion
from opd.errors import DataError
from opd.ports import Completion, GenerateRequest, Sampling
from opd.rollouts.validation import validate_completions
from opd.types import StopReason, TokenScores, TopKScores

Spans = list[tuple[int, int, str]]


def output(tokens: int, spans: Spans | None) -> Any:
    """As vLLM's `RequestOutput`, as far as it is read."""
    flat = SimpleNamespace(logprobs=[-0.5] * tokens, token_ids=list(range(tokens)))
    labels = spans and [SimpleNamespace(start=a, end=b, version=label) for a, b, label in spans]
    one = SimpleNamespace(
        token_ids=list(range(tokens)), logprobs=flat, weight_versions=labels, finish_reason="length"
    )  # fmt: skip
    return SimpleNamespace(outputs=[one])


ASKED = GenerateRequest(
    prompt_id="p", sample=0, context_ids=np.ones(1, dtype=np.int32), sampling=Sampling(max_tokens=4)
)


@pytest.mark.parametrize(
    ("spans", "versions", "digests"),
    [
        ([(0, 4, "3:aa")], [3, 3, 3, 3], {3: "aa"}),
        ([(0, 1, "3:aa"), (1, 4, "5:cc")], [3, 5, 5, 5], {3: "aa", 5: "cc"}),
        ([(0, 2, "0:"), (2, 4, "1:bb")], [0, 0, 1, 1], {0: "", 1: "bb"}),
        ([(0, 2, "3:aa"), (2, 4, "3:bb")], [3, 3, 3, 3], {3: "aa+bb"}),
    ],
)
def test_every_token_has_the_version_of_its_span(spans: Spans, versions: list[int], digests: dict[int, str]) -> None:
    made = _completion(output(4, spans), ASKED)
    assert made.versions.tolist() == versions and made.digests == digests


@pytest.mark.parametrize("spans", [None, [], [(0, 3, "3:aa")], [(1, 4, "3:aa")], [(0, 1, "3:aa"), (2, 4, "4:bb")]])
def test_tokens_without_a_version_are_refused(spans: Spans | None) -> None:
    with pytest.raises(DataError, match=r"vLLM wrote 4 tokens but says only of the first [013] which weights"):
        _completion(output(4, spans), ASKED)


ROWS, TOKENS, K = 11, 7, 3


def asked(top_p: float = 1.0, topk: int = K) -> GenerateRequest:
    sampling = Sampling(max_tokens=TOKENS, topk=topk, top_p=top_p)
    return GenerateRequest(prompt_id="p", sample=0, context_ids=np.array([1], dtype=np.int32), sampling=sampling)


def honest(seed: int, top_p: float = 1.0) -> Completion:
    """What a right engine says of a text that it sampled, cut to the nucleus if `top_p` < 1."""
    draw = np.random.default_rng(seed)
    full = np.exp(draw.normal(size=(TOKENS, ROWS)) * draw.choice([0.1, 1, 5])).astype(np.float64)
    full /= full.sum(axis=1, keepdims=True)
    if top_p < 1:
        order = np.argsort(-full, axis=1)
        before = np.cumsum(np.take_along_axis(full, order, 1), axis=1) - np.take_along_axis(full, order, 1)
        np.put_along_axis(full, order, np.where(before < top_p, np.take_along_axis(full, order, 1), 0.0), 1)
        full /= full.sum(axis=1, keepdims=True)
    ids = np.array([draw.choice(ROWS, p=row) for row in full], dtype=np.int32)
    with np.errstate(divide="ignore"):
        logprobs = np.log(full).astype(np.float32)
    best = np.argsort(-logprobs, axis=1, kind="stable")[:, :K].astype(np.int32)
    behavior = TopKScores(
        logprobs=logprobs[np.arange(TOKENS), ids],
        topk_ids=best,
        topk_logprobs=np.take_along_axis(logprobs, best, 1),
    )
    versions = np.zeros(TOKENS, dtype=np.int32)
    return Completion(token_ids=ids, behavior=behavior, versions=versions, stop=StopReason.LENGTH)


@given(seed=st.integers(0, 500), top_p=st.sampled_from([1.0, 0.9, 0.3]))
def test_an_honest_engine_is_believed(seed: int, top_p: float) -> None:
    """In the numbers of both dtypes."""
    whole = honest(seed, top_p)
    behavior: Any = whole.behavior
    narrow = {
        name: torch.from_numpy(getattr(behavior, name)).bfloat16().float().numpy()
        for name in ("logprobs", "topk_logprobs")
    }
    for said in (behavior, replace(behavior, **narrow), TokenScores(logprobs=behavior.logprobs)):
        topk = K if isinstance(said, TopKScores) else 0
        validate_completions([asked(top_p, topk)], [replace(whole, behavior=said)], ROWS)


def _set(array: np.ndarray, at: Any, value: float) -> np.ndarray:
    changed = array.copy()
    changed[at] = value
    return changed


Damage = Callable[[Completion, int], Completion]


def _said(**changes: Callable[[Any, int], np.ndarray]) -> Damage:
    def damage(whole: Completion, at: int) -> Completion:
        new = {name: change(whole.behavior, at) for name, change in changes.items()}
        return replace(whole, behavior=replace(whole.behavior, **new))

    return damage


DAMAGES: dict[str, tuple[Damage, str]] = {
    "nan": (_said(logprobs=lambda b, at: _set(b.logprobs, at, np.nan)), "log-probability of token . is nan"),
    "sampled of probability 0": (_said(logprobs=lambda b, at: _set(b.logprobs, at, -np.inf)), "is -inf"),
    "infinite": (_said(logprobs=lambda b, at: _set(b.logprobs, at, np.inf)), "is inf"),
    "above 0": (_said(logprobs=lambda b, at: _set(b.logprobs, at, 0.7)), "is 0.7"),
    "top-k nan": (_said(topk_logprobs=lambda b, at: _set(b.topk_logprobs, (at, 1), np.nan)), "of a top-k is NaN"),
    "top-k infinite": (_said(topk_logprobs=lambda b, at: _set(b.topk_logprobs, (at, 2), -np.inf)), "of a top-k is NaN"),
    "top-k unsorted": (_said(topk_logprobs=lambda b, at: b.topk_logprobs[:, ::-1].copy()), "likeliest"),
    "top-k unsorted at its end": (
        _said(
            topk_logprobs=lambda b, at: b.topk_logprobs[:, [0, 2, 1]], topk_ids=lambda b, at: b.topk_ids[:, [0, 2, 1]]
        ),
        "likeliest",
    ),
    "top-k of the next token": (
        _said(
            topk_logprobs=lambda b, at: np.roll(b.topk_logprobs, 1, axis=0),
            topk_ids=lambda b, at: np.roll(b.topk_ids, 1, axis=0),
        ),
        "shifted rows",
    ),
    "top-k names one twice": (
        _said(
            topk_ids=lambda b, at: _set(b.topk_ids, (at, 1), b.topk_ids[at, 0]),
            topk_logprobs=lambda b, at: _set(b.topk_logprobs, (at, 1), b.topk_logprobs[at, 0]),
        ),
        "twice|sum to more|shifted|likeliest",
    ),
    "a row less": (
        lambda whole, at: replace(
            whole,
            behavior=TopKScores(
                logprobs=np.asarray(whole.behavior.logprobs)[:-1],
                topk_ids=whole.behavior.topk_ids[:-1],  # type: ignore[union-attr]
                topk_logprobs=whole.behavior.topk_logprobs[:-1],  # type: ignore[union-attr]
            ),
        ),
        "rows of logprobs",
    ),
    "ids beyond the vocabulary": (
        _said(topk_ids=lambda b, at: _set(b.topk_ids, (at, 0), ROWS)),
        "but the model has 11",
    ),
    "ids below it": (_said(topk_ids=lambda b, at: _set(b.topk_ids, (at, 0), -1)), "negative"),
    "another token": (
        lambda whole, at: replace(whole, token_ids=_set(whole.token_ids, at, (whole.token_ids[at] + 1) % ROWS)),
        "shifted rows",
    ),
    "a token that is none": (
        lambda whole, at: replace(whole, token_ids=_set(whole.token_ids, at, ROWS)),
        "but the model",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
@given(seed=st.integers(0, 100), at=st.integers(0, TOKENS - 1))
def test_what_an_engine_cannot_have_said_is_refused(name: str, seed: int, at: int) -> None:
    damage, sentence = DAMAGES[name]
    wrong = damage(honest(seed), at)
    if "shifted" in sentence and "twice" not in sentence:  # by chance two rows may say nearly the same
        assume(_tells(wrong))
    with pytest.raises(DataError, match=f"completion of prompt 'p' is refused.*({sentence})"):
        validate_completions([asked()], [wrong], ROWS)


def _tells(wrong: Completion) -> bool:
    said: Any = wrong.behavior
    inside = said.topk_ids == wrong.token_ids[:, None]
    other = (np.abs(said.topk_logprobs - said.logprobs[:, None]) > 0.01) & inside
    likelier = ~inside.any(1) & (said.logprobs > said.topk_logprobs.min(1) + 0.01)
    return bool(other.any() or likelier.any())


@pytest.mark.parametrize("count", [0, 1, 3])
def test_as_many_completions_as_were_asked_for_or_none(count: int) -> None:
    with pytest.raises(DataError, match=f"an engine gave {count} completions for 2 requests"):
        validate_completions([asked(), asked()], [honest(1)] * count, ROWS)


AT_THE_BOUNDS: dict[str, tuple[dict[str, Any], bool]] = {
    "a token": ({"tokens": 1}, True),
    "no token": ({"tokens": 0}, False),
    "as many tokens as were asked for": ({"tokens": TOKENS}, True),
    "one more": ({"tokens": TOKENS + 1}, False),
    "the first id": ({"id": 0}, True),
    "an id below it": ({"id": -1}, False),
    "the last id": ({"id": ROWS - 1}, True),
    "an id beyond it": ({"id": ROWS}, False),
    "an id beyond it of a model of unknown size": ({"id": ROWS, "rows": 0}, True),
    "as many of the likeliest": ({"k": K}, True),
    "one more of them": ({"k": K + 1}, True),
    "one less of them": ({"k": K - 1}, False),
    "certain": ({"logprob": 0.0, "other": -9.0}, True),
    "alike": ({"logprob": -1.5, "other": -1.5}, True),
    "impossible beside it": ({"other": -np.inf}, False),
    "impossible beside it in a nucleus": ({"other": -np.inf, "top_p": 0.9}, True),
}


@pytest.mark.parametrize("case", AT_THE_BOUNDS)
def test_what_lies_at_a_bound_is_believed_and_what_lies_beyond_is_refused(case: str) -> None:
    given, true = AT_THE_BOUNDS[case]
    tokens, k, id, logprob = given.get("tokens", 3), given.get("k", K), given.get("id", 2), given.get("logprob", -0.5)
    ids = np.tile(np.array([id, *[i for i in range(ROWS) if i != id][: k - 1]], dtype=np.int32), (tokens, 1))
    values = np.full((tokens, k), given.get("other", -4.0), dtype=np.float32)
    values[:, :1] = logprob
    behavior = TopKScores(
        logprobs=np.full(tokens, logprob, dtype=np.float32),
        topk_ids=ids,
        topk_logprobs=values,
        rest=np.full(tokens, -2.0, dtype=np.float32),
    )
    made = Completion(
        token_ids=np.full(tokens, id, dtype=np.int32),
        behavior=behavior,
        versions=np.zeros(tokens, dtype=np.int32),
        stop=StopReason.END,
    )
    for topk, said in ((K, behavior), (0, TokenScores(logprobs=behavior.logprobs))):
        request, whole = asked(given.get("top_p", 1.0), topk), replace(made, behavior=said)
        if true or (not topk and {"k", "other"} & given.keys()):
            validate_completions([request], [whole], given.get("rows", ROWS))
            continue
        with pytest.raises(DataError, match="completion of prompt 'p' is refused"):
            validate_completions([request], [whole], given.get("rows", ROWS))
