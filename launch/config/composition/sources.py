"""Sources of a configuration: where options are looked for, which files a command composes, and in which order."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path

from hydra._internal.defaults_list import DefaultsList
from hydra.core.default_element import DefaultsTreeNode, GroupDefault, InputDefault, VirtualRoot
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from launch.config.composition.compose import hydra_started, own_folder, readable
from launch.config.shipped_files import shipped
from opd.errors import ConfigurationError


class View(Enum):
    """Views of `--info`, by Hydra's names."""

    DEFAULTS = "defaults"
    TREE = "defaults-tree"
    SEARCH_PATH = "searchpath"
    CONFIG = "config"
    ALL = "all"


def view_of(name: str) -> View:
    """The view of that name; "" is all. Raises `ConfigurationError` about any other."""
    if not name:
        return View.ALL
    known = [view.value for view in View]
    if name == "plugins":
        raise ConfigurationError(
            f"--info plugins lists parts of Hydra that opd does not use; write --info {'|'.join(known)}"
        )
    if name not in known:
        raise ConfigurationError(f"--info {name} is no view of the configuration; write --info {'|'.join(known)}")
    return View(name)


def sources(overrides: Sequence[str], view: View) -> list[str]:
    """Lines about the sources of the configuration that `overrides` compose, without the configuration itself."""
    parts: Mapping[View, Callable[[Sequence[str]], Iterator[str]]] = {
        View.SEARCH_PATH: _search_path,
        View.TREE: _tree,
        View.DEFAULTS: _defaults,
    }
    chosen = parts if view in (View.CONFIG, View.ALL) else {view: parts[view]}
    lines: list[str] = []
    for part in chosen.values():
        lines += [*([""] if lines else []), *part(overrides)]
    return lines


def _search_path(overrides: Sequence[str]) -> Iterator[str]:
    own = own_folder(overrides)
    yield "options are looked for in"
    yield f"  {shipped('conf')}"
    if own:
        yield f"  {own}  (conf={own})"


def _defaults(overrides: Sequence[str]) -> Iterator[str]:
    """Composed files in their order, and the overrides."""
    own = own_folder(overrides)
    files = [one for one in _list(overrides).defaults if not str(one.config_path).startswith(_HYDRAS)]
    rows = [(_file(str(one.config_path), own), one.package or "everything", one.parent or "") for one in files]
    wide, medium = (max(len(row[column]) for row in rows) for column in (0, 1))
    yield "files in the order in which they are composed (what stands below wins), what they set, and what names them"
    for file, package, parent in rows:
        yield f"  {file:{wide}}  {package:{medium}}  {'' if parent == '<root>' else parent}".rstrip()
    given = [override for override in overrides if not override.startswith("conf=")]
    if given:
        yield "and then the overrides"
        yield from (f"  {override}" for override in given)


def _file(path: str, own: str) -> str:
    """File of a composed configuration: below `conf/`, or with the user's own folder before it."""
    theirs = Path(own) / f"{path}.yaml"
    return str(theirs) if own and theirs.is_file() else f"{path}.yaml"


def _tree(overrides: Sequence[str]) -> Iterator[str]:
    """Composed files below those that name them."""
    yield "files below those that name them"
    yield from _branch(_list(overrides).defaults_tree, 0)


def _branch(node: DefaultsTreeNode | InputDefault, depth: int) -> Iterator[str]:
    one = node.node if isinstance(node, DefaultsTreeNode) else node
    inner = (node.children or []) if isinstance(node, DefaultsTreeNode) else []
    if not isinstance(one, VirtualRoot):
        path = one.get_config_path()
        if path.startswith(_HYDRAS):
            return
        chosen = isinstance(one, GroupDefault)
        yield f"{'  ' * depth}{f'{one.get_override_key()}: {one.get_name() or NOTHING}' if chosen else path}"
    for child in inner:
        yield from _branch(child, depth + 1)


NOTHING = "null"
_HYDRAS = "hydra/"  # files of Hydra's own, about jobs that it does not start here


def _list(overrides: Sequence[str]) -> DefaultsList:
    """The defaults list as Hydra computes it."""
    wanted = readable(overrides)
    with hydra_started(own_folder(overrides)):
        return GlobalHydra.instance().config_loader().compute_defaults_list("config", wanted, RunMode.RUN)
