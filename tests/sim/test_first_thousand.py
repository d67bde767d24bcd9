"""One half of two thousand worlds; the other is in a file of its own, so that both run at once."""

from __future__ import annotations

import pytest

from tests.sim.playing import simulate


@pytest.mark.timeout(1_200)
def test_nothing_is_lost_doubled_or_stuck() -> None:
    code, said = simulate("--first", "1", "--seeds", "1000")
    print(said)
    assert code == 0, said
