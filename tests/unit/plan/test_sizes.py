"""Sizes that are AUTO: micro-batches fit and no larger ones do, texts suit their model, and resumed runs keep both."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BloomConfig, LlamaConfig

from hf.folder_check import Folder
from launch.artifacts.checkpoint_state import STATE, DriverState, described
from launch.artifacts.run_directory import write_json
from launch.config.run_config import RunConfig, run_config
from launch.plan.checks.devices import resolved
from launch.plan.memory.cards import misfit
from launch.plan.memory.footprint import LearnerRole, peak
from launch.plan.memory.parts import GIB, card_bytes, parts
from launch.plan.memory.store import texts_of_step
from launch.plan.plan import make_plan
from launch.plan.sizes import (
    CONTEXT,
    FIRST,
    LENGTH,
    MICROBATCH,
    MOST,
    as_begun,
    as_recorded,
    ladder,
    with_length,
    with_microbatch,
)
from opd.errors import ConfigurationError
from opd.loop.ledger import Ledger
from opd.rollouts.contexts import Draft, with_room
from opd.rollouts.refined import RefinedRollout
from opd.rollouts.student import StudentRollout
from opd.settings.auto import Auto
from opd.settings.devices import Device
from tests.unit.plan.test_layout import models, pair, shows

__all__ = ["models"]
SHOP = ["experiment=shop", "dry_run=true"]
HF = [*SHOP, "student=hf", "student.path=${assets:shop/student}", "student.dtype=FLOAT32"]
TOLD = [f"cluster.gpus_per_{role}=1" for role in ("engine", "teacher", "learner")]
LENGTHS = st.one_of(st.integers(1, 5000), st.integers(1, 70_000))
PAIRS = [("0.6B", "4B"), ("1.7B", "8B"), ("8B", "32B")]


@given(LENGTHS)
def test_a_ladder_begins_with_the_longest_sequence_and_doubles(longest: int) -> None:
    first, *others = ladder(longest)
    assert first == longest and all(one.bit_count() == 1 and longest < one <= MOST for one in others)
    assert others == sorted(others) and all(b == 2 * a for a, b in pairwise(others))
    assert not others or (others[0] <= 2 * longest and others[-1] == MOST)


@pytest.fixture(scope="module")
def planned(models: Path) -> Callable[[int, bool, bool], RunConfig]:
    """Runs whose roles have a GPU each, by the pair of models, whether adapters are trained, and checkpoints."""
    found: dict[tuple[int, bool], RunConfig] = {}
    with pytest.MonkeyPatch.context() as patch:
        shows(patch, 8)
        for number, (student, teacher) in enumerate(PAIRS):
            for adapted in (False, True):
                told = ["learner.lora.r=16"] if adapted else []
                overrides = [*pair(models, student, teacher), *TOLD, *told, "cluster.gpu_memory_gib=80"]
                found[number, adapted] = resolved(run_config(overrides))

    def one(number: int, adapted: bool, checkpointed: bool) -> RunConfig:
        config = found[number, adapted]
        return replace(config, learner=replace(config.learner, gradient_checkpointing=checkpointed))

    return one


RUNS = st.tuples(st.integers(0, len(PAIRS) - 1), st.booleans(), st.booleans())
CARDS = st.floats(8, 300, allow_nan=False)


def on_cards(config: RunConfig, gib: float) -> RunConfig:
    return replace(config, cluster=replace(config.cluster, gpu_memory_gib=gib))


def of_size(config: RunConfig, size: int) -> RunConfig:
    return replace(config, learner=replace(config.learner, tokens_per_microbatch=size))


def fits(config: RunConfig, size: int, spare: float = 0.0) -> bool:
    """Whether it fits with such a share of a GPU free while the learner works."""
    card = card_bytes(config)
    *others, learner = parts(of_size(config, size), card)
    assert isinstance(learner.role, LearnerRole)
    role = replace(learner.role, heads=learner.role.heads + int(spare * card))
    return misfit([*others, replace(learner, role=role)], card) is None


def larger_is_none(config: RunConfig, size: int, longest: int) -> bool:
    """Whether no larger size could have been chosen: there is none, a step needs none, or it has no room."""
    above = [one for one in ladder(longest) if one > size]
    needed = max(FIRST, texts_of_step(config) * longest / config.learner.ranks)
    return not above or size >= needed or not fits(config, above[0], 0.0 if size < FIRST else 0.1)


def chosen(config: RunConfig, longest: int) -> int | None:
    """Size of a micro-batch; None where the run is refused."""
    try:
        return with_microbatch(config, longest, exact=True).config.learner.packed_tokens
    except ConfigurationError:
        return None


@settings(max_examples=40)
@given(RUNS, CARDS, LENGTHS)
def test_a_size_on_a_gpu_is_the_largest_that_fits_or_that_a_step_needs(
    planned: Callable[..., RunConfig], run: tuple[int, bool, bool], gib: float, longest: int
) -> None:
    """It is refused where not even one sequence fits, and only there."""
    config = on_cards(planned(*run), gib)
    size = chosen(config, longest)
    if size is None:
        assert not fits(config, longest)
        return
    assert size in ladder(longest) and size >= longest and larger_is_none(config, size, longest)
    assert fits(config, size, 0.0 if size <= max(FIRST, longest) else 0.1)


@settings(max_examples=40)
@given(RUNS, CARDS, CARDS, LENGTHS)
def test_more_memory_never_makes_a_size_smaller(
    planned: Callable[..., RunConfig], run: tuple[int, bool, bool], one: float, other: float, longest: int
) -> None:
    few, many = (chosen(on_cards(planned(*run), gib), longest) for gib in sorted((one, other)))
    assert few is None or (many is not None and few <= many)


@pytest.fixture(scope="module")
def undivided(models: Path) -> list[RunConfig]:
    """Runs whose roles get the GPUs that a layout gives them."""
    return [run_config(pair(models, *sizes)) for sizes in PAIRS]


@settings(max_examples=15)
@given(st.integers(0, len(PAIRS) - 1), st.integers(1, 8), st.integers(12, 200), LENGTHS)
def test_a_size_fits_the_layout_that_is_made_for_it(
    undivided: list[RunConfig], number: int, count: int, gib: int, longest: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        shows(patch, count)
        config = with_or_none(resolved(on_cards(undivided[number], gib)), longest)
    if config is None:
        return
    size = config.learner.packed_tokens
    assert size >= longest and fits(config, size)
    assert size < FIRST or larger_is_none(config, size, longest)


def with_or_none(config: RunConfig, longest: int) -> RunConfig | None:
    try:
        return with_microbatch(config, longest, exact=True).config
    except ConfigurationError:
        return None


@pytest.fixture(scope="module")
def on_a_processor(models: Path) -> RunConfig:
    return resolved(run_config([*pair(models, "0.6B", "4B"), "learner.device=CPU", "student.device=CPU"]))


@given(st.integers(0, 400), st.integers(0, 400), LENGTHS)
def test_a_processor_takes_8192_unless_its_memory_holds_fewer(
    on_a_processor: RunConfig, one: int, other: int, longest: int
) -> None:
    """As many as there were before this was decided; nothing is refused, for this memory is an estimate."""

    def of(gib: int) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=gib * GIB))
            return with_microbatch(on_a_processor, longest, exact=True).config.learner.packed_tokens

    few, many = (of(gib) for gib in sorted((one, other)))
    held = sum(p.count * peak(p.role).total for p in parts(of_size(on_a_processor, max(FIRST, longest)), 0))
    assert longest <= few <= many <= max(FIRST, longest)
    assert (many == max(FIRST, longest)) or held > max(one, other) * GIB


def test_the_demo_has_what_it_had() -> None:
    plan = make_plan(run_config(SHOP))
    assert (plan.config.learner.packed_tokens, plan.config.student.longest) == (8192, 128)
    assert plan.sizes == {"learner.tokens_per_microbatch": "AUTO: 8192, as on every processor"}
    shown = ["".join(str(cell) for cell in column.cells) for column in plan.table().columns]
    assert "8192 tokens (AUTO: 8192, as on every processor)" in shown[2]


@pytest.mark.parametrize("size", [101, 8192, 10**8])
def test_a_size_that_is_told_stays(size: int) -> None:
    config = resolved(run_config([*SHOP, f"learner.tokens_per_microbatch={size}"]))
    found = with_microbatch(config, 101, exact=True)
    assert found.config == config and not found.notes and not found.why


def test_a_gpu_of_unknown_memory_has_what_a_processor_has() -> None:
    config = resolved(run_config([*SHOP, "learner.device=GPU", "cluster.address=auto", "cluster.gpus_per_learner=1"]))
    found = with_microbatch(config, 101, exact=True)
    assert found.config.learner.packed_tokens == FIRST and "cluster.gpu_memory_gib" in "".join(found.why.values())


# The longest text.


def room(config: RunConfig) -> Any:
    """Room of the drafts of `method=trd`."""
    rollout: Any = config.method.rollout
    return rollout.shown.room


def folder(context: int | None) -> Folder:
    config = BloomConfig() if context is None else LlamaConfig(max_position_embeddings=context)  # Bloom has no bound
    return Folder(part="student 'small'", causal=SimpleNamespace(config=config), stored={})


@pytest.fixture(scope="module")
def drafting() -> RunConfig:
    return run_config([*HF, "method=trd"])


@given(st.one_of(st.none(), st.integers(1, 200_000)))
def test_a_text_is_as_long_as_the_model_reads_at_most(drafting: RunConfig, context: int | None) -> None:
    found = with_length(drafting, folder(context))
    assert found.config.student.longest == min(CONTEXT, context or CONTEXT)
    assert bool(found.notes) == (found.config.student.longest < CONTEXT)
    assert room(found.config) == found.config.student.longest


@pytest.mark.parametrize("told", [64, 129])
def test_a_length_that_is_told_stays_or_is_refused(told: int) -> None:
    config = run_config([*HF, "method=trd", f"student.max_model_len={told}", "method.rollout.shown.room=77"])
    if told > 128:
        with pytest.raises(
            ConfigurationError, match=r"reads at most 128 tokens .*max_model_len is 129; lower it to 128"
        ):
            with_length(config, folder(128))
        return
    found = with_length(config, folder(128))
    assert found.config == config and not found.why


@given(st.integers(1, 9000), st.one_of(st.just(Auto.AUTO), st.integers(1, 9000)))
def test_the_room_of_a_draft_is_found_wherever_it_stands(tokens: int, room: int | Auto) -> None:
    student = StudentRollout(max_tokens=5)
    rollout = RefinedRollout(student=student, shown=Draft(room=room, free=1), max_tokens=5)
    found = with_room({"a": rollout, "b": [1]}, tokens)
    assert found["a"].shown.room == (tokens if isinstance(room, Auto) else room) and found["a"].student is student
    assert with_room(found, tokens + 1) is found


def test_a_small_model_of_a_stranger_is_planned_as_it_is() -> None:
    """`student=hf` alone, with a model of 512 positions: the first command of a newcomer."""
    plan = make_plan(run_config([*HF, "method=trd"]))
    assert plan.config.student.longest == 512
    assert room(plan.config) == 512
    assert any("student.max_model_len=512 (AUTO: the context of student" in remark for remark in plan.remarks)
    with pytest.raises(ConfigurationError, match=r"max_tokens is 500, but student.max_model_len is 512; raise"):
        make_plan(run_config([*HF, "max_tokens=500"]))


# Runs that go on.


def checkpoint(root: Path, step: int, sizes: Mapping[str, int]) -> Path:
    """A checkpoint's state in the run `root`, with the settings of the demo and other sizes."""
    config = described(run_config(SHOP)) | dict(sizes)
    place = root / "checkpoints" / f"step_{step}"
    place.mkdir(parents=True)
    state = DriverState(
        run_name=root.name,
        step=step,
        ledger=Ledger().to_json(),
        totals={},
        wall_s=0.0,
        teachers={},
        config=config,
    )
    write_json(place / STATE, state.as_json())
    return place


