"""Static tokens: a file holds their hashes and what each may, never the tokens."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from milvus_cdc.errors import UserError
from milvus_cdc.trust.caller import Caller
from milvus_cdc.trust.settings import Grant
from milvus_cdc.trust.watched import Watched

FIELD = "auth.tokensFile"
LOOK_SECONDS = 1.0
_SHA256 = re.compile(r"^[0-9a-f]{64}$")


class StaticTokens:
    """By SHA-256. The file is looked at every second: whose line is gone is not known any more.

    Raises UserError FILE_UNREADABLE, TOKENS_INVALID.
    """

    def __init__(self, path: Path) -> None:
        self._known = Watched(((FIELD, path),), _parse, look_seconds=LOOK_SECONDS)

    @property
    def generation(self) -> int:
        self._known.get()
        return self._known.generation

    def find(self, digest: bytes) -> Caller | None:
        return self._known.get().get(digest)


def digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _parse(contents: Sequence[bytes]) -> Mapping[bytes, Caller]:
    try:
        body: Any = yaml.safe_load(contents[0])
    except yaml.YAMLError as error:
        # What YAML quotes of it might be a token.
        raise _invalid("is not YAML") from error
    entries = body.get("tokens") if isinstance(body, dict) and set(body) == {"tokens"} else None
    if not isinstance(entries, list):
        raise _invalid("must hold a list `tokens` and nothing else")
    known: dict[bytes, Caller] = {}
    for number, entry in enumerate(entries):
        place = f"tokens[{number}]"
        if not isinstance(entry, dict):
            raise _invalid(f"{place} must have sha256, name and roles")
        rest = dict(entry)
        sha256 = rest.pop("sha256", None)
        if not isinstance(sha256, str) or not _SHA256.match(sha256):
            raise _invalid(f"{place}.sha256 must be the SHA-256 of the token, 64 digits 0-9a-f")
        try:
            grant = Grant.model_validate(rest)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join((place, *map(str, first["loc"])))
            raise _invalid(f"{where}: {first['msg']}") from error
        key = bytes.fromhex(sha256)
        if key in known:
            raise _invalid(f"{place}: this token is {known[key].name}'s already")
        known[key] = Caller(grant.name, "token", frozenset(grant.roles), grant.replicator)
    return known


def _invalid(why: str) -> UserError:
    return UserError("TOKENS_INVALID", f"{FIELD}: {why}", field=FIELD)
