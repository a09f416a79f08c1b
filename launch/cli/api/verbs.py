"""`opd.train`, `opd.plan` and `opd.evaluate`: what the commands do, called from Python."""

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, TypeGuard

from launch.artifacts import terminal
from launch.artifacts.evaluation_point import EvaluationPoint
from launch.artifacts.redaction import check_arguments
from launch.cli.api.inputs import FOLDER, REWARD, has_splits, part_option, prompts_file, reward_settings
from launch.cli.api.overrides import got, overrides_of
from launch.cli.api.results import TrainedRun
from launch.cli.train import checked, evaluate_once, train_once
from launch.config.composition.compose import own_folder
from launch.config.run_config import RunConfig, run_config
from launch.config.shipped_files import groups
from launch.monitors.callbacks import Callback, CallbackTracker, Logger, LoggerTracker, MakeTracker
from launch.plan.plan import Plan, make_plan
from launch.plan.remembered import forget
from launch.run.export import as_model
from launch.services.failure_causes import causes, find_own
from opd.errors import ConfigurationError
from opd.method.method import Method
from opd.ports import PromptSource

Reward = Callable[..., Any]
Settings = Mapping[str, Any]  # of a file: its path, and how it is read and asked; without a path: of what there is
Prompts = str | Path | PromptSource | Settings | Iterable[str | Mapping[str, Any] | Sequence[Mapping[str, Any]]]

HELD_OUT = 64  # prompts of training that are measured where no others are given


def train(
    *,
    method: str | Method | None = None,
    student: str | Path | None = None,
    teacher: str | Path | None = None,
    prompts: Prompts | None = None,
    reward: str | Reward | None = None,
    evaluation: Prompts | None = None,
    callbacks: Sequence[Callback] = (),
    trackers: Sequence[Logger] = (),
    verbose: bool = True,
    **settings: Any,
) -> TrainedRun:
    """Train a student, as `opd train` does, and return the run.

    `method` is a name (`opd methods`) or a `Method` of parts. `student` and `teacher` are folders of models (or an
    option of `conf/`, as "shop"), `prompts` a file, a list of texts, conversations or mappings with `prompt` and
    `answer`, a table, or a source of prompts; `evaluation` is the same, of held-out prompts. A mapping is settings of
    either (`{"path": ..., "answer_column": ...}`, `evaluation={"every": 10}`). `reward` is a grader's name or a
    function (docs/grading.md). Everything else is a setting of the command line (`steps=100`, `learner={"lr": 1e-5}`,
    `**{"learner.lr": 1e-5}`, `experiment="shop"`). `callbacks` are called after every step, `trackers` get the numbers
    (`log(data, step=)`). `verbose=False` prints nothing.

    Raises:
        OpdError: what the command line would say in a sentence.
    """
    given = _Given(method, student, teacher, prompts, reward, evaluation, settings)
    console = terminal.console(quiet=_quiet(verbose))
    followers = _followers(callbacks, trackers)
    with _own_loop(), _one_error():
        made, _ = checked(_config(given.overrides()), console)
        made.show_prompts(console)
        return TrainedRun(train_once(made, console, trackers=followers).path)


def plan(
    *,
    method: str | Method | None = None,
    student: str | Path | None = None,
    teacher: str | Path | None = None,
    prompts: Prompts | None = None,
    reward: str | Reward | None = None,
    evaluation: Prompts | None = None,
    callbacks: Sequence[Callback] = (),
    trackers: Sequence[Logger] = (),
    verbose: bool = True,
    **settings: Any,
) -> Plan:
    """Checked plan of a run (`dry_run=true`: of models on a hub the headers are read); nothing is started.

    It takes what `train` takes and refuses what `train` would, the place of the run and `resume` included; nothing is
    printed whatever `verbose` says.
    `rich.print(plan.table())` shows it.
    """
    _quiet(verbose)
    _followers(callbacks, trackers)
    given = _Given(method, student, teacher, prompts, reward, evaluation, settings | {"dry_run": True})
    with _own_loop(), _one_error():
        return checked(_config(given.overrides()), terminal.console(quiet=True))[0]


def evaluate(
    checkpoint: str | Path | None = None,
    *,
    student: str | Path | None = None,
    teacher: str | Path | None = None,
    reward: str | Reward | None = None,
    evaluation: Prompts | None = None,
    **settings: Any,
) -> EvaluationPoint:
    """Figures of a model on held-out prompts, as `opd eval` gives them; `checkpoint` is a run, a checkpoint of one, or
    a folder of a model.

    With named sets (`evaluation.sets`) it is the set that stands for the run; `evaluate_sets` gives all.
    """
    sets = evaluate_sets(checkpoint, student=student, teacher=teacher, reward=reward, evaluation=evaluation, **settings)
    return next(iter(sets.values()))


