"""What an answer of PostgreSQL means as one of our errors.

Laws: what the server took back or never heard of is RetryableError; only a COMMIT without an answer
is UnknownOutcomeError; what stays wrong until a person acts is UserError.

Codes: https://www.postgresql.org/docs/current/errcodes-appendix.html. A refused connection has no
code (libpq does not tell it), so the server's words are looked at; in another language than English
they are not recognised, and what is wrong is then shown as SINK_UNREACHABLE with its words.
"""

from __future__ import annotations

import re

import psycopg

from milvus_cdc.errors import (
    CdcError,
    RetryableError,
    RowRefusedError,
    UnknownOutcomeError,
    UserError,
)
from milvus_cdc.sink.postgres.settings import FIELD, Settings

_COPY_CONTEXT = re.compile(r"^COPY [^,]+, line (\d+)(?:, column ([^:]+?))?(?:: .*)?$", re.M)

# Words of the server or of libpq, reason, field, what to do; None as reason: worth another try.
_REFUSALS: tuple[tuple[str, str, str, str], ...] = (
    (
        r"password authentication failed|authentication failed|no password supplied"
        r'|role ".*" (?:does not exist|is not permitted)',
        "SINK_AUTHENTICATION_FAILED",
        "password",
        "check user and password",
    ),
    (r'database ".*" does not exist', "SINK_DATABASE_MISSING", "database", "make it there"),
    (
        r"permission denied for database",
        "SINK_ACCESS_DENIED",
        "user",
        "GRANT CONNECT on the database to this user",
    ),
    (
        r"no pg_hba\.conf entry|rejects connection",
        "SINK_ACCESS_DENIED",
        "tls",
        "the server's pg_hba.conf lets nobody in this way: allow this user and address there, or "
        "connect with tls",
    ),
    (
        r"server does not support SSL|does not match host name|certificate verify failed"
        r"|certificate is not trusted|root certificate file|SSL error|SSL SYSCALL|private key file",
        "SINK_TLS_FAILED",
        "tls",
        "check tls and the certificates of both sides",
    ),
)
_USER = {
    "42501": ("SINK_ACCESS_DENIED", "grant it (docs/postgres.md lists the rights)"),
    "42P01": ("SINK_COLLECTION_MISSING", "`milvus-cdc task resync` fills it anew"),
    "3F000": ("SINK_COLLECTION_MISSING", "`milvus-cdc task resync` fills it anew"),
    "42703": ("SCHEMA_MISMATCH", "a column was changed: restore it, or resync the collection"),
    "42804": ("SCHEMA_MISMATCH", "a column was changed: restore it, or resync the collection"),
    "42P10": ("SCHEMA_MISMATCH", "the key has no unique index any more: make it again"),
    "2BP01": (
        "SINK_TABLE_IN_USE",
        "drop there what depends on the table, then `milvus-cdc task retry`",
    ),
    "0A000": ("SINK_REFUSED", "change that at the server, then `milvus-cdc task retry`"),
}
_UNAVAILABLE = frozenset(("57P01", "57P02", "57P03", "57P05"))
_TIMEOUTS = frozenset(("57014", "55P03", "25P03", "25P04"))


def of_connecting(error: Exception, settings: Settings) -> CdcError:
    """A connection that was not made."""
    text = " ".join(str(error).split()) or type(error).__name__
    for words, reason, name, advice in _REFUSALS:
        if re.search(words, text):
            return UserError(reason, f"{settings.place}: {text}; {advice}", field=f"{FIELD}.{name}")
    return RetryableError(
        "SINK_UNREACHABLE", f"{settings.place}: {text or 'no answer'}", field=f"{FIELD}.host"
    )


def of_statement(error: Exception, doing: str, *, committing: bool = False) -> CdcError:
    """`doing`: for the message, for example `writing db.collection`; `committing`: COMMIT was sent,
    so a connection that broke says nothing.
    """
    code = error.sqlstate if isinstance(error, psycopg.Error) else None
    text = f"{doing}: {_words(error)}"
    if code is None or code.startswith("08") or code in _UNAVAILABLE:
        if committing:
            return UnknownOutcomeError("SINK_CONNECTION_LOST", f"{text}, while it committed")
        return RetryableError("SINK_CONNECTION_LOST", text)
    if (known := _USER.get(code)) is not None:
        reason, advice = known
        return UserError(reason, f"{text}; {advice}", field=FIELD)
    if code in _TIMEOUTS:
        return RetryableError("SINK_TIMEOUT", text)
    if code == "53100":
        return RetryableError("SINK_DISK_FULL", f"{text}; make room at the server")
    if code == "25006":
        return RetryableError(
            "SINK_READ_ONLY",
            f"{text}; the server is a standby or was made read-only: connect to the primary",
            field=f"{FIELD}.host",
        )
    match code[:2]:
        case "40" | "53" | "55" | "58":
            return RetryableError("SINK_ERROR", f"{text} ({code})")
        case "22" | "23" | "54":
            return RowRefusedError(
                "ROW_NOT_STORABLE", f"{text}; change the row at the source, or resync"
            )
    return UserError("SINK_REFUSED", f"{text} ({code})", field=FIELD)


def copied_line(error: psycopg.Error) -> tuple[int, str] | None:
    """Which row of a COPY (from 0) and which column, empty when it is none of them, was refused."""
    found = _COPY_CONTEXT.search(error.diag.context or "")
    return (int(found[1]) - 1, found[2] or "") if found else None


def is_data_error(error: psycopg.Error) -> bool:
    """The server refuses a value."""
    return (error.sqlstate or "")[:2] in ("22", "23", "54")


def _words(error: Exception) -> str:
    if isinstance(error, psycopg.Error) and error.diag.message_primary:
        detail = error.diag.message_detail
        return error.diag.message_primary + (f" ({detail})" if detail else "")
    return " ".join(str(error).split()) or type(error).__name__
