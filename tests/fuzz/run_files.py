"""Files of a run that somebody else has written: understood, or refused in one sentence.

    python -m tests.fuzz.run_files [count=3000] [seed=0]

A whole run directory with a checkpoint is made, one value of one of its files is replaced (another type, a huge number,
a path out of the folder, deep nesting, a bomb, a cut), digests are made to fit, and everything that reads it is called.
Prints how many were understood, refused, ended in another error or took longer than 5 s, and read what lies outside.
"""

import json
import math
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from launch.artifacts.checkpoint_state import MANIFEST, STATE, DriverState
from launch.artifacts.checkpoint_store import CheckpointStore, verified_state
from launch.artifacts.evaluation_point import EvaluationPoint
from launch.artifacts.run_data import RunData
from launch.artifacts.run_directory import RunDirectory, append_json, write_json
from launch.artifacts.run_lock import LOCK, check_not_running
from launch.artifacts.samples import Sample
from launch.artifacts.summary import Outcome, RunSummary
from launch.checkpoint.resume import can_begin_again, history
from launch.cli.compare.shared_runs import finished_with
from learner.checkpoints import checkpoint
from learner.checkpoints.checkpoint import Facts, Shards, shard_name
from opd.errors import OpdError
from opd.loop.ledger import Entry, Ledger

SLOW_S = 5.0
SETTINGS = "steps: 4\nstudent: {path: x}\n"
STEP = 2
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "\n".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]" for i in range(9)
)
VALUES: Sequence[Any] = (
    None, True, "", "text", "../../../etc/passwd", "/etc/passwd", [], [[]], {}, {"a": 1}, 0, -1, 0.5, 1e308, 10**18,
    10**400, -(10**400), math.nan, math.inf, "\ud83d", "\x00", "9" * 4301, [0] * 5, {"": None}, "step_2", "finished",
)  # fmt: skip


def make_run(root: Path) -> Path:
    """A directory as a run leaves it: two checkpointed steps' worth of every file, small."""
    directory = RunDirectory.create(root, "run")
    directory.write_config(SETTINGS)
    point = EvaluationPoint(
        step=STEP, greedy=0.5, mean_at_k=0.5, pass_at_k=None, k=1, reverse_kl=0.1, length_mean=3.0,
        truncation_rate=0.0, seconds=1.0, tokens=10, flops=1.0, cpu_s=1.0,
    )  # fmt: skip
    for step in (1, STEP):
        append_json(directory.metrics, {"step": step, "actor/loss": 0.5, "sample/reward": None})
        append_json(directory.evaluations, {**point.as_json(), "step": step})
        sample = Sample(
            step=step, prompt="p", answer="a", tokens=("x", "y"), gaps=(0.1, 0.2), reward=None, version=0, stop="end",
            length=2,
        )  # fmt: skip
        append_json(directory.samples, sample.as_json())
    RunSummary(
        run_name="run", method="m", outcome=Outcome.FINISHED, steps=STEP, seed=0, wall_s=1.0, ready_s=1.0,
        first_step_s=1.0, cpu_s=1.0, tokens=1, flops=1.0, student_start=point, student_end=point, teacher=None,
        facts={"a": "b"}, ledger={"issued": 1}, versions={"opd": "1"}, notes=("n",),
    ).write(directory)  # fmt: skip
    write_json(directory.path / LOCK, {"pid": 2**22, "started": 1.0, "host": "elsewhere"})
    _checkpoint(directory)
    return directory.path


def _checkpoint(directory: RunDirectory) -> None:
    ledger = Ledger()
    ledger.issue(1, [Entry(1, "p", 0)])
    store = CheckpointStore(directory.checkpoints)
    folder = store.begin(STEP)
    (folder / "learner").mkdir()
    facts = Facts(step=STEP, updates=2, skipped=0, rank=0, ranks=1, zero_stage=1, model="m", device="cpu")
    tensors = {f"{key}/0/w": torch.zeros(8) for key in checkpoint.KEYS}
    tensors[checkpoint.RANDOM] = torch.zeros(8, dtype=torch.uint8)
    name = f"learner/{shard_name(0)}"
    digest = checkpoint.write_shard(folder / name, tensors, facts)
    follower = folder / "default.safetensors"
    follower.write_bytes(b"weights")
    state = DriverState(
        run_name="run", step=STEP, ledger=ledger.to_json(), totals={"tokens": 1.0}, wall_s=1.5,
        teachers={"default": "ab"}, config={"steps": 4}, followers={"default": follower.name},
    )  # fmt: skip
    store.commit(state, {name: digest, follower.name: checkpoint.digest(follower)})


