"""Data sets of the hub as folders here: the files of one split, in their order, as links into the library's cache."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants

from hf.hub.cache import Snapshot, is_here, storing
from hf.hub.client import fetch
from hf.hub.layout import Chosen, choose, configurations
from hf.hub.models import Announce, Fetched

_README = "README.md"


def fetch_data(known: Snapshot, endings: Sequence[str], announce: Announce) -> Fetched:
    """The files of the split that a snapshot's name means, as a folder.

    Raises:
        ConfigurationError: there is no such configuration or split; the sentence lists those that exist.
        DataError: the README contradicts itself.
        OpdError: fetching failed.
    """
    readme = ""
    if _README in known.files:
        folder = fetch(known, [_README], lambda _: None)
        readme = (folder / _README).read_text(encoding="utf-8", errors="replace")
    configs = configurations(list(known.files), readme, known.part)
    chosen = choose(known.name, configs, known.key, endings)
    folder = fetch(known, chosen.files, announce(known, [file for file in chosen.files if not is_here(known, file)]))
    with storing(known.part):
        links = _links(chosen, known.commit, folder)
    return Fetched(
        name=chosen.name.at(known.commit),
        asked=str(known.name),
        folder=links,
        size=sum(max(0, known.files[file]) for file in chosen.files),
        offline=known.offline,
    )


def _links(chosen: Chosen, commit: str, cached: Path) -> Path:
    """A folder with nothing but the split's files, named in their order."""
    home = Path(constants.HF_HOME) / "opd" / "datasets"
    inner = Path(chosen.name.repo.replace("/", "--"), commit, chosen.name.config, chosen.name.split)
    folder = home / inner
    names = {f"{i:05d}-{Path(file).name}": cached / file for i, file in enumerate(chosen.files)}
    if folder.is_dir() and {p.name: Path(os.readlink(p)) for p in folder.iterdir() if p.is_symlink()} == names:
        return folder
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name, target in names.items():
        (part / name).symlink_to(target)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return folder