def test_a_run_that_goes_on_keeps_the_sizes_that_it_began_with(tmp_path: Path) -> None:
    """Also from another step or folder; what is told counts, and a file that cannot be read is left to the resuming."""
    checkpoint(tmp_path / "a", 4, {MICROBATCH: 4096, LENGTH: 120})
    place = checkpoint(tmp_path / "a", 8, {MICROBATCH: 16384, LENGTH: 120})
    (broken := tmp_path / "a" / "checkpoints" / "step_12").mkdir()
    (broken / STATE).write_text("{")
    run = [*HF, f"output_dir={tmp_path}", "run_name=a"]

    def sizes(*more: str) -> tuple[object, object]:
        config = as_recorded(run_config([*run, *more])).config
        return config.learner.tokens_per_microbatch, config.student.max_model_len

    assert sizes() == (Auto.AUTO, Auto.AUTO)
    assert sizes("resume=latest") == sizes(f"resume={place}", "run_name=b") == (16384, 120)
    assert sizes("resume=4") == (4096, 120) and sizes("resume=5") == (Auto.AUTO, Auto.AUTO)
    assert sizes("resume=latest", "learner.tokens_per_microbatch=512", "student.max_model_len=100") == (512, 100)
    begun = as_begun(run_config(run))
    assert (begun.learner.tokens_per_microbatch, begun.resume) == (16384, "")
    assert as_begun(run_config([*run, "run_name=b"])).learner.tokens_per_microbatch is Auto.AUTO
    plan = make_plan(run_config([*run, "resume=4"]))
    assert plan.config.learner.packed_tokens == 4096 and plan.config.student.longest == 120
    assert "step_4, from which the run goes on" in plan.sizes["learner.tokens_per_microbatch"]


