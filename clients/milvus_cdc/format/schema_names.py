"""Names that Avro and Protobuf allow (letters, digits, underscore) for those of a collection.

Names of Milvus fields and collections are such names already, apart from `$meta`; names at the
sink, which a task may choose, need not be.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from milvus_cdc.rows import Table

NAMESPACE = "milvus"
DYNAMIC = "_meta"
"""What the dynamic field `$meta` is called; with more underscores when a field has that name."""


def identifier(name: str) -> str:
    """`name` with each foreign character as `_x{code}_`."""
    plain = re.sub(r"[^A-Za-z0-9_]", lambda found: f"_x{ord(found.group()):x}_", name)
    return plain if not plain or not plain[0].isdigit() else f"_{plain}"


def namespace(table: Table) -> str:
    """Of the records of one collection: `milvus.{database}.{collection}`."""
    return f"{NAMESPACE}.{identifier(table.database)}.{identifier(table.collection)}"


def field_names(table: Table) -> Sequence[str]:
    """One per field, in order."""
    taken = {identifier(field.name) for field in table.fields if not field.dynamic}
    dynamic = DYNAMIC
    while dynamic in taken:
        dynamic += "_"
    return [dynamic if field.dynamic else identifier(field.name) for field in table.fields]
