"""`opd`, the program: dispatch to its commands (`launch.cli.help.USAGE`), most of which take Hydra overrides.

A verb imports what it needs when it is called: a typo and a question for help are answered before torch is imported.
"""

import atexit
import difflib
import faulthandler
import gc
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from launch.artifacts.redaction import check_arguments, masked
from launch.artifacts.terminal import console
from launch.cli.errors import keep_secrets, sentences
from launch.cli.flags import Flags, file_to_write, read_flags, without_methods
from launch.services.signals import end_on_signals
from opd.errors import ConfigurationError
from opd.heavy_imports import uncollected

if TYPE_CHECKING:
    from omegaconf import DictConfig

_DEMO = {
    "train": "nothing was asked for, so this is the embedded demo, opd train experiment=shop: 100 steps, some minutes "
    "on a CPU; your own models and prompts: opd train --help, and README",
    "eval": "no model was named, so this measures the embedded demo's student before its training; a run, or a model "
    "of your own: opd eval checkpoint=runs/NAME/export, or checkpoint=FOLDER",
    "doctor": "no model was named, so this examines the embedded demo's teacher; your own: opd doctor student=hf "
    "student.path=FOLDER teacher=hf teacher.path=FOLDER",
}
_OWN: Mapping[str, Sequence[str]] = {
    "compare": ("methods", "rates", "evaluations", "seeds", "budget", "amount", "reference", "target", "resume"),
    "eval": ("checkpoint", "output"),
    "doctor": ("output",),
    "certify": ("output",),
    "submit": ("address", "working_dir", "exclude", "follow"),
    "export": ("run", "output", "step", "student", "push", "public", "overwrite"),
    "runs": ("output_dir", "output", "yes"),
    "show": ("step", "output_dir"),
    "report": ("output_dir",),
    "serve-teacher": ("host", "port"),
    "selftest": ("only", "output"),
}
"""Arguments `name=value` of the commands themselves, by command."""
_NAMED = ("experiment", "student", "student.path", "teacher", "teacher.path", "checkpoint", "conf")
"""Settings of which one names a model."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0, 2 for a wrong request, 1 for a failure, 130 when interrupted, 75 when SIGTERM left a
    checkpoint to resume from.
    """
    end_on_signals()  # before anything takes its time
    atexit.register(gc.freeze)  # Python's end looks through everything several times, for 2.4 CPU s, and frees nothing
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("OPD_STARTED", str(monotonic()))  # start-up is measured from here
    # kill -USR1 PID: where every thread of a run that seems to hang stands
    if sys.__stderr__ is not None:  # as in a program without a console
        faulthandler.register(signal.SIGUSR1, file=sys.__stderr__)
    keep_secrets()
    with sentences(console(stderr=True)):
        check_arguments(without_methods(arguments) if arguments[:1] == ["compare"] else arguments)
        sys.exit(_dispatch(arguments))


def _dispatch(arguments: Sequence[str]) -> int:
    commands: Mapping[str, Callable[[Sequence[str]], int]] = {
        "train": _train,
        "compare": _compare,
        "eval": _eval,
        "doctor": _doctor,
        "methods": _methods,
        "certify": _certify,
        "submit": _submit,
        "runs": _runs,
        "show": _look,
        "report": _report,
        "export": _export,
        "serve-teacher": _serve_teacher,
        "env": _env,
        "selftest": _selftest,
    }
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return _help(arguments[1] if len(arguments) > 1 and arguments[1] in commands else "", [], [])
    name, rest = arguments[0], arguments[1:]
    if name in ("--version", "-V", "version"):
        print(f"opd {version('opd')}")
        return 0
    if name not in commands:
        close = difflib.get_close_matches(name, commands, n=1)
        meant = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigurationError(f"there is no command {name!r}; {meant}commands are {', '.join(commands)}")
    flags = read_flags(rest, _OWN.get(name, ()))
    if flags.helps:
        return _help(name, flags.words, flags.rest)
    if flags.shows:
        return _show(flags)
    if flags.info is not None:
        return _info(flags.rest, flags.info)
    if flags.sweeps and name == "submit":
        return _submit([*flags.rest, "-m"])
    if flags.sweeps:
        return _sweep(name, flags.rest)
    return commands[name](flags.rest)


def _help(command: str, words: Sequence[str], overrides: Sequence[str]) -> int:
    from launch.cli.help import show_help

    show_help(command, words, overrides, console())
    return 0


