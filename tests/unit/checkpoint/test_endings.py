"""A run that breaks off: what a failure, a signal and a clock leave, and what becomes of a run that took no step."""

import asyncio
import json
import os
import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from launch.artifacts.checkpoint_state import MANIFEST, STATE, DriverState
from launch.artifacts.checkpoint_store import CheckpointStore, verified_state
from launch.artifacts.run_directory import RunDirectory, append_json, check_name
from launch.artifacts.run_lock import LOCK
from launch.checkpoint.places import check_place
from launch.checkpoint.resume import can_begin_again, open_directory, resumption, way_on
from launch.checkpoint.step_end import Boundary
from launch.cli.compare.command import run_comparison
from launch.config.run_config import run_config
from launch.services.signals import Preempted, StopRequest, end_on_signals, run_until_stopped, signals_kept
from learner.checkpoints import checkpoint
from opd.errors import ConfigurationError, DataError
from opd.loop.ledger import Ledger
from opd.loop.staleness import StalenessSchedule
from tests.fuzz.endings import ENDINGS, chosen

NOTHING: Any = None


def written(root: Path, step: int) -> Path:
    store = CheckpointStore(root)
    folder = store.begin(step)
    (folder / "learner").mkdir()
    (folder / "learner" / "rank_0.safetensors").write_bytes(b"weights")
    state = DriverState(
        run_name="r", step=step, ledger=Ledger().to_json(), totals={}, wall_s=1.0, teachers={}, config={}
    )
    store.commit(state, {"learner/rank_0.safetensors": checkpoint.digest(folder / "learner" / "rank_0.safetensors")})
    return store.path(step)


def forged(place: Path, text: str) -> None:
    """Another `state.json`, with a manifest that fits it."""
    (place / STATE).write_text(text)
    manifest = json.loads((place / MANIFEST).read_text())
    manifest["files"][STATE] = checkpoint.digest(place / STATE)
    (place / MANIFEST).write_text(json.dumps(manifest))


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", DEEP, '{"step": 2}', "\x00", "NaN"]
    + [
        f"field {name} {value}"
        for name, values in {
            "step": ['"2"', "2.0", "-1", "true", "null", "[2]"],
            "ledger": ["3", '"junk"', '"{}"', json.dumps(DEEP), "null"],
            "totals": ["[]", '{"a": "b"}', '{"a": NaN}', "1"],
            "wall_s": ['"x"', "NaN", "-1", "[]"],
            "teachers": ["[]", '{"a": 1}', "7"],
            "config": ["[]", "null"],
            "followers": ['{"a": []}', "0"],
            "run_name": ["1", "null"],
        }.items()
        for value in values
    ],
    ids=lambda text: text[:24],
)
def test_state_that_is_anything_else_is_passed_over(tmp_path: Path, text: str) -> None:
    written(tmp_path, 1)
    place = written(tmp_path, 2)
    if text.startswith("field "):
        _, name, value = text.split(" ", 2)
        content = json.loads((place / STATE).read_text())
        text = json.dumps({k: v for k, v in content.items() if k != name})[:-1] + f', "{name}": {value}}}'
    forged(place, text)
    found, _, skipped = CheckpointStore(tmp_path).newest_whole()
    assert found.name == "step_1" and len(skipped) == 1 and "take another" in skipped[0]


@pytest.mark.parametrize("text", ["", "[]", DEEP, "{}", '{"format": "opd run checkpoint 1", "files": []}', "3"])
def test_a_manifest_that_is_anything_else_is_one_sentence(tmp_path: Path, text: str) -> None:
    place = written(tmp_path, 1)
    (place / MANIFEST).write_text(text)
    with pytest.raises(DataError, match=r"(is no manifest of|cannot be read|holds no JSON object).*take another"):
        verified_state(place)


# ---- when a checkpoint is due ----


class Saves:
    """A saver that notes."""

    follows = False

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.kept = 0
        self.error: Exception | None = None

    def check(self) -> None: ...

    async def begin(self, state: int) -> None:
        if self.error is not None:
            raise self.error
        self.steps.append(state)
        self.kept = state

    async def finish(self) -> None: ...

    async def rescue(self, state: int, elsewhere: list[Path]) -> Path:
        await self.begin(state)
        return Path("checkpoints") / f"step_{state}"

    async def give_up(self, *, at_once: bool) -> None: ...


def boundary(
    saves: Saves,
    stop: StopRequest,
    clock: Callable[[], float] = lambda: 0.0,
    spent: Callable[[], bool] = lambda: False,
    **changed: Any,
) -> Boundary:
    async def state(step: int) -> Any:
        return step

    values = {
        "checkpoint_every": 0,
        "checkpoint_minutes": 15.0,
        "steps": 100,
        "staleness_schedule": StalenessSchedule(),
    } | changed
    config: Any = SimpleNamespace(**values, learner=SimpleNamespace(deadline_s=5.0))
    saver: Any = saves
    return Boundary(config, saver, stop, state, nullcontext, clock=clock, spent=spent)


