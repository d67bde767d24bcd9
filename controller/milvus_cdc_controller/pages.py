"""Pages of a list: a token says after which key the next page begins, and for which filter it was
made.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable
from typing import TypeVar

from milvus_cdc_controller.api_errors import ApiError

_Item = TypeVar("_Item")

DEFAULT_SIZE = 100


def page(
    items: Iterable[_Item], key: Callable[[_Item], str], size: int, token: str, *filters: object
) -> tuple[list[_Item], str]:
    """At most `size` items in the order of their keys, and the next token; empty on the last page.

    Raises ApiError INVALID_FIELD for a token that was not made for these filters.
    """
    size = size or DEFAULT_SIZE
    digest = hashlib.sha256(repr(filters).encode()).hexdigest()[:16]
    after = _after(token, digest) if token else None
    rest = sorted((item for item in items if after is None or key(item) > after), key=key)
    shown = rest[:size]
    if len(rest) <= size:
        return shown, ""
    body = json.dumps([digest, key(shown[-1])]).encode()
    return shown, base64.urlsafe_b64encode(body).decode()


def _after(token: str, digest: str) -> str:
    try:
        made_for, after = json.loads(base64.urlsafe_b64decode(token.encode()))
    except (ValueError, TypeError):
        made_for, after = "", ""
    if made_for != digest or not isinstance(after, str):
        raise ApiError(
            "INVALID_ARGUMENT",
            "INVALID_FIELD",
            "page_token: it was not made by this list with these filters; begin without one.",
            field="page_token",
        )
    return after