# Mutations.


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from _places(inner, (*at, key))


def mutated(value: Any, rng: random.Random) -> Any:
    """`value` with one place replaced, removed, renamed, or nested deep."""
    at = rng.choice(list(_places(value)))
    new = rng.choice(VALUES)
    if rng.random() < 0.05:
        for _ in range(rng.choice([50, 5000])):
            new = [new]
    if not at:
        return new
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in at[:-1]:
        inner = inner[key]
    if rng.random() < 0.15:
        del inner[at[-1]]
    elif isinstance(inner, dict) and rng.random() < 0.15:
        inner[rng.choice(["../x", "", "/etc/passwd", "new"])] = inner.pop(at[-1])
    else:
        inner[at[-1]] = new
    return copy


def _text(value: Any) -> bytes:
    """JSON, whatever Python thinks of its size and depth."""
    sys.set_int_max_str_digits(0)
    depth = sys.getrecursionlimit()
    sys.setrecursionlimit(40_000)
    try:
        return json.dumps(value).encode("utf-8", "surrogatepass")
    finally:
        sys.setrecursionlimit(depth)
        sys.set_int_max_str_digits(4300)


def _raw(data: bytes, rng: random.Random) -> bytes:
    """Bytes cut, flipped, doubled or replaced."""
    kind = rng.randrange(5)
    at = rng.randrange(max(1, len(data)))
    junk = rng.choice([b"", b"\xff\xfe", b"\x00" * 9, b"[" * 90_000, b"{", b"1" * 5000, b"NaN", b"\xef\xbb\xbf{}"])
    return [data[:at], data[:at] + junk + data[at + 1 :], data + data, junk, data[:at] + data[at + 1 :]][kind]


def spoil(run: Path, rng: random.Random) -> str:
    """Change one file of the run, so that digests fit all the same; returns which."""
    place = run / "checkpoints" / f"step_{STEP}"
    name = rng.choice(list(_SPOILERS))
    _SPOILERS[name](run, place, rng)
    if name in ("state", "ledger", "shard", "state bytes"):
        manifest = json.loads((place / MANIFEST).read_text())
        manifest["files"] |= {
            file: checkpoint.digest(place / file) for file in manifest["files"] if (place / file).exists()
        }
        (place / MANIFEST).write_text(json.dumps(manifest))
    return name


def _json_file(name: str) -> Callable[[Path, Path, random.Random], None]:
    def change(run: Path, place: Path, rng: random.Random) -> None:
        path = place / name if name in (STATE, MANIFEST) else run / name
        path.write_bytes(_text(mutated(json.loads(path.read_text()), rng)))

    return change


def _line_of(name: str) -> Callable[[Path, Path, random.Random], None]:
    def change(run: Path, _: Path, rng: random.Random) -> None:
        lines = (run / name).read_bytes().splitlines()
        lines[rng.randrange(len(lines))] = _text(mutated(json.loads(lines[0]), rng))
        (run / name).write_bytes(b"\n".join(lines) + b"\n")

    return change


def _ledger(_: Path, place: Path, rng: random.Random) -> None:
    state = json.loads((place / STATE).read_text())
    state["ledger"] = _text(mutated(json.loads(state["ledger"]), rng)).decode("utf-8", "replace")
    (place / STATE).write_text(json.dumps(state))


def _shard(_: Path, place: Path, rng: random.Random) -> None:
    facts = {"step": 2, "updates": 2, "skipped": 0, "rank": 0, "ranks": 1, "zero_stage": 1, "model": "m", "device": "c"}
    said = _text(mutated(facts, rng)).decode("utf-8", "replace")
    piece = rng.choice(["master/0/w", "master/-1/w", "master/x/w", f"exp_avg/{'9' * 40}/w", "master//", "/"])
    header = {
        "__metadata__": {"format": checkpoint.FORMAT, "facts": said},
        piece: {"dtype": rng.choice(["F32", "F32", "I64"]), "shape": [2], "data_offsets": [0, 8]},
    }
    text = json.dumps(header).encode()
    data = bytes(8 if '"I64"' not in json.dumps(header) else 16)
    (place / "learner" / shard_name(0)).write_bytes(len(text).to_bytes(8, "little") + text + data)


