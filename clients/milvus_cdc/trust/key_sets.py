"""Where the public keys of a tokens' issuer come from: a file or an address."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from pathlib import Path
from typing import Protocol

import httpx
import structlog

from milvus_cdc.errors import UserError
from milvus_cdc.trust.settings import JwtSettings
from milvus_cdc.trust.watched import FILE_BYTES_MAX, Watched
from milvus_cdc.trust.web_tokens import Key, parse_keys

log = structlog.get_logger(__name__)

LOOK_SECONDS = 1.0
FETCH_SECONDS = 5.0
AGAIN_SECONDS = 5.0
"""After a fetch that failed, and between two that unknown keys ask for."""


class KeySet(Protocol):
    @property
    def keys(self) -> tuple[Key, ...] | None:
        """None while they could not be read yet."""

    @property
    def generation(self) -> int: ...

    async def seek(self) -> None:
        """Somebody shows a token with a key that is not among them."""

    def start(self) -> None: ...

    async def close(self) -> None: ...


def key_set(settings: JwtSettings) -> KeySet:
    """Raises UserError FILE_UNREADABLE, JWKS_INVALID, CERTIFICATE_INVALID."""
    if settings.jwks_file is not None:
        return _FileKeys(settings.jwks_file)
    return _FetchedKeys(settings)


class _FileKeys:
    def __init__(self, path: Path) -> None:
        field = "auth.jwt.jwksFile"
        self._keys = Watched(
            ((field, path),), lambda contents: parse_keys(contents[0], field),
            look_seconds=LOOK_SECONDS,
        )  # fmt: skip

    @property
    def keys(self) -> tuple[Key, ...] | None:
        return self._keys.get()

    @property
    def generation(self) -> int:
        self._keys.get()
        return self._keys.generation

    async def seek(self) -> None: ...

    def start(self) -> None: ...

    async def close(self) -> None: ...


class _FetchedKeys:
    """Read at the start and every now and then; while that fails the last ones count."""

    def __init__(self, settings: JwtSettings) -> None:
        self._url = settings.jwks_url
        self._refresh_seconds = settings.refresh_seconds
        self.keys: tuple[Key, ...] | None = None
        self.generation = 0
        self._fetching: asyncio.Task[None] | None = None
        self._fetched = asyncio.Lock()
        self._last = float("-inf")
        try:
            context = ssl.create_default_context(cafile=settings.jwks_ca_file)
        except (OSError, ssl.SSLError) as error:
            field = "auth.jwt.jwksCaFile"
            raise UserError(
                "CERTIFICATE_INVALID",
                f"{field}: {settings.jwks_ca_file} holds no authority that can be used",
                field=field,
            ) from error
        self._client = httpx.AsyncClient(
            verify=context, timeout=FETCH_SECONDS, follow_redirects=False
        )

    def start(self) -> None:
        self._fetching = asyncio.create_task(self._run(), name="keys of tokens")

    async def seek(self) -> None:
        if time.monotonic() - self._last >= AGAIN_SECONDS:
            await self._fetch()

    async def close(self) -> None:
        if self._fetching is not None:
            self._fetching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._fetching
        await self._client.aclose()

    async def _run(self) -> None:
        while True:
            good = await self._fetch()
            await asyncio.sleep(self._refresh_seconds if good else AGAIN_SECONDS)

    async def _fetch(self) -> bool:
        began = time.monotonic()
        async with self._fetched:
            if self._last > began:
                return self.keys is not None  # somebody else has just done it
            self._last = time.monotonic()
            try:
                keys = parse_keys(await self._read(), "auth.jwt.jwksUrl")
            except (httpx.HTTPError, UserError, TimeoutError) as error:
                log.warning("the keys of tokens cannot be read", url=self._url, error=str(error))
                return False
            finally:
                self._last = time.monotonic()
            if [key.id for key in keys] != [key.id for key in self.keys or ()]:
                log.info("keys of tokens", url=self._url, kids=[key.id for key in keys])
            self.keys = keys
            self.generation += 1
            return True

    async def _read(self) -> bytes:
        content = b""
        async with (
            asyncio.timeout(2 * FETCH_SECONDS),
            self._client.stream("GET", self._url) as answer,
        ):
            if answer.status_code != httpx.codes.OK:
                raise httpx.HTTPError(f"status {answer.status_code}")
            async for part in answer.aiter_bytes():
                content += part
                if len(content) > FILE_BYTES_MAX:
                    raise httpx.HTTPError(f"more than {FILE_BYTES_MAX} bytes")
        return content
