"""Which topic a collection's records go to.

Law: two collections share a topic only where the template says that all of them do; a name that
Kafka does not take is refused, never bent, for two bent names may be one.

Legal names: Kafka `org.apache.kafka.common.internals.Topic`; a broker also refuses a topic whose
name differs from another's only in `.` and `_`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from milvus_cdc.errors import UserError
from milvus_cdc.rows import Table
from milvus_cdc.sink.kafka.settings import FIELD

DEFAULT_TOPIC = "milvus.{database}.{collection}"
MAX_LENGTH = 249

_LEGAL = re.compile(r"[a-zA-Z0-9._-]+")
_VARIABLE = re.compile(r"\{([^{}]*)\}")
_VARIABLES = ("database", "collection")


class TopicTemplate:
    """`field` is its place in the task, for errors."""

    def __init__(self, text: str, field: str) -> None:
        """Raises UserError INVALID_FIELD."""
        self.text = text
        self.field = f"{FIELD}.{field}"
        for variable in _VARIABLE.findall(text):
            if variable not in _VARIABLES:
                raise UserError(
                    "INVALID_FIELD",
                    f"{self.field}: {{{variable}}} is no variable of a topic's name; there are "
                    "{database} and {collection}",
                    field=self.field,
                )
        problem = _problem(_VARIABLE.sub("x", text))
        if problem:
            raise UserError("INVALID_FIELD", f"{self.field}: {text!r} {problem}", field=self.field)

    @property
    def constant(self) -> bool:
        """One topic for all collections."""
        return not _VARIABLE.search(self.text)

    @property
    def of_one_collection(self) -> bool:
        """No two collections of a sink ever have the same topic: names of Milvus have neither '.'
        nor '-'.
        """
        found = list(_VARIABLE.finditer(self.text))
        if {each[1] for each in found} != set(_VARIABLES):
            return False
        between = self.text[found[0].end() : found[1].start()]
        return found[0][1] != found[1][1] and ("." in between or "-" in between)

    def topic(self, table: Table) -> str:
        """Raises UserError INVALID_TOPIC_NAME."""
        name = self._name(table)
        if problem := _problem(name):
            raise UserError(
                "INVALID_TOPIC_NAME",
                f"{table.full_name} would have the topic {name!r}, which {problem}; change "
                f"{self.field}, or give the collection another name by a rename rule",
                field=self.field,
            )
        return name

    def violations(self, tables: Sequence[Table]) -> list[str]:
        """Names that Kafka does not take, and collections that would share one."""
        texts: list[str] = []
        taken: dict[str, Table] = {}
        for table in tables:
            name = self._name(table)
            if problem := _problem(name):
                texts.append(f"{table.full_name}: the topic {name!r} {problem} ({self.field})")
                continue
            if self.constant:
                continue
            other = taken.setdefault(name.replace(".", "_"), table)
            if other is table or other.collection_id == table.collection_id:
                continue
            theirs = self._name(other)
            how = (
                f"both have the topic {name!r}"
                if theirs == name
                else f"the topics {theirs!r} and {name!r} differ only in '.' and '_', which Kafka "
                "does not take"
            )
            texts.append(f"{other.full_name} and {table.full_name}: {how} ({self.field})")
        return texts

    def _name(self, table: Table) -> str:
        return self.text.replace("{database}", table.database or "default").replace(
            "{collection}", table.collection
        )


def _problem(name: str) -> str:
    if not name or name in (".", ".."):
        return "is no name for a topic"
    if len(name) > MAX_LENGTH:
        return f"is longer than {MAX_LENGTH} characters"
    if not _LEGAL.fullmatch(name):
        illegal = "".join(sorted(set(_LEGAL.sub("", name))))
        return f"contains {illegal!r}; Kafka takes letters, digits, '.', '_' and '-'"
    return ""
