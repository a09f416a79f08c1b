"""A run's directory: all files of a run, written so that a crash or a full disk cannot falsify them."""

import json
import math
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf.folder import has_config
from launch.artifacts.redaction import masked, redacted, without_secret
from opd.errors import ConfigurationError, DataError, OpdError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,+-]*")
_SOME = 8  # names in a sentence
_LONGEST = 200  # letters of a name: file systems allow 255, and ours get endings


def check_name(name: str) -> None:
    """Raise `ConfigurationError` unless `name` is valid for a run or a comparison."""
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            "run_name needs letters, digits and . _ = , + - only, beginning with a letter or digit, but "
            f"got {name!r}; choose another run_name=..."
        )
    if len(name) > _LONGEST:
        raise ConfigurationError(
            f"run_name needs {_LONGEST} letters at most, but has {len(name)}; choose another run_name=..."
        )


LATEST, AUTO = "latest", "auto"
"""Values of `resume`: the newest checkpoint of a run that is there, and the same if there is one."""


def decided(resume: str, output_dir: str, run_name: str) -> str:
    """`resume` with AUTO decided by what is there: LATEST where something of that name has begun, "" where not.

    It is for commands that a cluster repeats as they are (Slurm's requeue, a restarted pod).
    """
    if resume != AUTO:
        return resume
    if not run_name:
        raise ConfigurationError(
            "resume=auto goes on with the run of that name if it has begun, and run_name is empty; set run_name=..."
        )
    return LATEST if (Path(output_dir) / run_name).exists() else ""


def taken(path: Path) -> ConfigurationError:
    """Error sentence about a directory that is another run's."""
    return ConfigurationError(
        f"run directory {path} exists and is never overwritten; choose another run_name=..., or move the old one away"
    )


def run_of(path: Path) -> Path | None:
    """Directory of the run that a file or folder is part of; its own if it is one."""
    return next(
        (p for p in (path, *path.parents) if (p / "config.yaml").is_file() and (p / "checkpoints").is_dir()), None
    )


