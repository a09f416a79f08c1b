"""`python -m tests.mutants [count=200] [seed=0] [together=1] [area=ledger] [again=true]`: are small faults noticed?

A sample of faults (`tests.mutants.operators`), alike many from each area of the core, each tried by the tests that run
its line, the shortest first, until one fails. Nothing in the work tree is touched. Prints killed and survived by area
and every survivor with its place and change; exits 1 if less than 95 % were killed. What is known of the tests is kept
in `.mutants/`; `again=true` tries the survivors of last time, with the tests as they are now. Not in CI: 10 to 20 s a
mutant, at `nice=10`.
"""

import difflib
import json
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A mutant and what became of it."""

    area: str
    mutant: Mutant
    ended: Ended
    difference: str

    @property
    def place(self) -> str:
        """File and line."""
        return f"{self.mutant.path}:{self.mutant.lines[0]}"

    @property
    def lives(self) -> bool:
        """Did nothing notice it?"""
        return self.ended.result in (Result.SURVIVED, Result.UNREACHED)


def sample(tree: Path, number: int, seed: int, areas: Sequence[str]) -> list[tuple[str, Mutant]]:
    """(area, mutant), so many in all, the areas in turn; where one has no more of them, the others have more."""
    generator, files = random.Random(seed), sources(tree)
    pools = {}
    for area in areas:
        pool = [mutant for path in files[area] for mutant in mutants(path, (tree / path).read_bytes())]
        generator.shuffle(pool)
        pools[area] = pool
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


def tried(chosen: Sequence[tuple[str, Mutant]], tests: Sequence[Covered], trees: Sequence[Path]) -> list[Row]:
    """Each mutant's end; of those so far, if one interrupts it.

    Raises:
        OpdError: tests fail without any fault, so that nothing could be said.
    """
    trials = [(area, Trial(mutant=mutant, tests=asked(mutant, tests, TESTS_S))) for area, mutant in chosen]
    controls = {area: Trial(mutant=None, tests=trial.tests) for area, trial in reversed(trials) if trial.tests}
    for ended in run(list(controls.values()), trees):
        if ended.result is not Result.SURVIVED:
            raise OpdError(f"tests fail without a fault ({ended.result.value}):\n{ended.printed}")
    area_of = {id(trial): area for area, trial in trials}
    made = list[Row]()
    try:
        for ended in run([trial for _, trial in trials], trees):
            mutant = ended.trial.mutant
            assert mutant is not None
            row = Row(
                area=area_of[id(ended.trial)], mutant=mutant, ended=ended, difference=difference(trees[0], mutant)
            )
            made.append(row)
            print(
                f"{len(made):4} {ended.result.value:24} {ended.seconds:5.1f} s  {row.place}  {mutant.kind}", flush=True
            )
    except KeyboardInterrupt:
        print(f"interrupted: {len(made)} of {len(trials)} mutants were tried")
    return made


def report(made: Sequence[Row]) -> float:
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
            print(row.difference)
    killed = sum(not row.lives for row in made)
    seconds = sum(row.ended.seconds for row in made) / max(1, len(made))
    print(f"\n{killed} of {len(made)} mutants killed ({killed / max(1, len(made)):.1%}), {seconds:.1f} s each")
    return killed / max(1, len(made))


def _keep(made: Sequence[Row]) -> None:
    survived = [[row.area, asdict(row.mutant)] for row in made if row.lives]
    (KEPT / "survivors.json").write_text(json.dumps(survived, indent=1))


def _survivors(tree: Path) -> list[tuple[str, Mutant]]:
    """Those of last time, as far as their text is there."""
    kept = list[tuple[str, Mutant]]()
    for area, fields in json.loads((KEPT / "survivors.json").read_text()):
        old = Mutant(**(fields | {"lines": tuple(fields["lines"])}))
        now = {(m.start, m.stop, m.text) for m in mutants(old.path, (tree / old.path).read_bytes())}
        kept += [(area, old)] if (old.start, old.stop, old.text) in now else []
    return kept


def main(arguments: Sequence[str]) -> int:
    """Try a sample, or the survivors of the last one."""
    given = dict(argument.split("=", 1) for argument in arguments)
    number, seed, together = (int(given.get(name, n)) for name, n in (("count", 200), ("seed", 0), ("together", 1)))
    os.nice(int(given.get("nice", 10)))
    with TemporaryDirectory(prefix="opd-mutants-") as folder, copies(together, Path(folder)) as trees:
        areas = [given["area"]] if "area" in given else list(AREAS)
        again = given.get("again", "") == "true"
        chosen = _survivors(trees[0]) if again else sample(trees[0], number, seed, areas)
        tests = coverage_map(trees, KEPT)
        preload()
        made = tried(chosen, tests, trees)
    _keep(made)
    return 0 if report(made) >= ENOUGH else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
