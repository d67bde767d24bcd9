"""What the documents name exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


COLUMNS = ["connection", "plain", "TLS", "mutual TLS", "password or token", "wrong credential"]


def table(document: str) -> list[list[str]]:
    """Cells of its only table, the head first."""
    lines = [line for line in document.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert set("".join(rows[1])) == {"-"}
    return [rows[0], *rows[2:]]


@cache
def names_in(path: Path) -> set[str]:
    """Names of its test functions, those in classes too, without importing it."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.name for node in nodes if isinstance(node, kinds) and node.name.startswith("test")}


def faults_of(rows: list[list[str]]) -> list[str]:
    """Cells that name no test, or one that there is not."""
    found = []
    for connection, *cells in rows:
        for column, cell in zip(COLUMNS[1:], cells, strict=True):
            named = re.findall(r"`([^`]+)`", cell)
            reason = re.fullmatch(r"– \(.{5,}\)", cell)
            if bool(named) == bool(reason):
                found.append(f"{connection}, {column}: {cell!r}")
            for test in named:
                path, _, name = test.partition("::")
                file = ROOT / "tests" / path
                if not file.is_file() or name not in names_in(file):
                    found.append(f"{connection}, {column}: there is no {test}")
    return found


def test_every_cell_of_the_table_of_connections_names_a_test_or_says_why_not() -> None:
    head, *rows = table((ROOT / "docs/security-table.md").read_text())
    assert head == COLUMNS
    assert len(rows) == len({row[0] for row in rows}) >= 14
    assert faults_of(rows) == []


def test_a_table_that_is_not_true_is_found() -> None:
    good = "`contract/test_etcd.py::test_put_get_delete`"
    assert faults_of([["a", good, good, "– (there is none)", good, good]]) == []
    for bad in (
        "`contract/test_etcd.py::test_gone`",
        "`contract/gone.py::test_tls`",
        "",
        "–",
        "yes",
    ):
        assert len(faults_of([["a", good, bad, good, good, good]])) == 1, bad


def test_every_test_that_the_operations_table_names_exists() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs/operations.md").read_text())
    assert named
    for module, test in named:
        assert f"def {test}(" in (ROOT / "tests/e2e" / module).read_text(), f"{module}::{test}"
