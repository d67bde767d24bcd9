"""TLS towards other systems over gRPC: files of certificates, and what is to blame when no
connection comes about.

Laws: files are looked at before they are used, and those that do not fit are never used; gRPC says
of most failures only that there is no connection, so who failed asks `diagnose`, whose answer is a
person's to mend. What may pass by itself (a server that is not there, or is just ending) is never
diagnosed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
from milvuscdc.v1 import tls_pb2

from milvus_cdc.errors import UserError

Stamp = tuple[tuple[int, int, int] | None, ...]
"""Changes with the files: modification time, inode and size of each."""

_READS = 3
_ANSWER_SECONDS = 0.5
# An empty SETTINGS frame behind the preface: what every HTTP/2 client begins with.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
_SETTINGS = 4
_WRONG_NAME = frozenset({62, 64})
"""X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH."""
_SYSTEM = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt")


@dataclass(frozen=True, slots=True)
class Fields:
    """Where settings stand, so that errors can name them."""

    path: str = ""
    spelled: Callable[[str], str] = str
    """How a field is written there: `ca_file`, `caFile`, `--ca-file`."""

    def name(self, *fields: str) -> str:
        return ".".join(filter(None, (self.path, *map(self.spelled, fields))))


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """As milvuscdc.v1.Tls says; an empty text is a setting that was left out."""

    ca_file: str = ""
    certificate_file: str = ""
    key_file: str = ""
    server_name: str = ""
    fields: Fields = Fields("tls")
    """Where these settings stand, `tls` itself being part of the path."""

    @classmethod
    def of(cls, tls: tls_pb2.Tls, fields: Fields) -> TlsFiles:
        return cls(tls.ca_file, tls.certificate_file, tls.key_file, tls.server_name, fields)

    def stamp(self) -> Stamp:
        return tuple(map(_stamp, (self.ca_file, self.certificate_file, self.key_file)))

    def load(self) -> tuple[grpc.ChannelCredentials, Stamp]:
        """Credentials for channels, and of which state of the files they are.

        Raises UserError TLS_FILE_UNUSABLE naming the file and its field.
        """
        for _ in range(_READS):
            before = self.stamp()
            self.context()
            credentials = grpc.ssl_channel_credentials(
                self._read("ca_file") if self.ca_file else _system_roots(),
                self._read("key_file") if self.key_file else None,
                self._read("certificate_file") if self.certificate_file else None,
            )
            if self.stamp() == before:
                return credentials, before
        raise self._unusable("certificate_file", "it is being written over again and again")

    def context(self) -> ssl.SSLContext:
        """The same for Python's own TLS. Raises as `load`."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.set_alpn_protocols(["h2"])
        if self.ca_file:
            try:
                context.load_verify_locations(cadata=self._read("ca_file").decode("ascii"))
            except (ssl.SSLError, UnicodeDecodeError) as error:
                raise self._unusable("ca_file", "it holds no certificate in PEM") from error
        else:
            context.load_default_certs()
        if bool(self.certificate_file) != bool(self.key_file):
            missing = "key_file" if self.certificate_file else "certificate_file"
            name = self.fields.name(missing)
            raise UserError(
                "INVALID_FIELD",
                f"{name} is missing: a client's certificate and its key go together",
                field=name,
            )
        if self.certificate_file:
            for part in ("certificate_file", "key_file"):
                self._read(part)
            try:
                # A password is asked for at the terminal unless one is given.
                context.load_cert_chain(self.certificate_file, self.key_file, password="-")
            except ssl.SSLError as error:
                raise self._unusable(
                    "key_file",
                    f"it is not the key of {self.certificate_file}, or one of the two is not PEM, "
                    "or the key is encrypted",
                ) from error
        return context

    def _read(self, part: str) -> bytes:
        try:
            return Path(getattr(self, part)).read_bytes()
        except (OSError, ValueError) as error:
            what = error.strerror if isinstance(error, OSError) else "it is no path"
            raise self._unusable(part, f"it cannot be read here: {what}") from error

    def _unusable(self, part: str, why: str) -> UserError:
        name = self.fields.name(part)
        return UserError("TLS_FILE_UNUSABLE", f"{name}: {getattr(self, part)}: {why}", field=name)


