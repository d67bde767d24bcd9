"""A client's side: whom it trusts, who it is, and its channels.

Law: files are looked at before every connection and every call, so what was replaced is used from
the next one on; a token never travels in clear beyond this machine unless that was asked for.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

from milvus_cdc.errors import UserError
from milvus_cdc.trust.certificates import authorities, pair
from milvus_cdc.trust.settings import ClientTls, TokenFrom, host_of, on_loopback
from milvus_cdc.trust.watched import Watched

_LAST_CALLS_SECONDS = 24 * 3600.0
"""For what is still under way on a channel that has a successor."""


class Credentials:
    """What a client shows and what it expects. Without anything: plaintext, and nobody."""

    def __init__(
        self,
        *,
        tls: ClientTls | None = None,
        token: str = "",
        token_from: TokenFrom | None = None,
        insecure: bool = False,
        prefix: str = "",
    ) -> None:
        """`insecure` lets a token travel in clear. `prefix` stands before the names of fields in
        errors, as `controller`.

        Raises UserError FILE_UNREADABLE, CERTIFICATE_INVALID, TOKEN_INVALID.
        """
        self._tls = tls
        self._insecure = insecure
        self._fields = _Fields(prefix)
        self._channel: Watched[grpc.ChannelCredentials] | None = None
        self._token: Watched[str] | None = None
        self._fixed = ""
        if tls is not None:
            self._channel = self._watch(tls)
        if token:
            self._fixed = self._bearer(token.encode())
        elif token_from is not None and token_from.file is not None:
            files = ((self._fields.token, token_from.file),)
            self._token = Watched(files, lambda contents: self._bearer(contents[0]))
        elif token_from is not None:
            self._fixed = self._bearer(os.environ.get(token_from.env, "").encode())

    def channel(self, address: str, options: Sequence[tuple[str, Any]] = ()) -> grpc.aio.Channel:
        """Raises UserError TOKEN_IN_CLEAR."""
        if self._channel is not None and self._tls is not None:
            # Shared connections would outlive the certificates they were made with.
            own = [*options, ("grpc.use_local_subchannel_pool", 1)]
            if self._tls.server_name:
                own.append(("grpc.ssl_target_name_override", self._tls.server_name))
            return grpc.aio.secure_channel(address, self._channel.get(), options=own)
        clear = self._insecure or on_loopback(host_of(address))
        if not clear and (self._fixed or self._token is not None):
            raise UserError(
                "TOKEN_IN_CLEAR",
                f"{self._fields.tls}: without TLS the token would travel to {address} for all to "
                "read; use TLS",
                field=self._fields.tls,
            )
        return grpc.aio.insecure_channel(address, options=tuple(options))

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Of each call."""
        bearer = self._token.get() if self._token is not None else self._fixed
        return (("authorization", bearer),) if bearer else ()

    @property
    def generation(self) -> int:
        """Another one when the files for connections have changed."""
        if self._channel is None:
            return 0
        self._channel.get()
        return self._channel.generation

    def _watch(self, tls: ClientTls) -> Watched[grpc.ChannelCredentials]:
        fields = self._fields
        files: list[tuple[str, Path]] = []
        if tls.ca_file is not None:
            files.append((fields.ca, tls.ca_file))
        if tls.certificate_file is not None and tls.key_file is not None:
            files += [(fields.certificate, tls.certificate_file), (fields.key, tls.key_file)]

        def parse(contents: Sequence[bytes]) -> grpc.ChannelCredentials:
            rest = list(contents)
            trusted = authorities(rest.pop(0), fields.ca) if tls.ca_file is not None else None
            chain = key = None
            if rest:
                chain, key = pair(rest[0], rest[1], (fields.certificate, fields.key))
            return grpc.ssl_channel_credentials(trusted, key, chain)

        return Watched(files, parse)

    def _bearer(self, token: bytes) -> str:
        text = token.strip()
        if not text or not all(0x21 <= byte <= 0x7E for byte in text):
            raise UserError(
                "TOKEN_INVALID",
                f"{self._fields.token}: there is no token, or one with spaces or other characters "
                "that no token has",
                field=self._fields.token,
            )
        return f"Bearer {text.decode('ascii')}"


class _Fields:
    """How settings are called: `controllerTls.caFile`, or as options of the command."""

    def __init__(self, prefix: str) -> None:
        block = f"{prefix}Tls." if prefix else ""
        self.tls = f"{prefix}Tls" if prefix else "tls"
        self.token = f"{prefix}Token" if prefix else "token"
        self.ca = f"{block}caFile"
        self.certificate = f"{block}certificateFile"
        self.key = f"{block}keyFile"


class Line:
    """A channel to one address, opened anew for new calls when the credentials have changed."""

    def __init__(
        self, address: str, credentials: Credentials, options: Sequence[tuple[str, Any]] = ()
    ) -> None:
        self._address = address
        self._credentials = credentials
        self._options = tuple(options)
        self._generation = credentials.generation
        self._channel = credentials.channel(address, self._options)
        self._closing: dict[asyncio.Task[None], grpc.aio.Channel] = {}

    @property
    def channel(self) -> grpc.aio.Channel:
        generation = self._credentials.generation
        if generation != self._generation:
            self._generation = generation
            old = self._channel
            self._channel = self._credentials.channel(self._address, self._options)
            closing = asyncio.create_task(old.close(_LAST_CALLS_SECONDS))
            self._closing[closing] = old
            closing.add_done_callback(lambda task: self._closing.pop(task, None))
        return self._channel

    async def close(self) -> None:
        closing = dict(self._closing)
        for task in closing:
            task.cancel()
        await asyncio.gather(*closing, return_exceptions=True)
        for channel in (*closing.values(), self._channel):
            await channel.close()


class Showing:
    """A stub whose calls carry the credentials of the moment."""

    def __init__(self, stub: Any, line: Line, credentials: Credentials) -> None:
        self._stub = stub
        self._line = line
        self._credentials = credentials

    def __getattr__(self, method: str) -> Any:
        call = getattr(self._stub(self._line.channel), method)
        return lambda request, **more: call(request, metadata=self._credentials.metadata(), **more)
