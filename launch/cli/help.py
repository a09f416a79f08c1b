"""`--help` of every command, group and key, from the sources alone: no part of a run is imported."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launch.config.composition.compose import compose, own_folder
from launch.config.composition.keys import Key, keys
from launch.config.shipped_files import first_sentence, groups, option_files
from opd.errors import ConfigurationError

USAGE = """\
usage: opd COMMAND [OVERRIDE ...]

  opd train  [OVERRIDE ...]              train a student, e.g. opd train method=topk_reverse_kl steps=50
             experiment=shop             the embedded demo
             resume=latest run_name=...  go on from a run's newest checkpoint (or a step, or another run's checkpoint);
                                         resume=auto  the same, or begin it: one command for a job that is repeated
             dry_run=true                check everything, print the plan, start nothing
             -m learner.lr=1e-4,3e-4 seed=0,1   a run for each combination, and one table; resume=latest goes on
  opd compare methods=[A,B,...] [seeds=3] [budget=steps|tokens|flops|cpu_s] [amount=N] [OVERRIDE ...]
             several methods at one budget, each at the best of three learning rates (rates=[0.5,1,2] times learner.lr)
             METHOD.KEY=VALUE            a setting of one method alone;  validation.KEY=VALUE  of the trials alone
             reference=METHOD target=0.9 whose final accuracy all should reach (the last method's), or which
             evaluations=10              at equal shares of the budget;  run_name=... resume=true  go on, or share it
             experiment=compare          arms from a YAML file instead of methods=[...];  dry_run=true  runs and steps
  opd eval   [checkpoint=DIR] [output=FILE.json] [...]   measure a student: a run, a checkpoint of it, or any folder
  opd doctor [teacher.path=DIR] [output=FILE] [...]   may this teacher teach this student?
  opd methods [show NAME] [conf=DIR]     all methods, a line each with its paper, or the composition of one
  opd certify [method=NAME] [output=FILE.json]   prove that a method's gradient is what its name says (default: all)
  opd runs   [SWEEP | compare A B ... | delete A ... yes=true] [output_dir=DIR]   the runs that were made
  opd show RUN [step=N]                  numbers and kept completions of a step (the last one)
  opd report RUN                         the page of a run or a sweep again, also while it goes on
  opd export run=NAME output=DIR [step=N]   a run's student as a Hugging Face folder, finished or as step N left it
             push=ORG/NAME [public=true] [overwrite=true]   ... as a repository on the hub, private unless public
  opd submit address=URL [working_dir=DIR] [exclude=A,B] [follow=false] COMMAND output_dir=/SHARED [...]
             the same on a running Ray cluster
  opd serve-teacher [teacher=...] [host=127.0.0.1] [port=8300]   answer runs elsewhere; needs OPD_TEACHER_TOKEN
  opd env                                versions, devices, and what is missing
  opd selftest [only=CHECK,...] [output=FILE.json]   does this machine compute right? (minutes)

Overrides are Hydra's: group=option or key=value.
  opd train --help                       groups and their options
  opd train --help method                the options of a group, a line each
  opd train --help learner               settings with their values; any word searches: opd train --help lr
  opd train [...] --cfg job              the whole configuration as YAML (--package learner: a part; --resolve)
  opd train [...] --info                 where it comes from: files, in which order, and the overrides"""


def show_help(command: str, words: Sequence[str], overrides: Sequence[str], console: Console) -> None:
    """Print the page of `command`, or of each of `words`: a group, a key, or a word to search for."""
    if not words:
        print(USAGE if not command else _page(command))
        if command in _CONFIGURED:
            print()
            for group, options in groups().items():
                print(f"  {group:11} {', '.join(options)}")
        return
    own = own_folder(overrides)
    known = keys(compose(overrides))
    for word in words:
        options = option_files(own).get(word, {})
        found = _matching(word, known)
        if not options and not found:
            raise ConfigurationError(f"no setting and no group is about {word!r}; opd train --help lists the groups")
        if options:
            console.print(_options(word, options))
        if found:
            console.print(_settings(word, found))


_CONFIGURED = frozenset({"train", "compare", "eval", "doctor", "certify", "submit", "serve-teacher"})


def _page(command: str) -> str:
    """Usage lines of `command`, and how to get more help."""
    lines = USAGE.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"  opd {command}"))
    end = next((i for i in range(start + 1, len(lines)) if not lines[i].startswith("    ")), len(lines))
    more = lines[lines.index("Overrides are Hydra's: group=option or key=value.") :] if command in _CONFIGURED else []
    return "\n".join([*lines[start:end], "", *more]).rstrip()


def _matching(word: str, known: Sequence[Key]) -> list[Key]:
    """The key of that name and those below it; else all keys with the word in their name, or else in their text."""
    exact = [key for key in known if key.name == word or key.name.startswith(f"{word}.")]
    named = [key for key in known if word.lower() in key.name.lower()]
    return exact or named or [key for key in known if word.lower() in key.text.lower()]


def _options(group: str, options: Mapping[str, Path]) -> Table:
    shown = Table(title=f"{group}=...", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, path in options.items():
        shown.add_row(name, first_sentence(path))
    return shown


def _settings(title: str, found: Sequence[Key]) -> Table:
    shown = Table(title=title, box=None, padding=(0, 2, 0, 0))
    shown.add_column("setting", no_wrap=True)
    for heading in ("type", "value", ""):
        shown.add_column(heading, overflow="fold")
    for key in found:
        shown.add_row(key.name, f"{key.kind} {key.bounds}".strip(), key.value, key.text)
    return shown