def _config(run: Path, _: Path, rng: random.Random) -> None:
    bad = [BOMB, "a: [" * 3000, "!!python/object/apply:os.system [x]", "- 1", "a: *nowhere", "x" * (2 << 20), "\x00"]
    (run / "config.yaml").write_text(rng.choice(bad))


def _bytes(run: Path, place: Path, rng: random.Random) -> None:
    files = [run / name for name in ("metrics.jsonl", "summary.json", "evaluations.jsonl", LOCK, "config.yaml")]
    path = rng.choice([*files, place / MANIFEST])
    path.write_bytes(_raw(path.read_bytes(), rng))


def _state_bytes(_: Path, place: Path, rng: random.Random) -> None:
    (place / STATE).write_bytes(_raw((place / STATE).read_bytes(), rng))


_SPOILERS: dict[str, Callable[[Path, Path, random.Random], None]] = {
    "state": _json_file(STATE), "manifest": _json_file(MANIFEST), "ledger": _ledger, "shard": _shard,
    "summary": _json_file("summary.json"), "lock": _json_file(LOCK), "metrics": _line_of("metrics.jsonl"),
    "evaluations": _line_of("evaluations.jsonl"), "samples": _line_of("samples.jsonl"), "config": _config,
    "bytes": _bytes, "state bytes": _state_bytes,
}  # fmt: skip


def _shards(folder: Path) -> None:
    shards = Shards(folder / "learner")
    shards.read("master", "w", 0, 2)
    shards.random_state(0, "cpu")


def _follow(folder: Path) -> None:
    """What a resumed run opens for teachers that follow their student lies in the checkpoint."""
    for file in verified_state(folder).followers.values():
        assert (folder / file).resolve().is_relative_to(folder.resolve()), "a file outside is read"


def readers(run: Path) -> dict[str, Callable[[], object]]:
    """Everything that reads a run directory."""
    directory, place = RunDirectory(run), run / "checkpoints" / f"step_{STEP}"
    return {
        "checkpoint": lambda: verified_state(place),
        "newest": lambda: CheckpointStore(directory.checkpoints).newest_whole(),
        "followers": lambda: _follow(place),
        "shards": lambda: _shards(place),
        "data": lambda: RunData.read(directory),
        "history": lambda: history(directory),
        "begin again": lambda: can_begin_again(run),
        "running": lambda: check_not_running(run),
        "comparison": lambda: finished_with(run, SETTINGS),
        "rewind": lambda: directory.rewind(1, 4),
    }


@dataclass(slots=True)
class MetricSums:
    """Calls of readers by outcome, and the findings."""

    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)


def try_one(run: Path, what: str, tally: MetricSums) -> None:
    """Call every reader on a spoilt run."""
    for name, read in readers(run).items():
        began = perf_counter()
        try:
            read()
            outcome = "understood"
        except OpdError as error:
            outcome = "refused"
            if what == "nothing":
                tally.findings.append(f"{name} refuses a run as it was: {error}")
            if "\n" in str(error) or len(str(error)) > 2000:
                tally.findings.append(f"{what} / {name}: no single sentence: {str(error)[:200]!r}")
        except Exception:  # noqa: BLE001 (what the fuzz looks for)
            outcome = "another error"
            tally.findings.append(f"{what} / {name}: {traceback.format_exc(limit=-2)[-500:]}")
        if perf_counter() - began > SLOW_S:
            tally.findings.append(f"{what} / {name}: took {perf_counter() - began:.0f} s")
        tally.outcomes[outcome] += 1


def fuzz(count: int, seed: int) -> MetricSums:
    """`count` spoilt runs."""
    tally, rng = MetricSums(), random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        whole = make_run(Path(folder))
        try_one(whole.parent / shutil.copytree(whole, whole.parent / "as it was"), "nothing", tally)
        for number in range(count):
            run = Path(shutil.copytree(whole, whole.parent / str(number)))
            try_one(run, spoil(run, rng), tally)
            shutil.rmtree(run)
    return tally


def main(arguments: Sequence[str]) -> int:
    """Print the figures; 1 if there are findings."""
    given = dict(argument.split("=", 1) for argument in arguments)
    count = int(given.get("count", 3000))
    tally = fuzz(count, int(given.get("seed", 0)))
    print(f"{count} spoilt runs, calls of readers by outcome {dict(tally.outcomes)}; findings {len(tally.findings)}")
    for finding in tally.findings[:20]:
        print(f"  {finding}")
    return 1 if tally.findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
