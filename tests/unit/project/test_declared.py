"""Fields of classes in any style of import: found, or the class is one that cannot be read; never a field too few."""

import sys
from dataclasses import fields
from pathlib import Path

import pytest

from launch.config.composition.compose import compose
from launch.config.composition.keys import check_names
from opd.errors import ConfigurationError
from opd.settings.declared import settings

DATACLASS = "from dataclasses import dataclass\n"
FROZEN = "@dataclass(frozen=True, kw_only=True)\n"
MINE = FROZEN + "class Mine({base}):\n    own: int = 1\n"
STYLES = {
    "by name": ("from opd.scorers.teacher import TeacherTopK\n", "TeacherTopK"),
    "everything": ("from opd.scorers.teacher import *\n", "TeacherTopK"),
    "everything of everything": ("from .again import *\n", "TeacherTopK"),
    "a module": ("import opd.scorers.teacher\n", "opd.scorers.teacher.TeacherTopK"),
    "a renamed module": ("import opd.scorers.teacher as t\n", "t.TeacherTopK"),
    "a module of a package": ("from opd.scorers import teacher\n", "teacher.TeacherTopK"),
    "another name": ("from opd.scorers.teacher import TeacherTopK as Top\n", "Top"),
    "from beside it": ("from .beside import Beside\n", "Beside"),
    "from above": ("from ..parts.beside import Beside\n", "Beside"),
    "from the package": ("from . import Beside\n", "Beside"),
    "a module beside it": ("from . import beside\n", "beside.Beside"),
    "of a kind": ("from .beside import OfKind\n", "OfKind[int]"),
    "two bases": ("from abc import ABC\nfrom .beside import Beside\n", "Beside, ABC"),
    "a builtin": ("from .beside import Beside\n", "Beside, object"),
}
UNREAD = {
    "a call": ("from .beside import made\n", "made()"),
    "a variable": ("from .beside import Beside\nBase = Beside\n", "Base"),
    "under a condition": ("if True:\n    from .beside import Beside\n", "Beside"),
    "nowhere": (
        "try:\n    from nowhere_at_all import X\nexcept ImportError:\n    from .beside import Beside as X\n",
        "X",
    ),
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of parts beside `sys.path`'s others; settings are kept per class, so each test has a package's name."""
    name = f"own_{abs(hash(tmp_path)):x}"
    folder = tmp_path / name / "parts"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "__init__.py").write_text("from .beside import Beside\n")
    (folder / "again.py").write_text("from opd.scorers.teacher import *\n")
    (folder / "beside.py").write_text(
        f"{DATACLASS}from typing import Generic, TypeVar\nfrom opd.scorers.teacher import TeacherTopK\n"
        f"K = TypeVar('K')\n{FROZEN}class Beside(TeacherTopK):\n    more: int = 2\n"
        f"{FROZEN}class OfKind(TeacherTopK, Generic[K]):\n    more: int = 2\ndef made():\n    return Beside\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def written(package: Path, style: tuple[str, str]) -> str:
    (package / "mine.py").write_text(DATACLASS + style[0] + MINE.format(base=style[1]))
    return f"{package.parent.name}.parts.mine.Mine"


@pytest.mark.parametrize("style", STYLES)
def test_fields_of_bases_are_found_as_python_finds_them(style: str, package: Path) -> None:
    name = written(package, STYLES[style])
    found = settings(name)
    module = __import__(name.rpartition(".")[0], fromlist=["Mine"])
    assert found is not None and [*found] == [spec.name for spec in fields(module.Mine)]
    sys.modules.pop(module.__name__)
    options = ["experiment=shop", "method=topk_reverse_kl", f"method.scorer._target_={name}"]
    check_names(compose([*options, "method.scorer.k=4", "+method.scorer.own=3"]))
    with pytest.raises(ConfigurationError, match=r"there is no setting 'method\.scorer\.other'"):
        check_names(compose([*options, "+method.scorer.other=3"]))


@pytest.mark.parametrize("style", UNREAD)
def test_a_class_with_a_base_that_cannot_be_read_takes_any_field_until_it_is_made(style: str, package: Path) -> None:
    name = written(package, UNREAD[style])
    assert settings(name) is None
    options = ["experiment=shop", "method=topk_reverse_kl", f"method.scorer._target_={name}"]
    check_names(compose([*options, "method.scorer.k=4", "+method.scorer.own=3", "+method.scorer.other=1"]))
