"""The simulation from the shell: one seed with its story, many with their figures, mutants."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from pathlib import Path

from tests.sim.mutants import MUTANTS, Mutant
from tests.sim.world import Result, run

TABLE = Path(__file__).with_name("mutants.md")
HEAD = """# Planted mistakes

Each breaks one promise of the shipped code, and the simulation must find it. The seed is the first
that does: `python -m tests.sim --seed SEED --mutant NAME --trace` tells how. Written by
`make sim ARGS=--mutants`, proved by `tests/sim/test_simulation.py`.

| mutant | what it does | seed | what the referee says |
|---|---|---|---|
"""


def command(result: Result, mutant: Mutant | None = None) -> str:
    """What shows this again."""
    planted = f" --mutant {mutant.name}" if mutant is not None else ""
    split = f" --parts {result.parts}" if result.parts and mutant is None else ""
    return f"python -m tests.sim --seed {result.seed}{split}{planted} --trace"


def main() -> int:
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="this one only")
    parser.add_argument("--trace", action="store_true", help="with --seed: tell the story")
    parser.add_argument("--mutant", choices=sorted(MUTANTS), help="with this mistake planted")
    parser.add_argument("--first", type=int, default=1, help="first of many seeds")
    parser.add_argument("--seeds", type=int, default=100, help="how many")
    parser.add_argument("--minutes", type=float, default=4.0, help="of trouble before peace")
    parser.add_argument("--parts", type=int, default=0, help="collections are split into so many")
    parser.add_argument("--mutants", action="store_true", help="find all mutants, write mutants.md")
    parser.add_argument("--proved", action="store_true", help="mutants by the seeds of mutants.md")
    arguments = parser.parse_args()
    mutant = MUTANTS[arguments.mutant] if arguments.mutant else None
    if arguments.seed is not None:
        return one(
            arguments.seed, arguments.minutes, mutant, arguments.parts, telling=arguments.trace
        )
    if arguments.proved:
        return prove(arguments.seeds, arguments.minutes)
    if arguments.mutants:
        return hunt_all(arguments.first, arguments.seeds, arguments.minutes)
    return many(arguments.first, arguments.seeds, arguments.minutes, mutant, arguments.parts)


def play(
    seed: int, minutes: float, mutant: Mutant | None, parts: int = 0, *, telling: bool = False
) -> Result:
    parts = parts or (mutant.parts if mutant is not None else 0)
    if mutant is None:
        return run(seed, minutes=minutes, telling=telling, parts=parts)
    return run(seed, minutes=minutes, telling=telling, parts=parts, break_it=mutant.planted)


def one(seed: int, minutes: float, mutant: Mutant | None, parts: int, *, telling: bool) -> int:
    result = play(seed, minutes, mutant, parts, telling=telling)
    for line in result.story:
        print(line)
    verdict = result.violation or "nothing wrong"
    took = f"{result.simulated:.0f} s simulated in {result.spent:.1f} s of CPU"
    print(f"seed {seed}: {verdict} ({took})")
    return 1 if result.violation else 0


def many(first: int, count: int, minutes: float, mutant: Mutant | None, parts: int) -> int:
    started = time.process_time()
    simulated, rows, takeovers, failed, splits, late, strays, excused = 0.0, 0, 0, 0, 0, 0, 0, 0
    for seed in range(first, first + count):
        result = play(seed, minutes, mutant, parts)
        splits += result.splits
        late += result.late
        strays += result.strays
        excused += result.excused
        simulated += result.simulated
        rows += result.rows
        takeovers += result.takeovers
        if result.violation:
            failed += 1
            print(f"seed {seed}: {result.violation}\n    {command(result, mutant)}", flush=True)
    spent = time.process_time() - started
    print(
        f"{count} seeds in {spent:.0f} s of CPU ({count / spent:.1f} a second), "
        f"{simulated / 3600:.1f} simulated hours ({simulated / spent:.0f} for one), "
        f"{takeovers} new owners, {splits} of parts, {rows} rows written, "
        f"{late} messages late, {strays} requests after their time, "
        f"{excused} looks excused, {failed} failed"
    )
    return 1 if failed else 0


def hunt(
    mutant: Mutant, seeds: list[int], minutes: float, *, certain: bool = True
) -> Result | None:
    """By the first of them that finds it and, to be certain, finds nothing without it."""
    for seed in seeds:
        result = play(seed, minutes, mutant)
        sound = certain and play(seed, minutes, None, mutant.parts).violation == ""
        if result.violation and (sound or not certain):
            return result
    return None


def hunt_all(first: int, count: int, minutes: float) -> int:
    """Begins with the seeds of the table, and writes it anew."""
    known, missed = table(), []
    for mutant in MUTANTS.values():
        before = [known[mutant.name][0]] if mutant.name in known else []
        found = hunt(mutant, [*before, *range(first, first + count)], minutes)
        if found is None:
            missed.append(mutant.name)
            known.pop(mutant.name, None)
            print(f"{mutant.name}: NOT FOUND by {count} seeds", flush=True)
        else:
            says = found.violation.splitlines()[0].replace("|", "/")
            says = says if len(says) < 160 else says[:157] + "..."
            known[mutant.name] = found.seed, says
            print(f"{mutant.name}: seed {found.seed}: {says}", flush=True)
        lines = [
            f"| {name} | {MUTANTS[name].what} | {known[name][0]} | {known[name][1]} |\n"
            for name in MUTANTS
            if name in known
        ]
        TABLE.write_text(HEAD + "".join(lines))
    print(f"{len(MUTANTS) - len(missed)} of {len(MUTANTS)} mutants found, see {TABLE.name}")
    return 1 if missed else 0


def table() -> dict[str, tuple[int, str]]:
    """Seed and verdict of mutants.md, by mutant."""
    if not TABLE.exists():
        return {}
    rows = [line.split("|") for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    return {
        cells[1].strip(): (int(cells[3]), cells[4].strip())
        for cells in rows
        if cells[3].strip().isdigit()
    }


def prove(count: int, minutes: float) -> int:
    """By the seeds of the table; where the code has moved on, by one of a few others."""
    known, missed, moved = table(), [], 0
    for name, mutant in MUTANTS.items():
        before = [known[name][0]] if name in known else []
        found = hunt(mutant, [*before, *range(1, 1 + count)], minutes, certain=False)
        if found is None:
            missed.append(name)
        elif [found.seed] != before:
            moved += 1
            print(f"{name} is found by seed {found.seed} now")
    print(f"{len(MUTANTS) - len(missed)} of {len(MUTANTS)} mutants found")
    if moved:
        print("mutants.md is out of date: `make sim ARGS=--mutants` writes it anew")
    if missed:
        print(f"not found: {', '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        # The order of a set of texts must not depend on the process.
        again = [sys.executable, "-m", "tests.sim", *sys.argv[1:]]
        os.execve(sys.executable, again, {**os.environ, "PYTHONHASHSEED": "0"})
    sys.exit(main())
