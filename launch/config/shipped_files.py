"""Files shipped with the program, conf/ and assets/, and the user's own conf/ on top of them."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from opd.errors import ConfigurationError

_END = re.compile(r"(?<!\beq)(?<!\beqs)(?<!\bsec)(?<!\bcf)(?<!e\.g)(?<!i\.e)\.\s")  # of a sentence
_LAUNCH = Path(__file__).resolve().parents[1]


def shipped(name: str) -> Path:
    """Path of a folder of the project: beside `launch/` in a checkout, inside it in an installed wheel."""
    for parent in (_LAUNCH.parent, _LAUNCH):
        if (parent / name).is_dir():
            return parent / name
    raise ConfigurationError(f"the folder {name}/ is missing from this installation; reinstall the project")


def option_files(own: str = "") -> dict[str, dict[str, Path]]:
    """The YAML file of every option of every group; `own` is a folder of the user's.

    Raises `ConfigurationError` about an option of the user's that is called like one of ours: Hydra would take ours.
    """
    roots = [shipped("conf"), *([Path(own)] if own else [])]
    for ours in sorted(shipped("conf").glob("*/**/*.yaml")) if own else ():
        theirs = Path(own) / ours.relative_to(shipped("conf"))
        if theirs.is_file() and not theirs.samefile(ours):
            group, _, option = str(ours.relative_to(shipped("conf")).with_suffix("")).partition("/")
            raise ConfigurationError(f"{theirs} is called like an option of the project, {group}={option}; rename it")
    names = sorted({p.name for root in roots for p in root.iterdir() if p.is_dir()})
    return {name: dict(sorted(_options(root / name for root in roots))) for name in names}


def _options(folders: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    """Name and file of every option, those in folders too, as in `published/fire`."""
    for folder in folders:
        for file in folder.rglob("*.yaml"):
            yield str(file.relative_to(folder).with_suffix("")), file


def groups(own: str = "") -> dict[str, list[str]]:
    """Config groups and their options, e.g. `{"method": ["full_reverse_kl", ...]}`."""
    return {name: list(options) for name, options in option_files(own).items()}


def head_comment(path: Path) -> str:
    """Comment at the top of a YAML file, as one text."""
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def first_sentence(path: Path) -> str:
    """First sentence of the comment at the top of a YAML file, without its period."""
    return _END.split(head_comment(path), maxsplit=1)[0].rstrip(".")
