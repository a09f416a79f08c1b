"""Wrong things in every place where a user names one: `python -m tests.fuzz.first_contact [only=PATTERN] [every=1]`.

A place is an argument of a command or of a Python function, a thing what somebody may take for what is wanted there: a
name that there is not, a file for a folder, a run for a checkpoint, nothing, a list. Each pair ends well, or in one
sentence of ours that repeats what was given and says what to do. Prints a line for each that does not, and a total.
"""

import os
import re
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import opd
from launch.artifacts.checkpoint_state import name_of
from opd.errors import OpdError
from teacher_service.config import TOKEN_VARIABLE
from tests.command import ROOT
from tests.command import opd as command
from tests.fuzz.run_files import STEP, make_run

SHOP = ROOT / "assets" / "shop"
DRY = "experiment=shop dry_run=true output_dir=OUT"
MODELS, ROWS = ("student.path", "teacher.path"), ("prompts.path", "conf", "resume")
OPTIONS = (
    "experiment", "method", "student", "teacher", "prompts", "evaluation", "evaluation_sets", "tracker", "learner",
    "cluster", "steps", "run_name", "notes",
)  # fmt: skip
COMMANDS: Sequence[str] = (
    *(f"train {DRY} {name}={{}}" for name in (*MODELS, *ROWS, *OPTIONS)),
    f"train {DRY} {{}}", "train dry_run=true experiment=shop output_dir={}", f"train {DRY} resume=latest run_name={{}}",
    f"train {DRY} --package {{}} --cfg job", "train --help {}",
    f"eval {DRY} {{}}", f"eval {DRY} checkpoint={{}}", f"eval {DRY} output={{}}",
    f"doctor {DRY} {{}}", f"doctor {DRY} teacher.path={{}}", f"doctor {DRY} output={{}}",
    f"compare {DRY} {{}}", f"compare {DRY} methods={{}}", f"compare {DRY} methods=gkd,{{}}",
    f"compare {DRY} seeds={{}}",
    "methods {}", "methods show {}", "methods show gkd conf={}", "certify {}", "certify method={}",
    "runs {}", "runs output_dir={}", "runs compare {} {}", "runs compare RUN {}", "runs delete {}",
    "show {}", "show RUN step={}", "show run output_dir={}", "report {}", "report run output_dir={}",
    "export run={} output=NEW", "export run=RUN output=NEW step={}",
    "export run=RUN push={}", "export {}",
    "serve-teacher dry_run=true {}", "serve-teacher dry_run=true teacher.path={}",
    "serve-teacher dry_run=true teacher=shop port={}", "serve-teacher dry_run=true teacher=shop host={}",
    "env {}", "selftest {}", "selftest only={},x",
    "submit {}", "submit address=x {}", "submit address=x working_dir={}/x train output_dir=OUT", "{}",
)  # fmt: skip
"""Command lines with a place; OUT is a folder for runs, RUN a run, NEW a path at which there is nothing."""
FUNCTIONS: Mapping[str, Sequence[str]] = {
    "open_run": ("path",),
    "plan": (
        "method", "student", "teacher", "prompts", "reward", "evaluation", "callbacks", "trackers", "verbose", "steps",
        "experiment", "learner", "output_dir", "run_name", "resume", "conf", "tracker", "notes",
    ),
    "train": ("method", "student", "teacher", "prompts", "callbacks", "verbose", "output_dir"),
    "evaluate": ("checkpoint", "student", "teacher", "reward", "evaluation", "experiment", "conf"),
    "evaluate_sets": ("checkpoint", "evaluation"),
}  # fmt: skip
"""Arguments of the Python functions."""


@dataclass(frozen=True, slots=True)
class World:
    """A folder with one of each kind of thing that paths lead to."""

    root: Path

    @classmethod
    def made(cls, root: Path) -> "World":
        """The things, in an empty folder."""
        make_run(root / "runs")
        (root / "empty").mkdir()
        (root / "notes.txt").write_text("hello\n")
        (root / "rows.jsonl").write_text('{"prompt": "has 2 1 ; Mon buys 4 ?", "answer": "6"}\n')
        return cls(root)

    @property
    def run(self) -> Path:
        """A finished run."""
        return self.root / "runs" / "run"

    def words(self) -> Mapping[str, str]:
        """Things as a command line has them."""
        return {
            "nothing": "", "name": "nope", "path": "no/such/place", "text": str(self.root / "notes.txt"),
            "rows": str(self.root / "rows.jsonl"), "empty": str(self.root / "empty"), "runs": str(self.root / "runs"),
            "run": str(self.run), "steps": str(self.run / "checkpoints"),
            "step": str(self.run / "checkpoints" / name_of(STEP)), "file": str(self.run / "config.yaml"),
            "model": str(SHOP / "teacher"), "weights": str(SHOP / "teacher" / "model.safetensors"), "list": "[a,b]",
            "several": "a,b", "null": "null", "number": "-1", "mapping": "{a:1}", "true": "true", "home": "~nope",
            "equals": "a=b", "below": str(self.root / "notes.txt" / "x"), "root": "/",
        }  # fmt: skip

    def values(self) -> Mapping[str, Any]:
        """Things as Python has them."""
        paths = {f"Path({name})": Path(word) for name, word in self.words().items() if word.startswith(("/", "no/"))}
        return {
            **self.words(), **paths, "None": None, "3": 3, "0.5": 0.5, "nan": float("nan"), "True": True, "[]": [],
            "{}": {}, "['a', 'b']": ["a", "b"], "[path]": [self.run], "()": (), "{'a': 1}": {"a": 1}, "{1: 2}": {1: 2},
            "set": {"a"}, "object": object(), "bytes": b"run", "class": dict, "function": print, "module": sys,
            "iterator": iter(["a"]), "[None]": [None], "exception": ValueError("x"), "self": self,
        }  # fmt: skip