def _meant_by(path: Path) -> str:
    """Advice about a path that is no run directory: the run it is part of, those it holds, or those beside it."""
    if path.exists() and (run := run_of(path)) is not None:
        return f"it is part of one: give {run}"
    folder = path if path.is_dir() else path.parent
    found = sorted(folder.glob("*/config.yaml"), key=lambda file: -file.stat().st_mtime)[:_SOME]
    have = ", ".join(file.parent.name for file in found)
    return f"give the path of one{f' ({folder} has {have})' if have else ', e.g. runs/<run_name>'}"


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """`runs/<run_name>/`: `create` a new one, or `open` one that exists.

    `*.jsonl` files get a whole line or nothing; every other file is replaced at once (`write_text`,
    `write_bytes`). A disk that is full is one sentence (`OpdError`), and what was there before stays.
    """

    path: Path

    @classmethod
    def create(cls, root: Path, name: str) -> "RunDirectory":
        """Make `root/name`; an existing one is never overwritten, nor shared with another run."""
        check_name(name)
        path = root / name
        try:
            root.mkdir(parents=True, exist_ok=True)
            path.mkdir()  # exclusive: of two runs that start together, one gets it
        except FileExistsError:
            raise taken(path) from None
        except OSError as error:
            raise ConfigurationError(
                f"the run directory {path} cannot be made ({error.strerror or error}); nothing was started, choose "
                "another output_dir=..."
            ) from error
        directory = cls(path)
        with _writing(path):
            directory.checkpoints.mkdir()
            directory.export.mkdir()
        return directory

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """An existing run, to resume it or to write its report again."""
        if not (path / "config.yaml").is_file():
            missing = "it has no config.yaml" if path.exists() else "it does not exist"
            raise ConfigurationError(f"{path} is no run directory ({missing}); {_meant_by(path)}")
        return cls(path)

    @property
    def took_a_step(self) -> bool:
        """Whether the directory holds any training: a checkpoint, a line of a step, or a student."""
        trained = any(self.checkpoints.glob("step_*")) or any(self.checkpoints.glob(".step_*.old"))
        return trained or bool(read_jsonl(self.metrics)) or has_config(self.export)

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def config(self) -> Path:
        """The resolved configuration, without secrets."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """A line of numbers per step."""
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        """A line per `EvaluationPoint`."""
        return self.path / "evaluations.jsonl"

    @property
    def samples(self) -> Path:
        """A line per recorded completion."""
        return self.path / "samples.jsonl"

    @property
    def summary(self) -> Path:
        """Outcome of the run; absent while it runs."""
        return self.path / "summary.json"

    @property
    def command(self) -> Path:
        """The command line that began the run (or went on with it), without secrets."""
        return self.path / "command.txt"

    @property
    def changes(self) -> Path:
        """A line for every setting that a resumed run had otherwise from a step on; absent where all stayed."""
        return self.path / "changes.txt"

    @property
    def log(self) -> Path:
        """Log of what the run printed, each line with its time; a resumed run goes on with it."""
        return self.path / "console.log"

    @property
    def trackers(self) -> Path:
        """Ids and places of the run at its trackers; absent without any."""
        return self.path / "trackers.json"

    @property
    def report(self) -> Path:
        """The page to open in a browser."""
        return self.path / "report.html"

    @property
    def curves(self) -> Path:
        """The report's curves as one picture."""
        return self.path / "curves.png"

    @property
    def stacks(self) -> Path:
        """Stack traces of processes that did not answer, and the last output of those that ended; absent while all
        work.
        """
        return self.path / "stacks"

    @property
    def failure(self) -> Path:
        """Traceback of the error that ended the run, where it is no sentence of ours; absent otherwise."""
        return self.path / "failure.txt"

    @property
    def checkpoints(self) -> Path:
        """Folder of the learner's checkpoints."""
        return self.path / "checkpoints"

    @property
    def rescued(self) -> Path:
        """Folder of the last step where `checkpoints` cannot be written; absent otherwise."""
        return self.path / "rescued"

    @property
    def export(self) -> Path:
        """The trained model, for other tools."""
        return self.path / "export"

    def write_config(self, text: str) -> None:
        """Store the resolved configuration (YAML) with every secret replaced."""
        safe = redacted(yaml.safe_load(text) or {})
        write_text(self.config, yaml.safe_dump(safe, sort_keys=False, allow_unicode=True))

    def write_command(self, overrides: Sequence[str]) -> None:
        """Store the command that trains, for reproduction; secrets are replaced."""
        write_text(self.command, shlex.join(["opd", "train", *map(without_secret, overrides)]) + "\n")

    def add_changes(self, sentences: Sequence[str]) -> None:
        """Record settings that are others from a step on."""
        write_text(self.changes, "".join(f"{line}\n" for line in (*self.read_changes(), *sentences)))

    def read_changes(self) -> list[str]:
        """The lines of `changes`."""
        return self.changes.read_text().splitlines() if self.changes.exists() else []

    def rewind(self, step: int, steps: int) -> None:
        """Remove everything after `step`: a run that resumes from its checkpoint writes that again.

        What is measured when all `steps` are done (the student once more, the teacher) comes again, too.
        """
        for path in (self.metrics, self.evaluations, self.samples):
            if path.exists():
                kept = [line for line in read_steps(path) if line["step"] <= step]
                if path == self.evaluations:
                    kept = [line for line in kept if line["step"] < steps and line.get("examinee") == "student"]
                write_text(path, "".join(_line(line) for line in kept))
        self.summary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically: a reader sees the old or the new text, also after a crash. Secrets are masked."""
    write_bytes(path, masked(text).encode())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON file atomically; numbers that are not finite become null."""
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file atomically: written beside it, flushed to the disk, renamed."""
    part = path.with_name(f".{path.name}.part")
    with _writing(path):
        try:
            handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                _write_all(handle, data)
                os.fsync(handle)
            finally:
                os.close(handle)
            os.replace(part, path)
        except OSError:
            part.unlink(missing_ok=True)
            raise


def append_json(path: Path, value: Mapping[str, Any]) -> None:
    """Add one line and hand it to the operating system; a line that did not fit is taken back."""
    data = _line(value).encode()
    with _writing(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            end = _end_of_last_line(handle)
            os.ftruncate(handle, end)
            os.lseek(handle, end, os.SEEK_SET)
            try:
                _write_all(handle, data)
            except OSError:
                os.ftruncate(handle, end)
                raise
        finally:
            os.close(handle)


def append_events(path: Path, events: Sequence[Mapping[str, Any]]) -> None:
    """Add to a JSON array, one event a line, by one write over its closing bracket."""
    if not events:
        return
    lines = ",\n".join(_line(event).rstrip("\n") for event in events)
    with _writing(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            size = os.fstat(handle).st_size
            os.lseek(handle, max(0, size - len(_END)), os.SEEK_SET)
            _write_all(handle, ((",\n" if size else "[\n") + lines + _END).encode())
        finally:
            os.close(handle)


_END = "\n]\n"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file, none without a file; a last line that a crash cut off does not count."""
    if not path.exists():
        return []
    whole = path.read_bytes().rpartition(b"\n")[0]
    return [_parsed(path, number, line) for number, line in enumerate(whole.splitlines(), 1) if line.strip()]


def read_steps(path: Path) -> list[dict[str, Any]]:
    """As `read_jsonl`, of a file with one line per step. Raises `DataError` about a line without its step."""
    lines = read_jsonl(path)
    for number, line in enumerate(lines, 1):
        if type(line.get("step")) is not int or not 0 <= line["step"] < 1 << 53:
            raise DataError(f"line {number} of {path} says not of which step it is; repair or remove that line")
    return lines


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
        if b"\\ud" in line.lower():  # half a surrogate is no text, and could not be written again
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise DataError(f"line {number} of {path} is no JSON object; repair or remove that line")
    return value


def _line(value: Mapping[str, Any]) -> str:
    return masked(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)) + "\n"


def _finite(value: Any) -> Any:
    """Value with NaN and infinities, which JSON lacks, as null."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case Mapping():
            return {str(key): _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
    return value


def _end_of_last_line(handle: int) -> int:
    """Offset of the next line. After a crash the file may end in a piece of a line, which is given up."""
    size = os.fstat(handle).st_size
    block, end = 1 << 16, size
    while end > 0:
        begin = max(0, end - block)
        newline = os.pread(handle, end - begin, begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return 0


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]  # a nearly full disk writes less than it was given


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _sentence(path, error) from error


def _sentence(path: Path, error: OSError) -> OpdError:
    return OpdError(
        f"cannot write {path}: {error.strerror or error}; what was written before is intact; make room, or move "
        "the runs to another place"
    )
