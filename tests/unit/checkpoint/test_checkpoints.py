"""Checkpoints of a run as values and on the disk: names, policy, what may change, and what is never read."""

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.artifacts.checkpoint_state import (
    DriverState,
    described,
    expired,
    leftovers,
    name_of,
    newest_first,
)
from launch.artifacts.checkpoint_store import CheckpointStore, verified_state
from launch.artifacts.run_directory import RunDirectory, append_json, read_jsonl
from launch.checkpoint.changes import changes, check_changes, check_inputs, check_steps, harmless
from launch.checkpoint.resume import ResumePoint, _remarks, consequences, fingerprints, rewind
from launch.config.run_config import RunConfig, run_config
from launch.plan.checks.devices import resolved
from learner.checkpoints import checkpoint
from learner.schedule import Schedule
from opd.errors import ConfigurationError, DataError, OpdError
from opd.loop.ledger import Ledger
from opd.settings.ranges import HARMLESS, In
from tests.fault_matrix import Witness

STEPS = st.sets(st.integers(0, 400), max_size=12)


@given(STEPS)
def test_names_are_ordered_by_step_and_strangers_are_none(steps: set[int]) -> None:
    names = [*map(name_of, steps), ".step_3.partial", ".step_4.old", "step_x", "step_5.part", "best"]
    assert newest_first(names) == sorted(steps, reverse=True)


@given(STEPS, st.integers(1, 5), st.integers(0, 50))
def test_the_policy_keeps_the_newest_and_the_milestones(steps: set[int], keep: int, every: int) -> None:
    gone = expired(steps, keep, every)
    kept = steps - set(gone)
    assert set(gone) <= steps and len(gone) == len(set(gone))
    assert set(sorted(steps)[-keep:]) <= kept
    assert all(step in kept for step in steps if every and step % every == 0)
    assert len(kept) <= keep + sum(bool(every) and step % every == 0 for step in steps)
    assert not expired(kept, keep, every), "a second look removes more"


@given(STEPS, STEPS, STEPS)
def test_leftovers_never_cost_a_whole_checkpoint(whole: set[int], partial: set[int], old: set[int]) -> None:
    names = [*map(name_of, whole), *(f".step_{s}.partial" for s in partial), *(f".step_{s}.old" for s in old)]
    found = leftovers(names)
    assert dict(found.back) == {f".step_{s}.old": name_of(s) for s in old - whole}
    assert set(found.remove) == {n for n in names if n.startswith(".")} - set(dict(found.back))


def state(step: int, **changed: object) -> DriverState:
    values: dict = {
        "run_name": "r", "step": step, "ledger": Ledger(issued=3, trained=3).to_json(),
        "totals": {"tokens/prompt": 7.0},
        "wall_s": 1.5, "teachers": {"default": "abc"}, "config": {"seed": 0}, "followers": {},
    }  # fmt: skip
    return DriverState(**(values | changed))


def write(store: CheckpointStore, step: int) -> Path:
    folder = store.begin(step)
    (folder / "learner").mkdir()
    (folder / "learner" / "rank_0.safetensors").write_bytes(os.urandom(64))
    digest = checkpoint.digest(folder / "learner" / "rank_0.safetensors")
    store.commit(state(step), {"learner/rank_0.safetensors": digest})
    return store.path(step)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    made = CheckpointStore(tmp_path / "checkpoints")
    made.folder.mkdir()
    return made


def test_what_was_written_comes_back(store: CheckpointStore) -> None:
    for step in (2, 10, 4):
        write(store, step)
    assert store.steps() == [10, 4, 2]
    assert verified_state(store.path(4)) == state(4)
    assert store.newest_whole() == (store.path(10), state(10), [])
    store.prune(1, 4)
    assert store.steps() == [10, 4]
    store.forget_after(4)
    assert [p.name for p in store.folder.iterdir()] == ["step_4"]


