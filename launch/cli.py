"""`opd`: one program; its verbs are in `USAGE`, and most take Hydra overrides."""

import faulthandler
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from time import time

from rich.console import Console

from launch.sentences import sentences
from opd.errors import ConfigurationError

USAGE = """\
usage: opd COMMAND [OVERRIDE ...]

  opd train  [OVERRIDE ...]              train a student, e.g. opd train method=topk_reverse_kl steps=50
             experiment=shop             the embedded demo;  experiment=compare  OPD, GRPO and SFT side by side
             resume=latest run_name=...  go on from a run's newest checkpoint (or a step, or another run's checkpoint)
             dry_run=true                check everything, print the plan, start nothing
  opd eval   [checkpoint=DIR] [...]      measure a student (a run's export/ or any Hugging Face folder)
  opd doctor [teacher.path=DIR] [output=FILE] [...]   may this teacher teach this student?
  opd certify [method=NAME] [output=FILE.json]   prove that a method's gradient is what its name says (default: all)
  opd export run=DIR output=DIR          copy a run's student out as a Hugging Face folder
  opd submit address=URL [working_dir=DIR] COMMAND [...]   the same on a running Ray cluster
  opd serve-teacher [teacher=...] [host=127.0.0.1] [port=8300]   answer runs elsewhere; needs OPD_TEACHER_TOKEN
  opd env                                versions, devices, and what is missing

Overrides are Hydra's: group=option or key=value. Groups and options: opd train --help"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exits 0, 2 for a wrong request, 1 for a failure, 130 when interrupted, 75 when SIGTERM left a
    checkpoint to go on from."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("OPD_STARTED", str(time()))  # start-up is measured from here
    faulthandler.register(signal.SIGUSR1)  # kill -USR1 PID: where every thread of a run that seems to hang stands
    console = Console(stderr=True)
    with sentences(console):
        sys.exit(_dispatch(arguments))


def _dispatch(arguments: Sequence[str]) -> int:
    commands: Mapping[str, Callable[[Sequence[str]], int]] = {
        "train": _train,
        "eval": _eval,
        "doctor": _doctor,
        "certify": _certify,
        "submit": _submit,
        "export": _export,
        "serve-teacher": _serve_teacher,
        "env": _env,
    }
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in commands:
        raise ConfigurationError(f"there is no command {name!r}; commands are {', '.join(commands)}")
    if any(a in ("-h", "--help") for a in rest):
        return _help()
    return commands[name](rest)


def _help() -> int:
    from launch.compose import groups

    print(USAGE)
    for group, options in groups().items():
        print(f"  {group:11} {', '.join(options)}")
    return 0


def _train(overrides: Sequence[str]) -> int:
    from launch.compare import is_comparison, run_comparison
    from launch.train import run_training

    return run_comparison(overrides) if is_comparison(overrides) else run_training(overrides)


def _eval(overrides: Sequence[str]) -> int:
    from launch.train import run_evaluation

    own, rest = _split(overrides, ("checkpoint",))
    if "checkpoint" in own:
        rest = [*rest, f"student.path={own['checkpoint']}"]
    return run_evaluation(rest)


def _doctor(overrides: Sequence[str]) -> int:
    from launch.doctor import run_doctor

    own, rest = _split(overrides, ("output",))
    return run_doctor(rest, own.get("output", ""))


def _certify(overrides: Sequence[str]) -> int:
    from launch.certify import certify_methods

    own, rest = _split(overrides, ("output",))
    return certify_methods(rest, own.get("output", ""), Console())


def _submit(arguments: Sequence[str]) -> int:
    from launch.submit import SubmitOptions, submit

    own, command = _split(arguments, ("address", "working_dir"))
    if not command or command[0] not in ("train", "eval"):
        raise ConfigurationError("opd submit needs a command to run there, e.g. opd submit address=URL train steps=50")
    address = own.get("address") or os.environ.get("RAY_ADDRESS", "")
    if not address:
        raise ConfigurationError("opd submit needs the cluster: address=http://HOST:8265 (or RAY_ADDRESS)")
    options = SubmitOptions(address=address, working_dir=own.get("working_dir", "."))
    return submit(command, options, Console())


def _export(arguments: Sequence[str]) -> int:
    from launch.export import export_run

    own, rest = _split(arguments, ("run", "output"))
    if rest or set(own) != {"run", "output"}:
        raise ConfigurationError("opd export needs run=RUN_DIRECTORY output=NEW_FOLDER and nothing else")
    print(export_run(own["run"], own["output"]))
    return 0


def _serve_teacher(arguments: Sequence[str]) -> int:
    from launch.serve_teacher import serve_teacher

    own, rest = _split(arguments, ("host", "port"))
    return serve_teacher(own, rest, Console())


def _env(arguments: Sequence[str]) -> int:
    from launch.environment import show_environment

    if arguments:
        raise ConfigurationError(f"opd env takes no arguments, got {list(arguments)}")
    show_environment(Console())
    return 0


def _split(arguments: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Arguments `name=value` of the command itself, and the rest."""
    own = {a.split("=", 1)[0]: a.split("=", 1)[1] for a in arguments if a.split("=", 1)[0] in names and "=" in a}
    return own, [a for a in arguments if a.split("=", 1)[0] not in own]


if __name__ == "__main__":
    main()