def record(step: int, *, live: bool = True) -> Any:
    return SimpleNamespace(step=step, live=live)


AHEAD = StalenessSchedule(max_staleness=2)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, [4, 8, 12]),  # minutes 16, 32, 48: a step takes four
        ({"checkpoint_minutes": 0.0}, []),
        ({"checkpoint_minutes": 1.0}, [*range(1, 13)]),
        ({"checkpoint_every": 3}, [3, 6, 9, 12]),
        (
            {"staleness_schedule": AHEAD},
            [4, 8, 12],
        ),  # no barrier anywhere: nothing is promised that a checkpoint could break
        ({"staleness_schedule": replace(AHEAD, barrier_every=5), "checkpoint_every": 5}, [5, 10]),
        ({"staleness_schedule": replace(AHEAD, deterministic=False), "checkpoint_every": 10}, [4, 8, 10]),
        ({"steps": 11, "checkpoint_minutes": 0.0}, [11]),
    ],
)
def test_a_checkpoint_is_due_by_the_clock_where_the_schedule_allows_it(
    changed: dict[str, Any], expected: list[int]
) -> None:
    now = [0.0]

    async def main() -> list[int]:
        saves = Saves()
        at_the_end = boundary(saves, StopRequest(1.0), lambda: now[0], **changed)
        for step in range(1, min(13, changed.get("steps", 100) + 1)):
            now[0] += 240.0
            at_the_end.ended(record(step))
            await at_the_end(record(step))
        return saves.steps

    assert asyncio.run(main()) == expected