class Started(Exception):
    """Raised in the place of a run: all that was given has been accepted."""


def _start(*given: Any, **more: Any) -> None:
    raise Started


_ADVICE = re.compile(
    r"; |\b(give|choose|set|write|name|did you mean|leave|commands are|takes|e\.g\.|add|rename|make|needs|correct)\b"
)
_FOREIGN = re.compile(r"Errno|Traceback|NoneType|object at 0x|has no attribute|\w+Error\(|(?<!Configuration)(?<!Data)"
                      r"(?<!Opd)\bError: ")  # fmt: skip


def fault_of(said: str, given: str) -> str:
    """What is wrong with a sentence, or "". What was `given` is repeated, or its last part."""
    lines = said.strip().splitlines()
    if found := _FOREIGN.search(said):
        return f"repeats a program's error ({found.group()})"
    if not lines:
        return "says nothing"
    if not _ADVICE.search(said):
        return "does not say what to do"
    if (cut := re.search(r"'([^']+)\.\.\. \(\d+ characters\)", said)) and given.startswith(cut[1]):  # a long path
        return ""
    words = re.findall(r"[\w.]+", Path(given).name)  # a list and a mapping may be repeated as Python has them
    return "" if all(word in said for word in words) else "does not repeat what was given"


def tried_command(line: str, word: str, world: World) -> str:
    """The fault of one command, or ""."""
    named = {"OUT": str(world.root / "out"), "RUN": str(world.run), "NEW": str(world.root / "new")}
    words = [re.sub("|".join(named), lambda m: named[m.group()], w).replace("{}", word) for w in line.split()]
    try:
        with patch.dict(os.environ, dict.fromkeys((TOKEN_VARIABLE, "RAY_AUTH_TOKEN"), "t" * 40)):
            done = command(*words)
    except Exception as error:  # noqa: BLE001 (what is looked for)
        return _trace(error)
    if done.returncode == 0:
        return ""
    sentences = [one for one in done.stderr.splitlines() if one.startswith("error: ")]
    if len(sentences) != 1:
        return f"says {len(sentences)} sentences: {done.stderr!r}"
    fault = fault_of(sentences[0], word)
    return fault and f"{fault}: {sentences[0]}"


def tried_call(function: str, argument: str, value: Any) -> str:
    """The fault of one call, or ""; `function` is one of `FUNCTIONS`."""
    base = {} if function == "open_run" else {"experiment": "shop", "tracker": "none"}
    if argument == "prompts":
        base["evaluation_sets"] = ["shop_cool"]
    if function == "train":
        base["verbose"] = False
    try:
        with patch("launch.cli.api.verbs.train_once", _start), patch("launch.cli.api.verbs.evaluate_once", _start):
            getattr(opd, function)(**base | {argument: value})
    except Started:
        return ""
    except OpdError as error:
        given = value if isinstance(value, str) else ""
        fault = fault_of(str(error), given)
        return fault and f"{fault}: {error}"
    except Exception as error:  # noqa: BLE001 (what is looked for)
        return _trace(error)
    return ""


def _trace(error: BaseException) -> str:
    at = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in at if frame.filename.startswith(str(ROOT / "launch"))][-1:] or at[-1:]
    places = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in ours)
    return f"{type(error).__name__} out of {places}: {error}"[:300]


def pairs(world: World) -> Iterator[tuple[str, str, Callable[[], str]]]:
    """Every thing in every place: the place, the name of both, and how they are tried."""
    for line in COMMANDS:
        for word in world.words().values():
            yield line, f"opd {line.replace('{}', repr(word))}", partial(tried_command, line, word, world)
    for function, arguments in FUNCTIONS.items():
        for argument in arguments:
            for name, value in world.values().items():
                place = f"{function}({argument}=)"
                yield place, f"opd.{function}({argument}={name})", partial(tried_call, function, argument, value)


def main(arguments: Sequence[str]) -> int:
    """Try all of them; 1 if one has a fault."""
    asked = dict(argument.split("=", 1) for argument in arguments)
    only, every = re.compile(asked.get("only", "")), int(asked.get("every", "1"))
    count, faults = 0, Counter[str]()
    with tempfile.TemporaryDirectory() as root:
        world = World.made(Path(root))
        chosen = [pair for pair in pairs(world) if only.search(pair[1])]
        for place, name, attempt in chosen[::every]:
            count += 1
            begun = perf_counter()
            fault = attempt()
            if (took := perf_counter() - begun) > 5:
                print(f"SLOW {took:.0f} s: {name}", flush=True)
            if fault:
                kind = f"{place}: {_kind(fault)}"
                if not faults[kind]:
                    print(f"{name}\n    {fault[:400]}", flush=True)
                faults[kind] += 1
    print(f"{count} tried, {faults.total()} with a fault, of {len(faults)} kinds (the first of each is shown)")
    return int(bool(faults))


def _kind(fault: str) -> str:
    """A fault without what differs from thing to thing."""
    return re.sub(r"'[^']*'|\S*[/=]\S*|\d+", "*", fault)[:80]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