def evaluate_sets(
    checkpoint: str | Path | None = None,
    *,
    student: str | Path | None = None,
    teacher: str | Path | None = None,
    reward: str | Reward | None = None,
    evaluation: Prompts | None = None,
    **settings: Any,
) -> dict[str, EvaluationPoint]:
    """Figures of a model on every evaluation set, by name; "" is the set of `evaluation` itself."""
    prompts = None if _is_settings(evaluation) else evaluation  # of which the plan wants some
    given = _Given(None, student, teacher, prompts, reward, evaluation, settings)
    overrides = given.overrides()
    if checkpoint is not None and (not isinstance(checkpoint, str | os.PathLike) or not os.fspath(checkpoint)):
        raise ConfigurationError(
            f"checkpoint needs a run, a checkpoint of one, or a folder of a model, got {got(checkpoint)}; give its path"
        )
    with _own_loop(), _one_error(), as_model(str(checkpoint)) if checkpoint is not None else nullcontext() as folder:
        own = [] if folder is None else overrides_of({"student.path": folder}, {})
        return {point.set: point for point in evaluate_once(make_plan(_config([*overrides, *own])))}


def _config(overrides: Sequence[str]) -> RunConfig:
    check_arguments(overrides)
    forget()
    return run_config(overrides)


def _quiet(verbose: Any) -> bool:
    """Whether nothing is printed. Raises `ConfigurationError` about a text, of which every one would count as true."""
    if not isinstance(verbose, bool):
        raise ConfigurationError(
            f"verbose needs True or False, got {got(verbose)}; write verbose=False to print nothing"
        )
    return not verbose


def _followers(callbacks: Any, trackers: Any) -> list[MakeTracker]:
    """Makers of what follows a run. Raises `ConfigurationError` about what follows none."""
    for name, given in (("callbacks", callbacks), ("trackers", trackers)):
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise ConfigurationError(
                f"{name} needs a list, got {got(given)}; write {name}=[...], also for a single one"
            )
    return [*map(_called, count(), callbacks), *map(_logged, count(), trackers)]


def _called(number: int, callback: Callback) -> MakeTracker:
    if not callable(callback):
        raise ConfigurationError(
            f"callbacks[{number}] needs a function of the progress, got {got(callback)}; give a function"
        )
    return lambda meter, steps: CallbackTracker(callback, meter, steps)


def _logged(number: int, logger: Logger) -> MakeTracker:
    if not callable(getattr(logger, "log", None)):
        raise ConfigurationError(
            f"trackers[{number}] needs an object with log(data, step=), got {got(logger)}; shipped trackers "
            'are settings, as in tracker="wandb"'
        )
    return lambda meter, _: LoggerTracker(logger, meter)


@contextmanager
def _one_error() -> Iterator[None]:
    """Context out of which an error comes by itself: not the group of tasks it ended, nor what Ray made of it."""
    try:
        yield
    except ExceptionGroup as group:
        leaves = [one for one in causes(group) if not isinstance(one, ExceptionGroup)]
        alone = find_own(group) or (leaves[0] if len(leaves) == 1 else None)
        if alone is None:
            raise
        for note in getattr(group, "__notes__", ()):
            alone.add_note(note)
        raise alone from None


@contextmanager
def _own_loop() -> Iterator[None]:
    """Leave the event loop that a notebook runs its cells in, so that a run can have its own in this thread."""
    outer = asyncio._get_running_loop()
    asyncio._set_running_loop(None)
    try:
        yield
    finally:
        asyncio._set_running_loop(outer)


def _is_settings(given: Any) -> TypeGuard[Settings]:
    """Whether it is settings of prompts that are named elsewhere; with a path they are those of a file."""
    return isinstance(given, Mapping) and "path" not in given and not has_splits(given)