class Settles:
    """Ranks that are idle, or lost."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.asked = error, 0

    async def settle(self) -> None:
        self.asked += 1
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("case", ["saved before", "ranks lost", "disk full", "Ray gone", "plain", "no step"])
def test_what_a_failure_leaves(case: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        saves, ranks = Saves(), Settles(DataError("ranks are lost") if case == "ranks lost" else None)
        at_the_end = boundary(saves, StopRequest(1.0))
        if case != "no step":
            at_the_end.ended(record(7))
        saves.kept = 7 if case == "saved before" else 0
        saves.error = OSError("No space left on device") if case == "disk full" else None
        at_the_end.hopeless = case == "Ray gone"
        await at_the_end.rescue(ValueError("a row"), ranks)  # type: ignore[arg-type]
        assert saves.steps == ([7] if case == "plain" else [])
        assert ranks.asked == (case != "Ray gone")

    asyncio.run(main())
    assert ("step 7 could not be saved" in caplog.text) == (case in ("ranks lost", "disk full"))


def _run_of_steps(stop: StopRequest, saves: Saves, seconds: float, signals: list[signal.Signals]) -> None:
    """Step 5 is finished; in step 6, which takes `seconds`, signals come."""

    async def work() -> None:
        at_the_end = boundary(saves, stop)
        at_the_end.ended(record(5))
        stop.waits = True
        try:
            for number in signals:
                os.kill(os.getpid(), number)
                await asyncio.sleep(0.02)
            await asyncio.sleep(seconds)
            at_the_end.ended(record(6))
            await at_the_end(record(6))
        except BaseException as error:
            await at_the_end.rescue(error, Settles())  # type: ignore[arg-type]
            raise

    run_until_stopped(work(), stop)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize(
    ("seconds", "grace_s", "kept"), [(0.05, 60.0, 6), (60.0, 1.5, 5)], ids=["a step that ends", "one that does not"]
)
def test_every_signal_leaves_the_last_finished_step(
    number: signal.Signals, seconds: float, grace_s: float, kept: int
) -> None:
    """Within the grace, whether or not the step at hand ends in it; shells expect 130 after Ctrl-C."""
    saves, told = Saves(), list[str]()
    end_on_signals()
    with pytest.raises(Preempted, match=f"by {number.name} after step {kept}, with a checkpoint") as caught:
        _run_of_steps(StopRequest(grace_s, told.append), saves, seconds, [number])
    assert saves.steps == [kept] and caught.value.code == (130 if number is signal.SIGINT else 75)
    assert number.name in told[0]


def test_a_second_signal_waits_for_nothing() -> None:
    saves = Saves()
    with pytest.raises(KeyboardInterrupt):
        _run_of_steps(StopRequest(60.0), saves, 60.0, [signal.SIGTERM, signal.SIGINT])
    assert saves.steps == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_before_and_after_the_loop_a_signal_is_an_interrupt(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    try:
        end_on_signals()
        with pytest.raises(KeyboardInterrupt, match=number.name):
            os.kill(os.getpid(), number)
        run_until_stopped(asyncio.sleep(0))
        with pytest.raises(KeyboardInterrupt, match=number.name):  # the loop has given the handler back
            os.kill(os.getpid(), number)
        with signals_kept():
            signal.signal(number, signal.SIG_DFL)  # as a library does
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        with pytest.raises(KeyboardInterrupt), signals_kept():
            raise SystemExit(15)
        signal.signal(number, signal.SIG_IGN)
        end_on_signals()
        os.kill(os.getpid(), number)  # nohup
        thread = threading.Thread(target=end_on_signals)
        thread.start()
        thread.join()
    finally:
        signal.signal(number, before)


# ---- names and places ----


def config(root: Path, *overrides: str) -> Any:
    return run_config(["experiment=shop", f"output_dir={root}", *overrides])


def console() -> Console:
    return Console(file=StringIO(), width=300)


def text_of(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_a_run_that_took_no_step_does_not_use_up_its_name(tmp_path: Path) -> None:
    wanted, said = config(tmp_path, "run_name=a"), console()
    first = open_directory(wanted, None, said)
    with pytest.raises(ConfigurationError, match="never overwritten"):  # it may be about to begin
        open_directory(wanted, None, said)
    first.write_config("seed: 0")
    (first.path / LOCK).write_text(json.dumps({"pid": 1, "started": 0.0, "host": "another"}))
    assert not can_begin_again(first.path), "another host cannot be asked"
    (first.path / LOCK).unlink()
    append_json(first.evaluations, {"step": 0})
    check_place(wanted)
    assert "begins anew" in way_on(first)
    again = config(tmp_path, "run_name=a", "resume=latest")
    check_place(again)
    assert resumption(again, said) is None and "nothing to go on from" in text_of(said)
    second = open_directory(again, None, said)
    assert second.path == first.path and not second.evaluations.exists() and "begins anew" in text_of(said)
    (aside,) = tmp_path.glob("a.begun-*")
    assert (aside / "evaluations.jsonl").exists(), "the old logs are gone"


@pytest.mark.parametrize("given", ["a", "{}/a", "{}/a/checkpoints", "{}/a/export"])
@pytest.mark.parametrize("step", [0, 3])
def test_a_run_where_a_checkpoint_is_meant_leads_to_both_ways_on(tmp_path: Path, given: str, step: int) -> None:
    run = RunDirectory.create(tmp_path, "a")
    run.write_config("seed: 0")
    if step:
        written(run.checkpoints, step)
    on = f"go on with that run by run_name=a output_dir={tmp_path} resume=latest"
    anew = f", or begin a new run there by resume={run.checkpoints}/step_3" if step else ""
    with pytest.raises(ConfigurationError) as caught:
        resumption(config(tmp_path, f"resume={given.format(tmp_path)}"), console())
    assert str(caught.value).endswith(f"; {on}{anew}")


@pytest.mark.parametrize("trace", ["line", "checkpoint", "export"])
def test_what_was_trained_is_never_moved(tmp_path: Path, trace: str) -> None:
    directory = RunDirectory.create(tmp_path, "a")
    directory.write_config("seed: 0")
    if trace == "line":
        append_json(directory.metrics, {"step": 1})
        assert "no checkpoint was written" in way_on(directory)
    elif trace == "checkpoint":
        written(directory.checkpoints, 3)
        assert "step 3 is kept in" in way_on(directory) and "run_name=a resume=latest" in way_on(directory)
    else:
        (directory.export / "config.json").write_text("{}")
    for refuse in (lambda: open_directory(config(tmp_path, "run_name=a"), None, console()),
                   lambda: check_place(config(tmp_path, "run_name=a"))):  # fmt: skip
        with pytest.raises(ConfigurationError, match="exists and is never overwritten"):
            refuse()


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/b", "x" * 300, ".hidden", "-x", "ü", "a b", "a\nb"])
def test_a_name_that_cannot_be_one_is_refused_in_the_plan(name: str) -> None:
    with pytest.raises(ConfigurationError, match="run_name needs"):
        check_name(name)


@pytest.mark.parametrize("root", ["/dev/null", "/dev/null/x", "/proc/x"])
def test_a_place_that_cannot_be_written_is_refused_in_the_plan(root: str) -> None:
    with pytest.raises(ConfigurationError, match=r"output_dir=.* cannot be written .*choose another"):
        check_place(config(Path(root)))


def test_looking_at_a_place_leaves_nothing(tmp_path: Path) -> None:
    check_place(config(tmp_path / "not" / "there", "run_name=x"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", ["run_name='../../zz'", "output_dir=/dev/null/x"])
def test_a_comparison_looks_at_its_name_and_place_first(wrong: str) -> None:
    with pytest.raises(ConfigurationError, match=r"run_name needs|cannot be written"):
        run_comparison(["experiment=compare", "dry_run=true", wrong])


def test_the_command_that_ends_real_runs_knows_its_places() -> None:
    """The runs themselves take minutes each: `python -m tests.fuzz.endings`."""
    assert len({ending.name for ending in ENDINGS}) == len(ENDINGS) >= 20
    assert chosen("1,4-6") == [1, 4, 5, 6] and len(chosen("")) == len(ENDINGS)