def _show(flags: Flags) -> int:
    """Print the configuration, secrets left out: `--cfg job [--package learner] [--resolve]`."""
    import yaml
    from omegaconf import OmegaConf

    from launch.artifacts.redaction import redacted
    from launch.config.composition.compose import part_of

    node = part_of(_checked(flags.rest), flags.package, resolved=flags.resolved)
    print(
        yaml.safe_dump(redacted(yaml.safe_load(OmegaConf.to_yaml(node))), sort_keys=False, allow_unicode=True), end=""
    )
    return 0


def _info(overrides: Sequence[str], name: str) -> int:
    """Print the sources of the configuration: `--info [defaults|defaults-tree|searchpath|config|all]`."""
    from launch.config.composition.sources import View, sources, view_of

    view = view_of(name)
    _checked(overrides)
    for line in sources(overrides, view):
        print(masked(line))
    if view in (View.CONFIG, View.ALL):
        print("\nthe configuration")
        return _show(Flags(rest=overrides))
    return 0


def _sweep(command: str, overrides: Sequence[str]) -> int:
    if command != "train":
        raise ConfigurationError(f"-m is for opd train, which then trains several runs; opd {command} runs once")
    from launch.cli.sweep.points import points_of

    points = points_of(overrides)
    _checked(points[0].overrides)  # a mistyped name is answered before anything heavy is imported
    with uncollected():
        from launch.cli.sweep.command import run_sweep

    return run_sweep(points, overrides)


def _checked(overrides: Sequence[str]) -> "DictConfig":
    """The composed configuration, all of whose keys exist; a part of a run is imported only after this."""
    from launch.cli.stages import without_stages
    from launch.config.composition.compose import compose
    from launch.config.composition.keys import check_names

    node = compose(shared := without_stages(overrides))
    check_names(node, shared)
    return node


def _train(overrides: Sequence[str]) -> int:
    from launch.cli.stages import stages_of, without_stages

    node = _checked(overrides)
    stages = stages_of(node, overrides)
    if not overrides:
        _tell_demo("train")
    with uncollected():
        from launch.cli.compare.command import run_comparison
        from launch.cli.staged_run import run_stages
        from launch.cli.train import run_training

    if stages:
        return run_stages(stages, node, without_stages(overrides))
    return run_comparison(overrides) if "comparison" in node else run_training(overrides)


def _compare(arguments: Sequence[str]) -> int:
    from launch.cli.compare.command import compare_methods

    return compare_methods(arguments)


def _names_model(overrides: Sequence[str]) -> bool:
    """Whether an override names a model, directly or by an experiment; otherwise the demo's are meant."""
    return any(override.lstrip("+").partition("=")[0] in _NAMED for override in overrides)


def _tell_demo(command: str) -> None:
    console(stderr=True).print(_DEMO[command], soft_wrap=True, highlight=False)


def _eval(overrides: Sequence[str]) -> int:
    own, rest = _split(overrides, _OWN["eval"])
    output = file_to_write("eval", own["output"]) if "output" in own else None
    if "checkpoint" not in own:
        return _evaluate(rest, output, named=_names_model(rest))
    from launch.run.export import as_model

    with as_model(own["checkpoint"]) as folder:
        return _evaluate([*rest, f"student.path={folder}"], output)


def _evaluate(overrides: Sequence[str], output: Path | None, *, named: bool = True) -> int:
    _checked(overrides)
    if not named:
        _tell_demo("eval")
    from launch.cli.train import run_evaluation

    return run_evaluation(overrides, output)


def _doctor(overrides: Sequence[str]) -> int:
    own, rest = _split(overrides, _OWN["doctor"])
    _checked(rest)
    if not _names_model(rest):
        _tell_demo("doctor")
    from launch.run.doctor import run_doctor

    return run_doctor(rest, file_to_write("doctor", own["output"]) if "output" in own else None)


def _methods(arguments: Sequence[str]) -> int:
    from launch.cli.methods import list_methods, show_method

    named = [argument for argument in arguments if "=" not in argument]
    rest = [argument for argument in arguments if "=" in argument]
    if wrong := [argument for argument in rest if not argument.startswith("conf=")]:
        raise ConfigurationError(f"opd methods takes no setting but conf=DIR, got {wrong[0]!r}; leave it out")
    if not named:
        return list_methods(rest, console())
    if named[0] != "show" or len(named) != 2:
        raise ConfigurationError(
            f"opd methods has no {' '.join(named)!r}: opd methods lists all methods, opd methods show NAME one; "
            "write it so"
        )
    return show_method(named[1], rest, console())


