"""Judge a service's JSON log: every warning, error and unreadable line must be expected.

Law: nothing is overlooked; a line that is not a JSON object (a traceback, a library's own print)
is unexpected too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

_QUIET = frozenset({"debug", "info"})


def unexpected_lines(log: Path | str, allowed: Iterable[str] = ()) -> list[str]:
    """Lines above level info that match none of the regular expressions `allowed`, in order.

    `log` is a file or the text itself. An expression is searched in the whole line.
    """
    text = log.read_text(errors="replace") if isinstance(log, Path) else log
    patterns = [re.compile(pattern) for pattern in allowed]
    return [
        line
        for line in text.splitlines()
        if line.strip() and not _is_quiet(line) and not any(p.search(line) for p in patterns)
    ]


def assert_quiet(log: Path, allowed: Iterable[str] = ()) -> None:
    """AssertionError naming the file and its unexpected lines, if there are any."""
    if lines := unexpected_lines(log, allowed):
        shown = "\n".join(lines[:20])
        raise AssertionError(f"{len(lines)} unexpected lines in {log}:\n{shown}")


def _is_quiet(line: str) -> bool:
    try:
        entry = json.loads(line)
    except ValueError:
        return False
    return isinstance(entry, dict) and str(entry.get("level", "")).lower() in _QUIET
