"""No benchmark is left without a test that runs it, since nothing else would notice that it stopped to work."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command import ROOT


def commands(root: Path) -> dict[str, str]:
    """Name -> file of every module below `benchmarks/` that is a command, by its text."""
    return {
        str(path.relative_to(root).with_suffix("")).replace("/", "."): str(path.relative_to(root))
        for path in sorted((root / "benchmarks").rglob("*.py"))
        if _is_command(ast.parse(path.read_text()))
    }


def _is_command(tree: ast.Module) -> bool:
    """It has a function `main`, or compares something with "__main__"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == "main":
            return True
        if isinstance(node, ast.Compare) and "__main__" in ast.unparse(node):
            return True
    return False


def run_by_tests(root: Path) -> set[str]:
    """The names that tests hand to `here` or `apart` to see what is printed; a command that is refused is not run."""
    return {
        name
        for path in (root / "tests").rglob("test_benchmarks.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        for name in _handed_over(node)
    }


def _handed_over(test: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(test):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
            continue
        call = node.value
        if isinstance(call.func, ast.Name) and call.func.id in ("here", "apart") and call.args:
            name = call.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield name.value


def test_every_benchmark_is_run_by_a_test() -> None:
    known, tested = commands(ROOT), run_by_tests(ROOT)
    assert len(known) >= 7
    assert not known.keys() - tested, f"no test runs {sorted(known.keys() - tested)}"
    assert not tested - known.keys(), f"tests run what is no command: {sorted(tested - known.keys())}"


@pytest.mark.parametrize(
    "text",
    ["def main() -> None:\n    print(1)\n", "import sys\nif __name__ == '__main__':\n    print(sys.argv)\n"],
    ids=["a function main", "a guard"],
)
def test_a_new_benchmark_without_a_test_is_noticed(text: str, tmp_path: Path) -> None:
    (tmp_path / "benchmarks" / "more").mkdir(parents=True)
    (tmp_path / "benchmarks" / "more" / "new.py").write_text(text)
    (tmp_path / "benchmarks" / "parts.py").write_text("def helper() -> None: ...\n")
    tests = tmp_path / "tests" / "unit" / "test_benchmarks.py"
    tests.parent.mkdir(parents=True)
    tests.write_text("def test_another() -> None:\n    printed = here('benchmarks.old')\n")
    assert commands(tmp_path).keys() - run_by_tests(tmp_path) == {"benchmarks.more.new"}
    tests.write_text("def test_it() -> None:\n    printed = here('benchmarks.more.new', '1')\n")
    assert not commands(tmp_path).keys() - run_by_tests(tmp_path)
