"""Primary keys as boolean expressions that Milvus reads back exactly.

Facts seen on Milvus 2.3.5: -9223372036854775808 does not parse as a literal but is folded from
`-9223372036854775807 - 1` (milvus-lite 3.2: the other way round); VarChar literals take JSON
escapes, order is bytewise UTF-8, which is
Python's order of `str`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

Key = int | str

INT64_MIN = -(2**63)
INT64_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True)
class KeyField:
    name: str
    is_string: bool
    sums: bool = True
    """Expressions have sums of constants: the smallest key is written as one."""

    def literal(self, key: Key) -> str:
        if self.is_string:
            return json.dumps(key, ensure_ascii=False)
        return f"{INT64_MIN + 1} - 1" if key == INT64_MIN and self.sums else str(key)

    def between(self, after: Key | None, upto: Key | None) -> str:
        """Keys above `after` and not above `upto`; None leaves that side open."""
        parts = []
        if after is not None:
            parts.append(f"{self.name} > {self.literal(after)}")
        if upto is not None:
            parts.append(f"{self.name} <= {self.literal(upto)}")
        if parts:
            return " and ".join(parts)
        # An expression is a must beside a limit on 2.3; this one holds for every key.
        return f'{self.name} >= ""' if self.is_string else f"{self.name} <= {INT64_MAX}"

    def any_of(self, keys: Iterable[Key]) -> str:
        return f"{self.name} in [{','.join(self.literal(key) for key in keys)}]"
