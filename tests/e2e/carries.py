"""The table of what each sink carries: tests say what they saw, the README what is promised."""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
_BEGIN = "<!-- carried: written by `pytest tests/e2e/test_versions.py --update-tables` -->"
_END = "<!-- end of carried -->"


class Carries:
    """What was seen, by version and row; compared with the README, or written into it."""

    def __init__(self, *, update: bool) -> None:
        self._update = update
        self._seen: dict[str, dict[str, str]] = {}

    def note(self, version: str, what: str, verdict: str) -> None:
        self._seen.setdefault(version, {})[what] = verdict

    def check(self, version: str) -> None:
        """Every row of this version's column is what was seen, and none is missing."""
        before, table, after = _split(README.read_text())
        columns = _parse(table)
        if self._update:
            columns[version] = self._seen[version]
            README.write_text(before + _render(columns) + after)
            return
        assert columns.get(version) == self._seen[version]


def _split(text: str) -> tuple[str, str, str]:
    before, _, rest = text.partition(_BEGIN)
    table, _, after = rest.partition(_END)
    return before + _BEGIN + "\n", table, _END + after


def _parse(table: str) -> dict[str, dict[str, str]]:
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()
    ]
    if not lines:
        return {}
    head, _, *rows = lines
    return {
        version: {row[0]: row[place] for row in rows if row[place]}
        for place, version in enumerate(head[1:], 1)
    }


def _render(columns: dict[str, dict[str, str]]) -> str:
    rows = list(dict.fromkeys(what for column in columns.values() for what in column))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[what, *(column.get(what, "") for column in columns.values())] for what in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