def test_the_same_step_again_replaces_it(store: CheckpointStore) -> None:
    first = (write(store, 2) / "learner" / "rank_0.safetensors").read_bytes()
    assert (write(store, 2) / "learner" / "rank_0.safetensors").read_bytes() != first
    assert [p.name for p in store.folder.iterdir()] == ["step_2"]
    assert verified_state(store.path(2)).step == 2


@pytest.mark.faults("checkpoint foreign or incomplete")
def test_a_checkpoint_under_another_step_s_name_is_none(store: CheckpointStore, witness: Witness) -> None:
    """Every digest is right; taken for step 6, it would be removed as one that comes after the step it goes on from."""
    write(store, 2)
    os.rename(write(store, 4), store.path(6))
    witness("checkpoint foreign or incomplete")
    place, found, skipped = store.newest_whole()
    assert (place, found.step) == (store.path(2), 2)
    assert len(skipped) == 1 and "step_6 is of step 4" in skipped[0] and "\n" not in skipped[0]


def test_a_crash_while_a_run_is_rewound_leaves_no_checkpoint_without_its_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`resume=2` of a run that has come to step 4, cut off at its first and its second removal."""

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    for number, victim in enumerate((CheckpointStore, RunDirectory)):
        directory = RunDirectory.create(tmp_path, f"r{number}")
        store = CheckpointStore(directory.checkpoints)
        for step in (1, 2, 3, 4):
            append_json(directory.metrics, {"step": step})
        write(store, 2), write(store, 4)
        resumed = ResumePoint(checkpoint=store.path(2), state=state(2), same_run=True)
        with monkeypatch.context() as patched:
            patched.setattr(victim, "forget_after" if victim is CheckpointStore else "rewind", crash)
            with pytest.raises(KeyboardInterrupt):
                rewind(directory, resumed, 6)
        newest = store.newest_whole()[1].step
        assert len(read_jsonl(directory.metrics)) >= newest, "steps that no line tells of"


def test_a_run_whose_checkpoints_were_removed_has_none(tmp_path: Path) -> None:
    gone = CheckpointStore(tmp_path / "checkpoints")
    gone.recover()
    with pytest.raises(ConfigurationError, match="no checkpoint to go on from"):
        gone.newest_whole()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a missing manifest": lambda p: (p / "manifest.json").unlink(),
    "a foreign manifest": lambda p: (p / "manifest.json").write_text("{}"),
    "no JSON": lambda p: (p / "manifest.json").write_text("["),
    "a list of nothing": lambda p: (p / "manifest.json").write_text('{"format": "opd run checkpoint 1", "files": {}}'),
    "a missing shard": lambda p: (p / "learner" / "rank_0.safetensors").unlink(),
    "a missing state": lambda p: (p / "state.json").unlink(),
    "a stranger": lambda p: (p / "more").write_bytes(b""),
    "an edited state": lambda p: (p / "state.json").write_text((p / "state.json").read_text().replace("1.5", "1.6")),
    "a link to nowhere": lambda p: [(p / "state.json").unlink(), (p / "state.json").symlink_to(p / "no")],
}


@pytest.mark.faults("checkpoint foreign or incomplete")
@pytest.mark.parametrize("what", DAMAGE)
def test_latest_passes_over_what_is_not_whole_and_says_why(store: CheckpointStore, what: str, witness: Witness) -> None:
    write(store, 2)
    DAMAGE[what](write(store, 4))
    with pytest.raises(DataError) as caught:
        verified_state(store.path(4))
    place, found, skipped = store.newest_whole()
    assert (place, found.step, skipped) == (store.path(2), 2, [str(caught.value)])
    witness("checkpoint foreign or incomplete")
    DAMAGE[what](store.path(2))
    with pytest.raises(ConfigurationError, match="no checkpoint to go on from") as caught:
        store.newest_whole()
    assert "\n" not in str(caught.value)


@pytest.mark.faults("checkpoint damaged")
@given(data=st.data())
def test_every_flipped_bit_and_every_cut_is_found(witness: Witness, data: st.DataObject) -> None:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        store = CheckpointStore(Path(folder))
        path = write(store, 2)
        victim = path / data.draw(st.sampled_from(["learner/rank_0.safetensors", "state.json", "manifest.json"]))
        content = bytearray(victim.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[place] ^= 1 << data.draw(st.integers(0, 7))
            victim.write_bytes(content)
        else:
            victim.write_bytes(content[:place])
        witness("checkpoint damaged")
        try:
            found = verified_state(path)
        except DataError:
            return
        # White space of the manifest's JSON carries nothing; everything else is found.
        assert victim.name == "manifest.json" and found == state(2)


@pytest.mark.faults("checkpoint half renamed")
def test_a_crash_at_any_moment_leaves_a_whole_checkpoint(store: CheckpointStore, witness: Witness) -> None:
    """Each place at which `commit` may stop, then what the next start finds."""
    write(store, 2)
    os.rename(store.path(2), checkpoint.replaced(store.path(2)))  # between the two renames of a second step 2
    (checkpoint.partial(store.path(2))).mkdir()
    store.begin(4)  # cut off while it was written
    assert store.steps() == []
    witness("checkpoint half renamed")
    store.recover()
    assert store.newest_whole()[1].step == 2
    assert [p.name for p in store.folder.iterdir()] == ["step_2"]


@pytest.mark.faults("disk full elsewhere")
def test_a_full_disk_leaves_the_one_before(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, witness: Witness
) -> None:
    write(store, 2)

    def full(handle: int) -> None:
        witness("disk full elsewhere")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OpdError, match="No space left on device") as caught:
        write(store, 4)
    assert "\n" not in str(caught.value)
    store.abandon(4)
    assert [p.name for p in store.folder.iterdir()] == ["step_2"] and verified_state(store.path(2)).step == 2


SMALL = ["experiment=shop"]


@pytest.mark.parametrize(
    "override",
    ["steps=7", "evaluation.every=3", "tracker.samples=1", "student.replicas=2", "learner.ranks=2",
     "learner.zero_stage=3", "learner.offload_optimizer=true", "checkpoint_every=5", "checkpoint_keep=9",
     "cluster.cpus_per_actor=1", "run_name=other", "notes=[a]", "learner.tokens_per_microbatch=4096",
     "teacher.replicas=2"],
)  # fmt: skip
def test_what_trains_the_same_may_change(override: str) -> None:
    before, now = (described(run_config([*SMALL, *more])) for more in ([], [override]))
    found = changes(before, now)
    assert found, "nothing changed"
    check_changes("c", found)


RATE = ["learner.lr=3e-4"]


@pytest.mark.parametrize(
    ("overrides", "meant", "sentence"),
    [
        (
            RATE,
            [],
            r"made with learner\.lr=0\.001, but this run has learner\.lr=0\.0003.*resume_changes=\[learner\.lr\]",
        ),
        ([*RATE, "max_tokens=70"], ["learner.lr"], "made with max_tokens=77"),
        (RATE, ["learner.lr", "max_tokens"], "resume_changes names max_tokens, but nothing of that name is other"),
        ([], ["learner.lr"], r"resume_changes names learner\.lr.*changed: no setting that needs it"),
        (["steps=7"], ["steps"], "resume_changes names steps"),
        (["learner.lora.r=8"], ["learner.*"], r"holds what learner\.lora\.r=0 makes"),
    ],
)
def test_what_trains_something_else_must_be_meant(overrides: list[str], meant: list[str], sentence: str) -> None:
    before, now = (described(run_config([*SMALL, *more])) for more in ([], overrides))
    with pytest.raises(ConfigurationError, match=sentence):
        check_changes("c", changes(before, now), meant)


@pytest.mark.parametrize("meant", [["learner.lr", "max_tokens", "method.*"], ["learner.lr", "m*"]])
def test_what_is_meant_may_train_something_else(meant: list[str]) -> None:
    before, now = (described(run_config([*SMALL, *more])) for more in ([], [*RATE, "max_tokens=70", "steps=7"]))
    found = check_changes("c", changes(before, now), meant)
    assert {"learner.lr", "max_tokens"} <= {change.name for change in found} and "steps" not in [c.name for c in found]


def test_settings_that_changed_are_kept_in_the_directory(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, "a")
    assert directory.read_changes() == []
    directory.add_changes(["after step 4: learner.lr is 1, and was 2 before"])
    directory.add_changes(["after step 8: learner.lr is 2, and was 1 before"])
    assert [line[:12] for line in directory.read_changes()] == ["after step 4", "after step 8"]


MAY_CHANGE = {
    # What a run is called, where it runs, how long, and what is recorded of it.
    *(
        "run_name",
        "output_dir",
        "resume",
        "resume_changes.*",
        "steps",
        "notes.*",
        "dry_run",
        "doctor",
        "grace_s",
        "trace",
    ),
    *(
        "checkpoint_every",
        "checkpoint_minutes",
        "checkpoint_keep",
        "checkpoint_keep_every",
        "checkpoint_best",
        "max_buffer_bytes",
    ),
    *("evaluation.*", "cluster.*", "tracker.*", "hardware.*", "stop_after.*"),
    # How many processes, how much memory, how long they may take: the same numbers come out.
    *("student.replicas", "student.deadline_s", "student.kv_cache_bytes", "student.gpu_memory_utilization"),
    *("student.max_num_seqs", "student.max_model_len", "student.tensor_parallel", "student.enforce_eager"),
    *("student.max_num_batched_tokens", "student.async_scheduling"),
    *("student.device", "learner.device", "learner.ranks", "learner.zero_stage", "learner.tokens_per_microbatch"),
    "learner.offload_optimizer",
    *("learner.head_chunk", "learner.gradient_checkpointing", "learner.sentinel_tolerance", "learner.deadline_s"),
    *("learner.overlap_k", "learner.publish_chunk_bytes", "learner.transport", "learner.max_skipped_steps"),
    *("learner.deterministic", "learner.loss_kernel"),
    # Where a teacher stands; that it is the same one, its fingerprint says.
    *(f"teachers.*.{name}" for name in ("path", "backend", "device", "replicas", "max_batch_tokens", "head_chunk")),
    *(f"teachers.*.{name}" for name in ("max_k", "deadline_s", "max_model_len", "kv_cache_bytes", "url", "model")),
    *(f"teachers.*.{name}" for name in ("gpu_memory_utilization", "fingerprint", "connect_s", "read_s", "retries")),
    *(f"teachers.*.{name}" for name in ("backoff_s", "max_consecutive_failures", "tensor_parallel")),
}


def test_auto_is_the_newest_checkpoint_of_what_has_begun_and_nothing_otherwise(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for resume, name, meant in (("auto", "a", "latest"), ("auto", "b", ""), ("latest", "b", "latest"), ("2", "b", "2")):
        assert run_config([f"output_dir={tmp_path}", f"run_name={name}", f"resume={resume}"]).resume == meant
    with pytest.raises(ConfigurationError, match=r"run_name is empty; set run_name="):
        run_config(["resume=auto"])


def test_what_a_resumed_run_may_change_is_marked_beside_each_setting() -> None:
    """The list was kept by hand once; whoever marks a setting says here why, too."""
    found = list(harmless(RunConfig))
    assert set(found) == MAY_CHANGE and len(found) == len(MAY_CHANGE)


def test_a_setting_decides_what_is_trained_unless_it_is_marked() -> None:
    @dataclasses.dataclass
    class Group:
        new: int
        bounded: Annotated[int, In(0, 5)]
        marked: Annotated[float, In(0, 1), HARMLESS]

    @dataclasses.dataclass
    class Run:
        new: str
        name: Annotated[str | None, HARMLESS]
        part: Group
        whole: Annotated[Group, HARMLESS]
        several: Mapping[str, Group]
        words: Annotated[tuple[str, ...], HARMLESS]

    # The names of a class that is declared within a function are found in no module.
    Run.__annotations__ |= {"part": Group, "several": Mapping[str, Group], "whole": Annotated[Group, HARMLESS]}
    assert [*harmless(Run)] == ["name", "part.marked", "whole.*", "several.*.marked", "words.*"]
    assert all(c.harmless for c in changes({"steps": 1, "notes.length": 0}, {"steps": 2, "notes.length": 1}))
    assert not any(c.harmless for c in changes({}, {"brand_new": 1, "learner.brand_new": 2, "cluster": "another"}))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["checkpoint_every=5"], []),
        (["checkpoint_every=5", "max_staleness=1", "deterministic=false"], []),
        (["checkpoint_every=5", "max_staleness=1"], ["checkpoint_every was 0 and is 5 now"]),
        (["checkpoint_every=5", "max_staleness=1", "steps=7"], ["checkpoint_every was 0"]),
        (["learner.tokens_per_microbatch=99"], ["tokens_per_microbatch was AUTO and is 99 now, so the sums of a step"]),
    ],
)
def test_what_may_change_but_is_not_without_effect_is_said(overrides: list[str], said: list[str]) -> None:
    same = [o for o in overrides if not o.startswith(("checkpoint_every", "steps", "learner"))]
    before, now = (run_config([*SMALL, *more]) for more in (same, overrides))
    remarks = _remarks(now, changes(described(before), described(now)), 0)
    assert len(remarks) == len(said) and all(part in remark for part, remark in zip(said, remarks, strict=True))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["steps=7"], ["after step 4: steps is 7, and was 100 before, so the learning rate's schedule (LINEAR) ends"]),
        (["evaluation.every=3", "evaluation.teacher=false", "student.replicas=2", "teacher.replicas=2"], []),
        (["evaluation.samples=9"], ["after step 4: evaluation.samples is 9, and was 4 before, so figures of eval"]),
        (["evaluation.prompts.seed=9", "evaluation.max_tokens=9"], [" (and 1 more), so figures of evaluations"]),
        (["steps=7", "evaluation.samples=9"], ["steps is 7", "evaluation.samples is 9"]),
    ],
)
def test_what_may_change_but_parts_the_curves_is_told_and_kept(overrides: list[str], told: list[str]) -> None:
    before, now = run_config(SMALL), run_config([*SMALL, *overrides])
    found = changes(described(before), described(now))
    check_changes("c", found)
    sentences = consequences(found, now, 4)
    assert len(sentences) == len(told) and all(part in one for part, one in zip(told, sentences, strict=True))
    flat = dataclasses.replace(now, learner=dataclasses.replace(now.learner, schedule=Schedule.CONSTANT_WITH_WARMUP))
    assert not any("schedule" in one for one in consequences(found, flat, 4)), "there is no end of it to move"


@pytest.mark.parametrize(
    "override",
    ["seed=1", "student.path=assets/shop/teacher", "method=topk_reverse_kl", "prompts.prompts_per_step=3",
     "learner.lr=1e-4", "learner.schedule=CONSTANT", "learner.warmup_steps=1", "max_tokens=76", "max_staleness=1",
     "learner.weight_decay=0.1", "method.rollout.temperature=0.9", "learner.beta2=0.9"],
)  # fmt: skip
def test_what_would_train_something_else_is_refused(override: str) -> None:
    before, now = (described(run_config([*SMALL, *more])) for more in ([], [override]))
    with pytest.raises(
        ConfigurationError, match=r"was made with .* but this run has .* train something else"
    ) as caught:
        check_changes("c", changes(before, now))
    assert override.split("=")[0].split(".")[-1] in str(caught.value) and "\n" not in str(caught.value)


def test_a_description_survives_json_and_names_every_default() -> None:
    own = described(resolved(run_config(SMALL)))
    assert json.loads(json.dumps(own)) == own
    assert own["learner.deterministic"] is False and own["learner.dtype"] == "FLOAT32"  # one is in no YAML
    assert own["teachers.default.path"].endswith("assets/shop/teacher")
    assert "text" not in own


def test_another_teacher_and_too_few_steps_are_refused() -> None:
    check_inputs("c", {"default": "a", "far": ""}, {"default": "a", "far": ""}, [])
    for now in ({"default": "b"}, {}, {"default": "a", "more": "c"}):
        with pytest.raises(ConfigurationError, match="fingerprint"):
            check_inputs("c", {"default": "a"}, now, [])
    check_steps("c", 4, 4)
    with pytest.raises(ConfigurationError, match="is of step 4, but steps=3"):
        check_steps("c", 4, 3)


def test_a_state_of_another_version_is_refused() -> None:
    values = state(2).as_json()
    assert DriverState.from_json(values) == state(2)
    with pytest.raises(DataError, match="another version"):
        DriverState.from_json({**values, "mood": "good"})
    assert dataclasses.is_dataclass(DriverState)


def test_inputs_are_what_they_hold_and_not_where_they_are(tmp_path: Path) -> None:
    """A moved copy is the same file; other bytes under the same name are not; held-out rows may be exchanged."""
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    for name, rows in {"a/train.jsonl": "1", "b/moved.jsonl": "1", "b/other.jsonl": "2", "a/test.jsonl": "3"}.items():
        (tmp_path / name).write_text(json.dumps({"prompt": f"has {rows} ?"}))

    def described_run(train: str, test: str = "a/test.jsonl", student: str = "assets/shop/student") -> RunConfig:
        mine = ["prompts=dataset", f"prompts.path={tmp_path / train}", f"student.path={student}"]
        return run_config([*mine, "evaluation=dataset", f"evaluation.prompts.path={tmp_path / test}"])

    before = described_run("a/train.jsonl")
    digests = fingerprints(before)
    assert set(digests) == {"default", "student.path", "prompts.path", "evaluation.prompts.path"}

    def resumed(config: RunConfig) -> None:
        found, now = changes(described(before), described(config)), fingerprints(config)
        check_inputs("c", digests, now, found)
        check_changes("c", [change for change in found if change.name not in digests.keys() & now.keys()])

    copy = shutil.copytree("assets/shop/student", tmp_path / "student")
    for same in (before, described_run("b/moved.jsonl"), described_run("a/train.jsonl", "b/other.jsonl")):
        resumed(same)
    resumed(described_run("a/train.jsonl", student=str(copy)))
    with pytest.raises(ConfigurationError, match=r"another content of prompts\.path"):
        resumed(described_run("b/other.jsonl"))
    template = copy / "chat_template.jinja"
    template.write_text("{{ messages }}")
    with pytest.raises(ConfigurationError, match=r"another content of student\.path"):
        resumed(described_run("a/train.jsonl", student=str(copy)))
    (tmp_path / "a" / "train.jsonl").write_text('{"prompt": "has 9 ?"}')
    with pytest.raises(ConfigurationError, match=r"another content of prompts\.path"):
        resumed(before)
    (tmp_path / "a" / "train.jsonl").write_text('{"prompt": "has 1 ?"}')
    (tmp_path / "a" / "test.jsonl").write_text('{"prompt": "has 4 ?"}')
    with pytest.raises(ConfigurationError, match=r"another content of evaluation\.prompts\.path"):
        resumed(before)
    resumed_without_digests = {"default": digests["default"]}
    check_inputs("c", resumed_without_digests, digests, [])  # a checkpoint of an older version
