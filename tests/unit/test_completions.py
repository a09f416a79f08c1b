"""What vLLM hands back becomes a completion whose every token knows the weights that wrote it."""

from types import SimpleNamespace
from typing import Any

import pytest

from actors.engine import _completion
from opd.errors import DataError
from opd.ports import Sampling

Spans = list[tuple[int, int, str]]


def output(tokens: int, spans: Spans | None) -> Any:
    """As vLLM's `RequestOutput`, as far as it is read."""
    flat = SimpleNamespace(logprobs=[-0.5] * tokens, token_ids=list(range(tokens)))
    labels = spans and [SimpleNamespace(start=a, end=b, version=label) for a, b, label in spans]
    one = SimpleNamespace(
        token_ids=list(range(tokens)), logprobs=flat, weight_versions=labels, finish_reason="length"
    )  # fmt: skip
    return SimpleNamespace(outputs=[one])


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
    made = _completion(output(4, spans), Sampling(max_tokens=4))
    assert made.versions.tolist() == versions and made.digests == digests


@pytest.mark.parametrize("spans", [None, [], [(0, 3, "3:aa")], [(1, 4, "3:aa")], [(0, 1, "3:aa"), (2, 4, "4:bb")]])
def test_tokens_without_a_version_are_refused(spans: Spans | None) -> None:
    with pytest.raises(DataError, match=r"vLLM wrote 4 tokens but says only of the first [013] which weights"):
        _completion(output(4, spans), Sampling(max_tokens=4))
