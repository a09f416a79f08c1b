"""Engines of many families compute with new weights what the learner does: every such row of docs/models.md.

One process for all of them: an engine of a tiny model takes a second or two, importing vLLM ten.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tests.fuzz.outcomes import ROWS

WORKS = [family for family, row in ROWS.items() if not row.student]
OLD = "gpt-oss"
FAST = [family for family in WORKS if ROWS[family].fast]


def outcomes(families: Sequence[str]) -> Mapping[str, Mapping[str, Any]]:
    """What `tests.fuzz.engines` prints of `families`."""
    command = [sys.executable, "-m", "tests.fuzz.engines", *(f"family={family}" for family in families)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(families), done.stderr[-3000:]
    return {line["family"]: line for line in lines}


@pytest.mark.parametrize(
    "families", [pytest.param(FAST, id="fast"), pytest.param(WORKS, id="all", marks=pytest.mark.slow)]
)
def test_an_engine_computes_with_new_weights_what_the_learner_does(families: Sequence[str]) -> None:
    """The folder's own, all of them changed, and the first again; 80 tokens, float32, in nats.

    One that would go on with old values says so: gpt-oss, which the plan refuses before.
    """
    found = dict(outcomes([*families, OLD]))
    assert "'model.layers.0.attn.sinks'" in found[OLD]["error"] and "would keep old values" in found.pop(OLD)["error"]
    for family, outcome in found.items():
        assert "error" not in outcome, outcome
        assert max(outcome["gaps"]) < 1e-5, (family, outcome["gaps"])
