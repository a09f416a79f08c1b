"""The run of examples/maths for real, with small random models of its family and its vocabulary."""

import json
from pathlib import Path

import pytest

from tests.hollow_models import ends, tokenizer
from tests.hub_stand_in import Files, hub_stand_in
from tests.integration.runs.test_hub import command
from tests.tiny_models import tiny_model
from tests.unit.hub.test_adopter import FROM_YAML, VOCABULARY, add_data

SMALLER = ["steps=1", "max_tokens=6", "student.max_model_len=512", "prompts.prompts_per_step=2"]
SMALLER += ["evaluation.sets.math500.subset=2", "evaluation.sets.aime24.subset=2", "evaluation.teacher=false"]
SMALLER += ["doctor=false", "tracker=none"]


def small(seed: int, folder: Path) -> Files:
    """A random Qwen3 with 151,936 rows, two layers of width 64 and the tokenizer of the published size."""
    words = tokenizer(VOCABULARY)
    turn, text = ends(words)
    model = tiny_model(seed, std=0.05, positions=4096, vocab_size=151_936, eos_token_id=turn, bos_token_id=text)
    model.bfloat16().save_pretrained(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()} | words


@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_the_run_of_the_example_trains(tmp_path: Path) -> None:
    with hub_stand_in() as hub:
        for seed, name in enumerate(("Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B")):
            hub.add("model", name, small(seed, tmp_path / str(seed)))
        add_data(hub)
        run = ["train", *FROM_YAML, *SMALLER, f"output_dir={tmp_path}", "run_name=a"]
        done = command(hub, tmp_path / "home", *run)
        assert done.returncode == 0, done.stderr
        assert not hub.wrong
    (step,) = map(json.loads, (tmp_path / "a" / "metrics.jsonl").read_text().splitlines())
    assert step["distill/reverse_kl"] > 0 and step["actor/grad_norm"] > 0
    points = [json.loads(line) for line in (tmp_path / "a" / "evaluations.jsonl").read_text().splitlines()]
    assert [(point["step"], point["set"]) for point in points] == [
        (s, n) for s in (0, 1) for n in ("math500", "aime24")
    ]
    assert {"mean_at_4", "pass_at_4", "maj_at_4"} <= points[0]["estimates"].keys() and "maj_at_16" in points[1][
        "estimates"
    ]
    exported = json.loads((tmp_path / "a" / "export" / "config.json").read_text())
    assert exported["vocab_size"] == 151_936 and exported["model_type"] == "qwen3"