def test_a_recorded_size_that_is_no_number_or_does_not_fit_is_refused(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path / "a", 4, {MICROBATCH: -1})
    with pytest.raises(ConfigurationError, match=r"tokens_per_microbatch in .*step_4 needs a whole number .*, got -1"):
        as_recorded(run_config([*SHOP, f"output_dir={tmp_path}", "run_name=a", "resume=latest"]))
    shows(monkeypatch, 1)
    more = ["learner.tokens_per_microbatch=65536", "cluster.gpu_memory_gib=24"]
    config = resolved(run_config([*pair(models, "0.6B", "4B"), *more]))
    kept = "AUTO: as in runs/a/checkpoints/step_4, from which the run goes on"
    sentence = r"set learner.tokens_per_microbatch=\d+ \(learner.tokens_per_microbatch is as in runs/a/.*step_4, from"
    with pytest.raises(ConfigurationError, match=sentence):
        with_microbatch(config, 2300, exact=True, kept=kept)


def test_a_learner_on_a_gpu_is_not_sized_by_the_memory_of_the_host(
    on_a_processor: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=1))
    config = replace(on_cards(on_a_processor, 1000), learner=replace(on_a_processor.learner, device=Device.GPU))
    assert (chosen(config, 300), chosen(config, 1)) == (32768, FIRST), "as a step needs, and no less than was usual"
