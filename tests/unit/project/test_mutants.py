"""Faults are put where a test could notice them, the right tests are asked, and the tree stays as it is."""

import ast
from pathlib import Path

import pytest

from tests.mutants import trials
from tests.mutants.__main__ import sample
from tests.mutants.coverage_map import Covered, asked
from tests.mutants.operators import mutants
from tests.mutants.scope import OF_ALL, ROOT, askable, sources
from tests.mutants.trials import Result, Trial, run

SOURCE = '''"""A file."""

import os

_SPARE_S = 5.0
MOST: int = 3


def first(numbers: list[int], most: int = 2) -> int:
    """The first `most` > 0."""
    assert most > 0, f"{most + 1} is too small"
    if not numbers:
        raise ValueError(f"needs {most + 1}")
    logger.info("has %d", len(numbers) + 1)
    total = 0
    for i in range(most):
        total += numbers[i] * 10  # of those
    return max(total, divide(total, most), key=abs)
'''


def test_a_sample_stays_what_it_was_where_the_code_did(tmp_path: Path) -> None:
    file = tmp_path / "opd" / "loop" / "ledger.py"
    file.parent.mkdir(parents=True)
    file.write_text(SOURCE)
    before = sample(tmp_path, 6, 1, ["ledger"])
    file.write_text(SOURCE.replace("import os", "import os\nMORE = 17\nLESS = not MORE") + "\nLAST = MORE - 4\n")
    after = sample(tmp_path, 50, 1, ["ledger"])
    said = [[(m.kind, m.text) for _, m in chosen] for chosen in (before, after)]
    assert [one for one in said[1] if one in said[0]] == said[0] and len(said[1]) > len(said[0])
    assert sample(tmp_path, 6, 2, ["ledger"]) != after[:6]


def changed(source: str) -> dict[tuple[int, str], str]:
    """(line, text of the fault) -> what stood there."""
    found = mutants("a.py", source.encode())
    return {(m.lines[0], m.text): source.encode()[m.start : m.stop].decode() for m in found}


def test_faults_are_put_where_a_test_could_notice_them() -> None:
    found = changed(SOURCE)
    expected = {
        (6, "4"): "3",
        (9, "3"): "2",
        (12, "not (not numbers)"): "not numbers",
        (12, "(numbers)"): "not numbers",
        (13, "pass"): 'raise ValueError(f"needs {most + 1}")',
        (15, "1"): "0",
        (16, "most - 1"): "most",
        (17, "total -= numbers[i] * 10"): "total += numbers[i] * 10",
        (17, "pass"): "total += numbers[i] * 10",
        (17, "(numbers[i] / 10)"): "numbers[i] * 10",
        (17, "11"): "10",
        (18, "min"): "max",
        (18, "divide(most, total)"): "divide(total, most)",
    }
    assert found == expected  # so nothing in annotations, messages, logging, assertions, deadlines


def test_nearly_every_fault_of_a_file_is_another_program() -> None:
    path = "opd/loss/packing.py"
    source = (ROOT / path).read_bytes()
    found = mutants(path, source)
    assert len(found) > 100 and len({one.applied(source) for one in found}) == len(found)
    some = found[::9]
    assert sum(one.compiles(source) for one in some) > 0.9 * len(some)
    for one in some:
        assert source[: one.start].count(b"\n") + 1 >= one.lines[0]
        if one.compiles(source):
            assert ast.dump(ast.parse(one.applied(source))) != ast.dump(ast.parse(source))


def test_every_area_has_files_and_no_test_of_a_run_is_asked() -> None:
    assert all(len(files) > 0 for files in sources(ROOT).values())
    files = askable(ROOT)
    assert {"tests/unit/loss/test_packing.py", "tests/integration/learner/test_learner.py"} <= set(files)
    assert not any(("faults.py" in file and "integration/test_faults" in file) or "train" in file for file in files)