async def diagnose(
    address: str, tls: TlsFiles | None, fields: Fields, seconds: float
) -> UserError | None:
    """Why no connection to `address` (`host:port`) comes about, if TLS is to blame for it; `fields`
    is where `tls` stands or could stand.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        async with asyncio.timeout(seconds):
            if tls is None:
                return await _wants_tls(host, int(port), address, fields)
            return await _fault(host, int(port), address, tls)
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        return None


async def _fault(host: str, port: int, address: str, tls: TlsFiles) -> UserError | None:
    named = tls.server_name or host
    try:
        reader, writer = await asyncio.open_connection(
            host, port, ssl=tls.context(), server_hostname=named
        )
        try:
            # With TLS 1.3 the server looks at the client's certificate after the client is done.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ANSWER_SECONDS):
                    await reader.read(1)
        finally:
            writer.close()
        return None
    except UserError as error:
        return error
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in _WRONG_NAME:
            return _error(
                tls.fields,
                "TLS_SERVER_NAME",
                "server_name",
                f"the certificate of {address} is not for {named}; name the host that it is for",
            )
        authority = tls.ca_file or "any authority that this system knows"
        return _error(
            tls.fields,
            "TLS_SERVER_UNTRUSTED",
            "ca_file",
            f"the certificate of {address} is not trusted by {authority} ({error.verify_message})",
        )
    except ssl.SSLError as error:
        if "ALERT" in (error.reason or ""):
            what = (
                f"{address} refuses the certificate in {tls.certificate_file}"
                if tls.certificate_file
                else f"{address} wants a client's certificate and was given none"
            )
            return _error(
                tls.fields, "TLS_CLIENT_REFUSED", "certificate_file", f"{what} ({error.reason})"
            )
    except (ConnectionError, asyncio.IncompleteReadError):
        pass
    if await _speaks_plaintext(host, port):
        return _error(
            tls.fields,
            "TLS_NOT_SPOKEN",
            "",
            f"{address} answers without TLS; leave it out (a Milvus: http://)",
        )
    return None


async def _wants_tls(host: str, port: int, address: str, fields: Fields) -> UserError | None:
    if await _speaks_plaintext(host, port):
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    # Nothing is sent; it is only asked whether TLS is spoken at all.
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        _, writer = await asyncio.open_connection(host, port, ssl=context)
        writer.close()
    except ssl.SSLError as error:
        if "ALERT" not in (error.reason or ""):
            return None
    return _error(
        fields, "TLS_NEEDED", "", f"{address} speaks TLS; set it (a Milvus: and https://)"
    )


async def _speaks_plaintext(host: str, port: int) -> bool:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(_PREFACE)
        async with asyncio.timeout(_ANSWER_SECONDS):
            return (await reader.readexactly(9))[3] == _SETTINGS
    except (TimeoutError, ConnectionError, asyncio.IncompleteReadError):
        return False
    finally:
        writer.close()


def _error(fields: Fields, reason: str, part: str, text: str) -> UserError:
    name = fields.name(part) if part else fields.path
    return UserError(reason, f"{name}: {text}" if name else text, field=name)


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path) if path else None
    except (OSError, ValueError):
        return None
    return None if found is None else (found.st_mtime_ns, found.st_ino, found.st_size)


def _system_roots() -> bytes | None:
    """None for those that gRPC brings with it."""
    known = ssl.get_default_verify_paths()
    for path in (os.environ.get(known.openssl_cafile_env), known.cafile, *_SYSTEM):
        if path:
            with contextlib.suppress(OSError):
                return Path(path).read_bytes()
    return None
