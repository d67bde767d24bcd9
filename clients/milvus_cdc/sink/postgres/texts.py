"""What PostgreSQL does not take in strings and JSON, made so that it does.

U+0000, which neither text nor jsonb holds, is left out where the task wishes that. NaN and
Infinity, which Python's clients write into JSON and Milvus takes, become the strings "NaN",
"Infinity" and "-Infinity", as in the record formats.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc

# An escape begins at a backslash that is not itself escaped: those before it come in pairs.
_ESCAPED_NUL = re.compile(r"(?<!\\)((?:\\\\)*)\\u0000")
# Strings are found first, so that what stands in them stays.
_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|-?Infinity|NaN', re.DOTALL)


def without_nul(array: pa.Array) -> pa.Array:
    if not pc.any(pc.match_substring(array, "\0")).as_py():
        return array
    return pc.replace_substring(array, "\0", "")


def without_nul_json(array: pa.Array) -> pa.Array:
    """Strings and names in the JSON text lose the escape; the rest of the text stays."""
    return _where(array, r"\\u0000", lambda text: _ESCAPED_NUL.sub(r"\1", text))


def without_constants(array: pa.Array) -> pa.Array:
    """JSON text without NaN and Infinity."""
    return _where(array, "NaN|Infinity", lambda text: _CONSTANT.sub(_quoted, text))


def _quoted(found: re.Match[str]) -> str:
    token = found[0]
    return token if token.startswith('"') else f'"{token}"'


def _where(array: pa.Array, pattern: str, mend: Callable[[str], str]) -> pa.Array:
    found = pc.match_substring_regex(array, pattern)
    if not pc.any(found).as_py():
        return array
    # Few rows have it, so these few may become Python strings.
    mended = [mend(text) for text in array.filter(found).to_pylist()]
    return pc.replace_with_mask(array, found, pa.array(mended, array.type))
