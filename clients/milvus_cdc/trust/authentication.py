"""Who calls: by the bearer token that is shown, else by the client's certificate."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from milvus_cdc.trust.caller import Caller
from milvus_cdc.trust.certificates import end_of
from milvus_cdc.trust.key_sets import KeySet, key_set
from milvus_cdc.trust.refusal import unauthenticated
from milvus_cdc.trust.settings import AuthSettings, Grant
from milvus_cdc.trust.tokens import StaticTokens, digest
from milvus_cdc.trust.web_tokens import WebTokens, unavailable

CACHED_MAX = 10_000
CACHED_SECONDS = 60.0

Metadata = Iterable[tuple[str, Any]]
AuthContext = Mapping[str, Iterable[bytes]]


class Authenticator:
    """`start` before use, `close` at the end. Raises UserError for files that cannot be used."""

    def __init__(self, settings: AuthSettings) -> None:
        self._certificates = settings.certificates
        self._static = StaticTokens(settings.tokens_file) if settings.tokens_file else None
        self._keys: KeySet | None = None
        self._web: WebTokens | None = None
        if settings.jwt is not None:
            self._keys, self._web = key_set(settings.jwt), WebTokens(settings.jwt)
        self._cache: OrderedDict[bytes, tuple[Caller, float]] = OrderedDict()
        self._cached_of = 0

    def start(self) -> None:
        if self._keys is not None:
            self._keys.start()

    async def close(self) -> None:
        if self._keys is not None:
            await self._keys.close()

    async def caller(self, metadata: Metadata, peer: AuthContext) -> Caller:
        """Raises Refusal: UNAUTHENTICATED, or UNAVAILABLE when it cannot be known now."""
        shown = [str(value) for key, value in metadata if key == "authorization"]
        if shown:
            kind, _, token = shown[0].partition(" ")
            token = token.strip()
            if len(shown) > 1 or kind.lower() != "bearer" or not token:
                raise unauthenticated(
                    "CREDENTIAL_MALFORMED", "The metadata must be `authorization: Bearer TOKEN`."
                )
            return await self._of_token(token)
        return self._of_certificate(peer)

    async def _of_token(self, token: str) -> Caller:
        key = digest(token)
        if self._static is not None and (known := self._static.find(key)) is not None:
            return known
        if self._web is None or self._keys is None:
            raise unauthenticated("TOKEN_UNKNOWN", "The token is none that is known here.")
        if (found := self._cached(key, self._keys.generation)) is not None:
            return found
        keys = self._keys.keys
        if keys is None or not self._web.key_known(token, keys):
            await self._keys.seek()
            keys = self._keys.keys
        if keys is None:
            raise unavailable()
        caller = self._web.caller(token, keys)
        self._cache[key] = caller, min(time.time() + CACHED_SECONDS, caller.until)
        if len(self._cache) > CACHED_MAX:
            self._cache.popitem(last=False)
        return caller

    def _cached(self, key: bytes, generation: int) -> Caller | None:
        if generation != self._cached_of:
            self._cache.clear()
            self._cached_of = generation
        entry = self._cache.get(key)
        if entry is None:
            return None
        if entry[1] <= time.time():
            del self._cache[key]
            return None
        return entry[0]

    def _of_certificate(self, peer: AuthContext) -> Caller:
        names = names_of(peer)
        if not names:
            raise unauthenticated(
                "CREDENTIAL_MISSING",
                "Say who you are: a bearer token, or a client certificate.",
            )
        grant = next((grant for grant in self._certificates if grant.name in names), None)
        if grant is None:
            raise unauthenticated(
                "CERTIFICATE_UNKNOWN",
                f"The certificate is of {', '.join(names)[:500]}, who is not among "
                "auth.certificates.",
            )
        return _by_certificate(grant, peer)


def names_of(peer: AuthContext) -> list[str]:
    """Common and alternative names of a certificate that TLS has verified."""
    found: list[str] = []
    for key in ("x509_common_name", "x509_subject_alternative_name"):
        for value in peer.get(key) or ():
            name = value.decode("utf-8", "replace")
            if name and name not in found:
                found.append(name)
    return found


def _by_certificate(grant: Grant, peer: AuthContext) -> Caller:
    pem = next(iter(peer.get("x509_pem_cert") or ()), b"")
    until = end_of(pem) if pem else float("inf")
    if until < time.time():
        # A connection may be older than that.
        raise unauthenticated("CERTIFICATE_EXPIRED", "The client's certificate is over.")
    return Caller(grant.name, "certificate", frozenset(grant.roles), grant.replicator, until)
