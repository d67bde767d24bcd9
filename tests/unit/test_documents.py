"""What the documents name exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_that_the_table_of_hops_names_exists() -> None:
    named = re.findall(
        r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs/security-hops.md").read_text()
    )
    assert named
    for module, test in named:
        (path,) = (ROOT / "tests").rglob(module)
        assert f"def {test}(" in path.read_text(), f"{module}::{test}"


def test_every_test_that_the_operations_table_names_exists() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs/operations.md").read_text())
    assert named
    for module, test in named:
        assert f"def {test}(" in (ROOT / "tests/e2e" / module).read_text(), f"{module}::{test}"
