"""`python -m tests.mutants [count=200] [seed=0] [together=1] [area=ledger] [again=true]`: are small faults noticed?

A sample of faults (`tests.mutants.operators`), alike many from each area of the core, each tried by the tests that run
its line, the shortest first, until one fails. Nothing in the work tree is touched. Prints killed and survived by area
and every survivor with its place and change; exits 1 if less than 95 % were killed. What is known of the tests is kept
in `.mutants/`; `again=true` does not try again what was killed before, and `tests_s=30` asks no more than so many
processor seconds of tests about a mutant (90). Not in CI: 10 to 20 s a mutant, at `nice=10`.
"""

import difflib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from opd.errors import OpdError
from tests.mutants.coverage_map import Covered, asked, coverage_map
from tests.mutants.operators import Mutant, mutants
from tests.mutants.scope import AREAS, ROOT, sources
from tests.mutants.trials import Ended, Result, Trial, copies, preload, run

KEPT = ROOT / ".mutants"
ENOUGH = 0.95
TESTS_S = 90.0  # processor seconds of tests that are asked about one mutant
CONTROL_S = 5.0  # ... and without a fault, in each area


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A mutant and what became of it."""

    area: str
    mutant: Mutant
    ended: Ended

    @property
    def place(self) -> str:
        """File and line."""
        return f"{self.mutant.path}:{self.mutant.lines[0]}"

    @property
    def lives(self) -> bool:
        """Did nothing notice it?"""
        return self.ended.result in (Result.SURVIVED, Result.UNREACHED)


def sample(tree: Path, number: int, seed: int, areas: Sequence[str]) -> list[tuple[str, Mutant]]:
    """(area, mutant), so many in all, the areas in turn; where one has no more of them, the others have more.

    What is drawn of a statement depends on `seed` and on that statement: a sample stays what it was where the code did,
    so that a fault that survived is tried again once there is a test for it.
    """
    files, pools = sources(tree), dict[str, list[Mutant]]()
    for area in areas:
        drawn = list[tuple[str, Mutant]]()
        for path in files[area]:
            source, seen = (tree / path).read_bytes(), Counter[str]()
            lines = source.decode().splitlines()
            for mutant in mutants(path, source):
                first, last = mutant.lines
                said = "\n".join([str(seed), mutant.kind, mutant.text, *map(str.strip, lines[first - 1 : last])])
                seen[said] += 1
                drawn.append((sha256(f"{said}\n{seen[said]}".encode()).hexdigest(), mutant))
        pools[area] = [mutant for _, mutant in sorted(drawn, key=lambda pair: pair[0])]
    chosen = list[tuple[str, Mutant]]()
    while len(chosen) < number and any(pools.values()):
        for area, pool in pools.items():
            while pool and not pool[-1].compiles((tree / pool[-1].path).read_bytes()):
                pool.pop()
            chosen += [(area, pool.pop())] if pool else []
    return chosen[:number]


def difference(tree: Path, mutant: Mutant) -> str:
    """What the fault is, as lines with - and +."""
    before = (tree / mutant.path).read_bytes()
    after = mutant.applied(before)
    lines = difflib.unified_diff(before.decode().splitlines(), after.decode().splitlines(), n=0, lineterm="")
    return "\n".join(f"    {line}" for line in list(lines)[3:])


def tried(
    chosen: Sequence[tuple[str, Mutant]], tests: Sequence[Covered], trees: Sequence[Path], most_s: float
) -> Iterator[Row]:
    """Each mutant's end; `most_s` processor seconds of tests are asked about it.

    Raises:
        OpdError: tests fail without any fault, so that nothing could be said.
    """
    trials = [(area, Trial(mutant=mutant, tests=asked(mutant, tests, most_s))) for area, mutant in chosen]
    controls = {
        area: Trial(mutant=None, tests=asked(trial.mutant, tests, CONTROL_S))
        for area, trial in reversed(trials)
        if trial.tests and trial.mutant is not None
    }
    for ended in run(list(controls.values()), trees):
        if ended.result is not Result.SURVIVED:
            print(ended.printed)
            raise OpdError(f"tests fail without a fault ({ended.result.value}); what they printed is above")
    area_of = {id(trial): area for area, trial in trials}
    for ended in run([trial for _, trial in trials], trees):
        assert ended.trial.mutant is not None
        yield Row(area=area_of[id(ended.trial)], mutant=ended.trial.mutant, ended=ended)


def report(made: Sequence[Row], tree: Path) -> float:
    """Print the table by area and the survivors; returns the share that was killed."""
    print("\n| area | mutants | killed | by the deadline | survived | not reached |\n|---|---|---|---|---|---|")
    for area in [*dict.fromkeys(row.area for row in made), "all"]:
        results = [row.ended.result for row in made if area in (row.area, "all")]
        figures = [results.count(result) for result in (Result.KILLED, Result.LATE, Result.SURVIVED, Result.UNREACHED)]
        print(f"| {area} | {len(results)} | {' | '.join(map(str, figures))} |")
    for row in made:
        if row.lives:
            asked_tests = f"{len(row.ended.trial.tests)} tests"
            print(f"\n{row.place} {row.ended.result.value} ({row.area}, {row.mutant.kind}, {asked_tests})")
            print(difference(tree, row.mutant))
    killed = sum(not row.lives for row in made)
    seconds = sum(row.ended.seconds for row in made) / max(1, len(made))
    print(f"\n{killed} of {len(made)} mutants killed ({killed / max(1, len(made)):.1%}), {seconds:.1f} s each")
    return killed / max(1, len(made))


class Memory:
    """What became of mutants in earlier runs: a line each in `file`, which a run adds to as it goes."""

    def __init__(self, file: Path, tree: Path) -> None:
        self._file, self._tree = file, tree
        self._lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def killed(self, area: str, mutant: Mutant) -> Row | None:
        """Its end, if it was killed and its file has not changed since."""
        key = self._key(mutant)
        for line in reversed(self._lines):
            if line["mutant"] == key and line["result"] in (Result.KILLED.value, Result.LATE.value):
                trial = Trial(mutant=mutant, tests=[])
                ended = Ended(trial=trial, result=Result(line["result"]), seconds=line["seconds"])
                return Row(area=area, mutant=mutant, ended=ended)
        return None

    def add(self, row: Row) -> None:
        """Remember it."""
        line = {"mutant": self._key(row.mutant), "result": row.ended.result.value, "seconds": row.ended.seconds}
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _key(self, mutant: Mutant) -> list[object]:
        digest = sha256((self._tree / mutant.path).read_bytes()).hexdigest()[:16]
        return [mutant.path, digest, mutant.start, mutant.stop, mutant.text]


def main(arguments: Sequence[str]) -> int:
    """Try a sample; with `again` only what was not killed before."""
    given = dict(argument.split("=", 1) for argument in arguments)
    number, seed, together = (int(given.get(name, n)) for name, n in (("count", 200), ("seed", 0), ("together", 1)))
    most_s = float(given.get("tests_s", TESTS_S))
    os.nice(int(given.get("nice", 10)))
    with TemporaryDirectory(prefix="opd-mutants-") as folder, copies(together, Path(folder)) as trees:
        chosen = sample(trees[0], number, seed, [given["area"]] if "area" in given else list(AREAS))
        tests = coverage_map(trees, KEPT)
        preload()
        memory, again = Memory(KEPT / "results.jsonl", trees[0]), given.get("again", "") == "true"
        before = {mutant: row for area, mutant in chosen if again and (row := memory.killed(area, mutant)) is not None}
        made = list(before.values())
        try:
            for row in tried([pair for pair in chosen if pair[1] not in before], tests, trees, most_s):
                memory.add(row)
                made.append(row)
                said = f"{row.ended.result.value:24} {row.ended.seconds:5.1f} s"
                print(f"{len(made):4} {said}  {row.place}  {row.mutant.kind}", flush=True)
        except KeyboardInterrupt:
            print(f"interrupted: {len(made)} of {len(chosen)} mutants were tried")
        return 0 if report(made, trees[0]) >= ENOUGH else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
