"""U+0000 left out of strings and of JSON text: PostgreSQL holds it in neither."""

from __future__ import annotations

import re

import pyarrow as pa
import pyarrow.compute as pc

# An escape begins at a backslash that is not itself escaped: those before it come in pairs.
_ESCAPED = re.compile(r"(?<!\\)((?:\\\\)*)\\u0000")


def without_nul(array: pa.Array) -> pa.Array:
    if not pc.any(pc.match_substring(array, "\0")).as_py():
        return array
    return pc.replace_substring(array, "\0", "")


def without_nul_json(array: pa.Array) -> pa.Array:
    """Strings and names in the JSON text lose the escape; the rest of the text stays."""
    found = pc.match_substring(array, r"\u0000")
    if not pc.any(found).as_py():
        return array
    # Few rows have it, so these few may become Python strings.
    mended = [_ESCAPED.sub(r"\1", text) for text in array.filter(found).to_pylist()]
    return pc.replace_with_mask(array, found, pa.array(mended, array.type))
