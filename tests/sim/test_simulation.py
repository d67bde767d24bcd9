"""The short form of `make sim`: eighty worlds, every planted mistake, and that a seed says it
all.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SEEDS = 80


def simulate(*arguments: str, hash_seed: str = "0") -> tuple[int, str]:
    """In a process of its own: its time is made up."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.sim", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.timeout(600)
def test_nothing_is_lost_doubled_or_stuck() -> None:
    code, said = simulate("--seeds", str(SEEDS))
    print(said)
    assert code == 0, said


@pytest.mark.timeout(600)
def test_every_planted_mistake_is_found() -> None:
    code, said = simulate("--proved", "--seeds", "40")
    print(said)
    assert code == 0, said


def test_a_seed_tells_the_same_story_again() -> None:
    first, second = (simulate("--seed", "7", "--trace") for _ in range(2))
    assert first[0] == 0, first[1]
    strip = re.compile(r"in [0-9.]+ s of CPU")
    assert strip.sub("", first[1]) == strip.sub("", second[1])


def test_a_failing_seed_prints_the_command_that_shows_it_again() -> None:
    code, said = simulate("--seeds", "5", "--mutant", "write-without-lease")
    assert code == 1
    again = re.search(r"python -m tests\.sim (--seed .*)", said)
    assert again is not None
    code, story = simulate(*again[1].split())
    assert code == 1
    assert "VIOLATION" in story