@dataclass(frozen=True, slots=True)
class _Given:
    """Arguments of a call, as overrides: options first, then their settings, the caller's own last."""

    method: str | Method | None
    student: str | Path | None
    teacher: str | Path | None
    prompts: Prompts | None
    reward: str | Reward | None
    evaluation: Prompts | None
    settings: Mapping[str, Any]

    def overrides(self) -> list[str]:
        """The same as a command line."""
        known = groups(own_folder([f"conf={self.settings['conf']}"] if "conf" in self.settings else []))
        below = {n: v for n, v in (("prompts", self.prompts), ("evaluation", self.evaluation)) if _is_settings(v)}
        below |= {
            name: given
            for name, given in (("prompts", self.prompts), ("evaluation", self.evaluation))
            if isinstance(given, str) and given in known[name] and not Path(given).exists()  # an option by its name
        }
        for name, given in below.items():
            if rows := [key for key in ("prompt", "messages") if isinstance(given, Mapping) and key in given]:
                raise ConfigurationError(
                    f"{name} is one mapping with {rows[0]!r}, and a mapping is settings of prompts; give a list of "
                    "such mappings, or a table (a DataFrame, a data set of datasets)"
                )
        if below:
            rest = replace(self, settings={**below, **self.settings})
            return replace(rest, **dict.fromkeys(below, None)).overrides()
        mine = overrides_of({name: value for name, value in self.settings.items() if name != "conf"}, known)
        options = [o for o in mine if o.partition("=")[0] in known and not o.partition("=")[2].startswith("{")]
        rest = [o for o in mine if o not in options]
        made = [*self._method(), *self._models(known), *self._prompts(), *self._reward()]
        conf = [o for o in made if o.startswith("conf=")]
        conf += [f"conf={self.settings['conf']}"] if "conf" in self.settings else []
        if len(conf) > 1:
            raise ConfigurationError(
                f"only one folder of options can be read, but {' and '.join(conf)} are wanted; write the parts as YAML "
                "of that folder (docs/adding_a_method.md)"
            )
        return [*options, *conf, *(o for o in made if not o.startswith("conf=")), *rest]

    @property
    def _folder(self) -> Path:
        return Path(str(self.settings.get("output_dir", "runs"))) / FOLDER

    def _method(self) -> list[str]:
        if self.method is None or isinstance(self.method, str):
            return [] if self.method is None else [f"method={self.method}"]
        if not isinstance(self.method, Method):
            raise ConfigurationError(
                f"method needs a name (opd methods) or a Method of parts, got {got(self.method)}; give one"
            )
        return part_option(self.method, "method", "given", self._folder)

    def _models(self, known: Mapping[str, Sequence[str]]) -> list[str]:
        found: list[str] = []
        for role, path in (("student", self.student), ("teacher", self.teacher)):
            if isinstance(path, str) and path in known[role]:
                found.append(f"{role}={path}")
            elif path is not None:
                found += [f"{role}=hf", *overrides_of({f"{role}.path": path}, {})]
        return found

    def _prompts(self) -> list[str]:
        if self.prompts is None:
            return self._held_out(self.evaluation) if self.evaluation is not None else []
        if isinstance(self.prompts, PromptSource):
            chosen = part_option(self.prompts, "prompts", "given", self._folder)
            return [*chosen, *(self._held_out(self.evaluation) if self.evaluation is not None else [])]
        path, columns, count = self._file(self.prompts, "prompts")
        training = ["prompts=dataset", *overrides_of({"prompts": {"path": path, **columns}}, {})]
        if self.evaluation is not None:
            return [*training, *self._held_out(self.evaluation)]
        if isinstance(self.settings.get("evaluation"), str):
            return training
        if "evaluation_sets" in self.settings:
            return [*training, "evaluation=none"]
        number = min(HELD_OUT, count) if count else HELD_OUT
        seen = {"evaluation.prompts": {"path": path, "prompts_per_step": number}}  # of which the plan warns
        return [*training, "evaluation=dataset", *overrides_of(seen, {})]

    def _held_out(self, given: Prompts) -> list[str]:
        if isinstance(given, PromptSource):
            raise ConfigurationError(
                "evaluation needs a file or a list of prompts; a source of prompts stands in a YAML of "
                "conf/evaluation (conf=DIR)"
            )
        path, columns, count = self._file(given, "evaluation")
        number = {"prompts_per_step": count} if count else {}
        return ["evaluation=dataset", *overrides_of({"evaluation.prompts": {"path": path, **columns, **number}}, {})]

    def _file(self, given: Any, name: str) -> tuple[str | Path, Mapping[str, Any], int]:
        """Path of prompts, further settings, and the length of a list (0: a file, which is not read yet)."""
        if isinstance(given, Mapping) and not has_splits(given):
            return given["path"], {key: value for key, value in given.items() if key != "path"}, 0
        return (given, {}, 0) if isinstance(given, str | Path) else prompts_file(given, self._folder, name)

    def _reward(self) -> list[str]:
        if self.reward is None:
            return []
        if isinstance(self.reward, str):
            return overrides_of({"prompts.task": self.reward}, {})
        if not callable(self.reward):
            raise ConfigurationError(
                f"reward needs the name of a grader or one function, got {got(self.reward)}; a function may "
                "add several rewards"
            )
        if self.prompts is None:
            raise ConfigurationError(
                "reward= grades the prompts of prompts=, of which there are none; give them, or name the experiment's "
                "own grader in a file (docs/grading.md)"
            )
        return overrides_of({f"graders.{REWARD}": reward_settings(self.reward), "prompts.task": REWARD}, {})