def _certify(overrides: Sequence[str]) -> int:
    own, rest = _split(overrides, _OWN["certify"])
    if not any(o.startswith("method=") and "," in o for o in rest):  # of which certifying says more
        _checked(rest)
    from launch.cli.certify import certify_methods

    return certify_methods(rest, own.get("output", ""), console())


def _submit(arguments: Sequence[str]) -> int:
    from launch.cli.submit import SubmitOptions, submit

    own, command = _split(arguments, _OWN["submit"])
    command = command[command[:1] == ["opd"] :]  # as it is typed on one machine
    if not command or command[0] not in ("train", "eval"):
        raise ConfigurationError(
            f"opd submit needs a command to run there, train or eval, got {command[0] if command else 'none'}; write "
            "e.g. opd submit address=URL train steps=50"
        )
    address = own.get("address") or os.environ.get("RAY_ADDRESS", "")
    check_arguments([f"address={address}"])
    if not address:
        raise ConfigurationError("opd submit needs the cluster: address=http://HOST:8265 (or RAY_ADDRESS)")
    follow = own.get("follow", "true").lower()
    if follow not in ("true", "false"):
        raise ConfigurationError(f"follow is true or false, got {follow!r}; correct it")
    options = SubmitOptions(
        address=address,
        working_dir=own.get("working_dir", "."),
        exclude=[part for part in own.get("exclude", "").split(",") if part],
        follow=follow == "true",
    )
    return submit(command, options, console())


def _export(arguments: Sequence[str]) -> int:
    own, rest = _split(arguments, _OWN["export"])
    if rest or "run" not in own or not {"output", "push"} & set(own):
        raise ConfigurationError(
            "opd export needs run=NAME_OR_DIRECTORY and output=NEW_FOLDER or push=ORG/NAME, and takes step=N, "
            f"student=FOLDER, public=true and overwrite=true beside them, got {' '.join(arguments) or 'none'}; write "
            "e.g. opd export run=NAME output=FOLDER"
        )
    from launch.run.export import export_and_push, export_run
    from launch.run.push import PushRequest

    request, more = PushRequest.of(own), (own.get("step", ""), own.get("student", ""))
    if request is None:
        print(export_run(own["run"], own["output"], *more))
    else:
        print(export_and_push(own["run"], own.get("output", ""), *more, request))
    return 0


def _runs(arguments: Sequence[str]) -> int:
    from launch.cli.runs import manage_runs

    own, rest = _split(arguments, _OWN["runs"])
    return manage_runs(rest, own, console())


def _look(arguments: Sequence[str]) -> int:
    from launch.cli.runs import show_step

    own, rest = _split(arguments, _OWN["show"])
    return show_step(_one_run("show", rest, own), own.get("step", ""), own.get("output_dir", ""), console())


def _report(arguments: Sequence[str]) -> int:
    from launch.cli.runs import write_again

    own, rest = _split(arguments, _OWN["report"])
    return write_again(_one_run("report", rest, own), own.get("output_dir", ""), console())


def _one_run(command: str, rest: Sequence[str], own: Mapping[str, str]) -> str:
    from launch.cli.runs import FOLDER, is_there

    named = [word.removeprefix("run=") for word in rest]
    if len(named) != 1 or ("=" in named[0] and not is_there(named[0], Path(own.get("output_dir", FOLDER)))):
        given = " ".join(rest) or "none"
        raise ConfigurationError(
            f"opd {command} needs one run, by its name or its directory, got {given}; write opd {command} NAME"
        )
    return named[0]


def _serve_teacher(arguments: Sequence[str]) -> int:
    own, rest = _split(arguments, _OWN["serve-teacher"])
    _checked(rest)
    from launch.cli.serve_teacher import serve_teacher

    return serve_teacher(own, rest, console())


def _env(arguments: Sequence[str]) -> int:
    from launch.plan.environment import show_environment

    if arguments:
        raise ConfigurationError(f"opd env takes no arguments, got {list(arguments)}")
    show_environment(console())
    return 0


def _selftest(arguments: Sequence[str]) -> int:
    from launch.cli.selftest.command import run_selftest

    own, rest = _split(arguments, _OWN["selftest"])
    if rest:
        raise ConfigurationError(f"opd selftest takes only=CHECK,... and output=FILE, got {rest[0]!r}; leave it out")
    return run_selftest(own, console())


def _split(arguments: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Arguments `name=value` of the command itself, and the rest."""
    own = {a.split("=", 1)[0]: a.split("=", 1)[1] for a in arguments if a.split("=", 1)[0] in names and "=" in a}
    return own, [a for a in arguments if a.split("=", 1)[0] not in own]
