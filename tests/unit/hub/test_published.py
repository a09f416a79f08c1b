"""Published recipes: each is planned whole by its names on the hub, models of their shapes as headers alone."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import close_session

from demos.prompts.open_thoughts import first_exchange
from launch.cli.stages import stages_of
from launch.config.composition.compose import compose
from launch.config.run_config import run_config
from launch.config.shipped_files import option_files
from launch.plan.checks.devices import gpus, roles
from launch.plan.plan import Plan, make_plan
from tests.command import ROOT
from tests.hollow_models import gpt2, hollow, qwen2, qwen3, qwen3_moe
from tests.hub_stand_in import HubStandIn, hub_stand_in
from tests.records import with_row
from tests.unit.hub.conftest import use
from tests.unit.hub.test_adopter import rows

RECIPES = {name: file for name, file in option_files()["experiment"].items() if name.startswith("published/")}
PAGE = ROOT / "docs" / "recipes.md"
# Published shapes of the models that recipes name.
SMALL = qwen3(2048, 28, 16, 6144, tied=True)
MIDDLE = qwen3(2560, 36, 32, 9728, tied=True)
LARGE = qwen3(4096, 36, 32, 12_288, tied=False)
DISTILLED = qwen2(1536, 28, 12, 2, 8960, rows=151_936)
SEVEN = qwen2(3584, 28, 28, 4, 18_944, rows=152_064)
MODELS: Mapping[str, Mapping[str, Any]] = {
    "Qwen/Qwen3-1.7B": SMALL,
    "Qwen/Qwen3-1.7B-Base": SMALL,
    "Qwen/Qwen3-4B": MIDDLE,
    "Keven16/Qwen3-4B-Non-Thinking-RL-Math-Step500": MIDDLE,
    "Qwen/Qwen3-8B": LARGE,
    "Qwen/Qwen3-8B-Base": LARGE,
    "Qwen/Qwen3-32B": qwen3(5120, 64, 64, 25_600, tied=False),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": qwen3_moe(2048, 48, 32, 4, experts=128, inner=768),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": DISTILLED,
    "hbx/JustRL-DeepSeek-1.5B": DISTILLED,
    "Qwen/Qwen2.5-7B-Instruct": SEVEN,
    "open-thoughts/OpenThinker3-7B": SEVEN,
    "Skywork/Skywork-OR1-Math-7B": SEVEN,
    "MiniLLM/SFT-gpt2-120M": gpt2(768, 12, 12),
    "MiniLLM/teacher-gpt2-1.5B": gpt2(1600, 48, 25),
}
TURNS = [{"role": "user", "content": "Say #."}, {"role": "assistant", "content": "#"}]
THOUGHTS = [{"from": "human", "value": "What is #?"}, {"from": "gpt", "value": "<think>...</think> #"}]
# Columns of the data sets that recipes name; a # is the number of the row.
DATA: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "open-r1/DAPO-Math-17k-Processed": (
        "en/train",
        {"prompt": "What is #?", "solution": "#", "reward_model": {"ground_truth": "#", "style": "rule"}},
    ),
    "zwhe99/DeepMath-103K": (
        "train",
        {"question": "Find #.", "final_answer": "#", "difficulty": 7.0, "topic": "Algebra"},
    ),
    "open-thoughts/OpenThoughts3-1.2M": ("train", {"domain": "math", "difficulty": 9, "conversations": THOUGHTS}),
    "allenai/tulu-3-sft-mixture": ("train", {"id": "#", "messages": TURNS, "source": "x"}),
    "agentica-org/DeepScaleR-Preview-Dataset": ("train", {"problem": "Find #.", "answer": "#", "solution": "It is #."}),
    "siyanzhao/Openthoughts_math_30k_opsd": ("train", {"problem": "Find #.", "solution": "It is \\boxed{#}."}),
    "databricks/databricks-dolly-15k": (
        "train",
        {"instruction": "Say #.", "context": "", "response": "#", "category": "open_qa"},
    ),
    "HuggingFaceH4/aime_2024": ("train", {"problem": "Solve for #.", "solution": "#", "answer": "#", "year": "2024"}),
    "HuggingFaceH4/MATH-500": ("test", {"problem": "Solve for #.", "solution": "#", "answer": "#", "level": 1}),
    "google/IFEval": ("train", {"key": 1, "prompt": "Write about #.", "instruction_id_list": ["x"]}),
}


@contextmanager
def served(home: Path) -> Iterator[HubStandIn]:
    """A hub with everything that recipes name."""
    with hub_stand_in() as hub, pytest.MonkeyPatch.context() as patch:
        use(patch, hub.url, home)
        for name, config in MODELS.items():
            hub.add("model", name, hollow(config))
        for name, (file, columns) in DATA.items():
            config, _, split = file.rpartition("/")
            files = f"data_files: [{{split: {split}, path: data.jsonl}}]"
            head = f"---\nconfigs:\n- config_name: {config or 'default'}\n  {files}\n---\n"
            hub.add("dataset", name, {"data.jsonl": rows(12, **columns), "README.md": head.encode()})
        yield hub
        close_session()
    assert not hub.wrong


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubStandIn]:
    with served(tmp_path_factory.mktemp("home")) as hub:
        yield hub


def plans(name: str) -> list[Plan]:
    """Plans of a recipe: one, or one of each stage."""
    given = [f"experiment={name}", "dry_run=true", "tracker=none"]
    stages = [stage.overrides for stage in stages_of(compose(given), given)] or [()]
    return [make_plan(run_config([*given, *own, "stages=null"])) for own in stages]


def said(name: str) -> Mapping[str, str]:
    """What the comment at the top of a recipe says, by its first word."""
    lines, found, word = RECIPES[name].read_text().splitlines(), dict[str, str](), "Title"
    for line in [line[2:] for line in lines[1:] if line.startswith("# ")]:
        label = re.match(r"(Source|Reported|Published[\w ]*): ", line)
        word = label[1].split()[0] if label else "Last" if line == "Not run here." else word
        text = line.removeprefix(label[0]) if label else line
        found[word] = f"{found[word]} {text}" if word in found else text
    return found


def hardware(planned: Sequence[Plan]) -> str:
    """Devices of the stage that asks for most of them, and what a learner rank needs there at its peak."""
    most = max(planned, key=lambda plan: sum(role.count * role.gpus for role in roles(plan.config)))
    memory = most.memory_bytes()["learner rank"] / 2**30
    return f"{gpus(most.config).partition(';')[0]}; {memory:.0f} GiB"


def row(name: str, planned: Sequence[Plan]) -> str:
    """A recipe's row in docs/recipes.md."""
    told = said(name)
    return f"| `{name}` | {told['Title']} | {told['Source']} | {told['Reported']} | {hardware(planned)} |"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_planned_and_told_in_the_docs(name: str, published: HubStandIn) -> None:
    planned = plans(name)
    told = said(name)
    assert told.keys() == {"Title", "Source", "Reported", "Published", "Last"} and told["Last"] == "Not run here."
    for plan in planned:
        assert {one.pinned.partition("@")[0].partition(":")[0] for one in plan.hub} <= {*MODELS, *DATA}
        assert len(plan.hub) >= 4 and plan.config.cluster.address == "auto"
        assert not [note for note in plan.remarks if "trained on" in note and "minillm" not in name]
    written = row(name, planned)
    assert written in PAGE.read_text(), f"{written}: record it with `python -m tests.records`"


def record(home: Path) -> None:
    """Write the rows of docs/recipes.md."""
    with served(home):
        for name in RECIPES:
            with_row(PAGE, row(name, plans(name)))


def test_every_row_is_of_a_recipe() -> None:
    assert set(re.findall(r"^\| `(published/\w+)`", PAGE.read_text(), re.M)) == RECIPES.keys()


def test_a_row_of_open_thoughts_is_a_prompt_and_an_answer() -> None:
    record = {"domain": "math", "conversations": THOUGHTS}
    assert first_exchange(record) == {**record, "prompt": "What is #?", "answer": "<think>...</think> #"}
    for wrong in ({}, {"conversations": []}, {"conversations": THOUGHTS[::-1]}, {"conversations": "x"}):
        with pytest.raises(ValueError, match="begins with no human's question"):
            first_exchange(wrong)
