"""Every planted mistake is found, and a seed says it all. The short form of `make sim` is in the
two files beside it, which run at the same time.
"""

from __future__ import annotations

import re

import pytest

from tests.sim.playing import simulate


@pytest.mark.timeout(600)
def test_nothing_is_lost_where_collections_are_split() -> None:
    code, said = simulate("--seeds", "20", "--parts", "2")
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