def test_the_tests_that_run_the_line_are_asked_the_shortest_first() -> None:
    inside = next(m for m in mutants("a.py", SOURCE.encode()) if m.lines[0] == 17)
    constant = next(m for m in mutants("a.py", SOURCE.encode()) if m.lines[0] == 6)
    tests = [
        Covered(id=name, file="t.py", seconds=seconds, lines=lines)
        for name, seconds, lines in [
            ("slow", 9.0, {"a.py": [17]}),
            ("other line", 1.0, {"a.py": [16]}),
            ("quick", 2.0, {"a.py": [16, 17]}),
            ("other file", 1.0, {"b.py": [17]}),
        ]
    ]
    assert [test.id for test in asked(inside, tests, 100.0)] == ["quick", "slow"]
    assert [test.id for test in asked(inside, tests, 5.0)] == ["quick"]
    assert [test.id for test in asked(constant, tests, 100.0)] == ["other line", "quick", "slow"]


def test_of_what_runs_at_import_all_are_asked_that_run_or_import_the_file(tmp_path: Path) -> None:
    """Whichever test comes first imports a file; a default is noticed by another, who never runs that line."""
    texts = {
        "whole.py": "import opd.small",
        "part.py": "def test():\n    from opd.small import Limits",
        "package.py": "from opd import small",
        "other.py": "from opd.large import Limits  # not opd.small",
        "first.py": "",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    path, source = (
        "opd/small.py",
        b"class Limits:\n    tokens: int = 1 << 20\n\n    def most(self):\n        return 3\n",
    )
    default, inside = (next(m for m in mutants(path, source) if m.text == text) for text in ("21", "4"))
    tests = [
        Covered(id=file, file=file, seconds=seconds, lines=lines)
        for file, seconds, lines in [
            ("first.py", 6.0, {path: [1, 2]}),
            ("gone.py", 5.0, {path: [5]}),
            ("whole.py", 4.0, {}),
            ("part.py", 3.0, {"opd/large.py": [2]}),
            ("package.py", 2.0, {}),
            ("other.py", 1.0, {"opd/large.py": [2]}),
            (OF_ALL[0], 7.0, {}),
        ]
    ]
    everyone = [OF_ALL[0], "package.py", "part.py", "whole.py", "gone.py", "first.py"]
    assert [test.file for test in asked(default, tests, 100.0, tmp_path)] == everyone
    assert [test.file for test in asked(default, tests, 9.0, tmp_path)] == everyone[:2]
    assert [test.file for test in asked(inside, tests, 100.0, tmp_path)] == ["gone.py"]
    assert all((ROOT / file).exists() and file in askable(ROOT) for file in OF_ALL)


def test_the_order_of_arguments_is_changed_only_where_it_means_something() -> None:
    alike = ("np.array_equal(a, b)", "torch.allclose(a, b)", "max(a, b)", "torch.logaddexp(a, b)", "gcd(a, b)",
             "left.union(a, b)", "np.isclose(a, b, rtol=0)", "f(a, a)", "f(a)", "f(*a, b)")  # fmt: skip
    assert not [text for text in alike if any(m.kind == "swapped arguments" for m in mutants("a.py", text.encode()))]
    assert changed("x = divide(a, b)") == {(1, "divide(b, a)"): "divide(a, b)"}
    assert changed("x = clip(a, b, c)") == {(1, "clip(a, c, b)"): "clip(a, b, c)"}


def test_what_becomes_of_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tmp_path / "tree"
    source = b"def last(items):\n    i = 0\n    while i < len(items) - 1:\n        i += 1\n    return items[i], 7\n"
    for name, text in {
        "opd/__init__.py": b"",
        "opd/small.py": source,
        "tests/test_small.py": b"from opd.small import last\n\n\ndef test_last():\n    assert last('abc')[0] == 'c'\n",
    }.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(text)
    tests = [Covered(id="tests/test_small.py::test_last", file="tests/test_small.py", seconds=0.0, lines={})]
    monkeypatch.setattr(trials, "SPARE_S", 10.0)
    faults = {one.text: one for one in mutants("opd/small.py", source)}
    chosen = [(None, tests), (faults["(i <= len(items) - 1)"], tests), (faults["8"], tests), (faults["8"], [])]
    chosen.append((faults["pass"], tests))
    ended = list(run([Trial(mutant=mutant, tests=some) for mutant, some in chosen], [tree]))
    results = [one.result for one in ended]
    expected = [Result.SURVIVED, Result.KILLED, Result.SURVIVED, Result.UNREACHED, Result.LATE]
    assert results == expected, [one.printed for one in ended]
    assert (tree / "opd/small.py").read_bytes() == source
