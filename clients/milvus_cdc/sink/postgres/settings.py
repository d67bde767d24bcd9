"""What a task says of its PostgreSQL, checked, as what connects and what names tables.

Law: nothing but the task decides where a connection goes and as whom: libpq's environment
variables and files in the home directory (`PGHOSTADDR`, `~/.pgpass`, ...) do not count.
"""

from __future__ import annotations

import ssl
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from milvuscdc.v1 import sink_postgres_pb2

from milvus_cdc.errors import UserError
from milvus_cdc.secrets import SecretResolver, live
from milvus_cdc.sink_connections import POSTGRES_CONNECTIONS

FIELD = "sink.postgres"
DEFAULT_PORT = 5432
DEFAULT_CHECKPOINT_SCHEMA = "milvus_cdc"
MAX_NAME_BYTES = 63
"""NAMEDATALEN - 1; PostgreSQL would cut longer names off and say so in a notice only."""

_VARIABLES = frozenset(("database", "collection"))
_SSL_MODES = {
    sink_postgres_pb2.POSTGRES_TLS_MODE_UNSPECIFIED: "verify-full",
    sink_postgres_pb2.POSTGRES_TLS_MODE_REQUIRE: "require",
    sink_postgres_pb2.POSTGRES_TLS_MODE_VERIFY_CA: "verify-ca",
    sink_postgres_pb2.POSTGRES_TLS_MODE_VERIFY_FULL: "verify-full",
}
_SYSTEM_AUTHORITIES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
)
"""Of Debian, Fedora, Alpine: the OpenSSL inside psycopg's wheel knows another system's places."""


@dataclass(frozen=True)
class Settings:
    """Of one sink. `connection` is what libpq gets, by keyword, beside `password`, which is asked
    for each new connection.
    """

    schema: str
    table: str
    checkpoint_schema: str
    max_connections: int
    sparsevec: bool
    strip_nul: bool
    connection: Mapping[str, str | int] = field(repr=False)
    password: Callable[[], str | None] = field(repr=False)

    @property
    def place(self) -> str:
        """For messages: who connects to what."""
        c = self.connection
        return f"{c['user']}@{c['host']}:{c['port']}/{c['dbname']}"

    def names(self, database: str, collection: str) -> tuple[str, str]:
        """Schema and table of a collection with these names at the sink."""
        values = {"database": database, "collection": collection}
        return self.schema.format_map(values), self.table.format_map(values)


def read(spec: sink_postgres_pb2.PostgresSink, secrets: SecretResolver) -> Settings:
    """Raises UserError naming the field: a template that is none, a secret that is not there."""
    checkpoint_schema = spec.checkpoint_schema or DEFAULT_CHECKPOINT_SCHEMA
    if len(checkpoint_schema.encode()) > MAX_NAME_BYTES or checkpoint_schema.startswith("pg_"):
        raise _invalid(
            "checkpoint_schema",
            f"{checkpoint_schema!r} cannot name a schema: at most 63 bytes, not beginning with pg_",
        )
    return Settings(
        schema=_template("schema", spec.schema or "{database}"),
        table=_template("table", spec.table or "{collection}"),
        checkpoint_schema=checkpoint_schema,
        max_connections=spec.max_connections or POSTGRES_CONNECTIONS,
        sparsevec=spec.sparse_vectors == sink_postgres_pb2.POSTGRES_SPARSE_VECTORS_SPARSEVEC,
        strip_nul=spec.nul_characters == sink_postgres_pb2.POSTGRES_NUL_CHARACTERS_STRIP,
        connection=_connection(spec),
        password=_password(spec, secrets),
    )


def _invalid(name: str, message: str) -> UserError:
    place = f"{FIELD}.{name}"
    return UserError("INVALID_FIELD", f"{place}: {message}", field=place)


def _template(name: str, template: str) -> str:
    known = "{database} and {collection} are known"
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise _invalid(name, f"{template!r} is no template ({error}); {known}") from error
    for _, variable, form, conversion in parts:
        if variable is None:
            continue
        if variable not in _VARIABLES or form or conversion:
            raise _invalid(name, f"unknown variable {{{variable}}} in {template!r}; {known}")
    if "\0" in template:
        raise _invalid(name, "a name cannot hold U+0000")
    return template


def _password(
    spec: sink_postgres_pb2.PostgresSink, secrets: SecretResolver
) -> Callable[[], str | None]:
    password = live(secrets, spec.password, f"{FIELD}.password")
    if "\0" in (password() or ""):
        raise _invalid("password", "a password cannot hold U+0000")
    return password


def _connection(spec: sink_postgres_pb2.PostgresSink) -> dict[str, str | int]:
    # https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS
    if "\0" in spec.database + spec.user:
        raise _invalid("user", "user and database cannot hold U+0000")
    return {
        "host": spec.host,
        "port": spec.port or DEFAULT_PORT,
        "dbname": spec.database,
        "user": spec.user,
        "passfile": "/dev/null",
        "application_name": "milvus-cdc",
        "client_encoding": "UTF8",
        "target_session_attrs": "any",
        "options": "",
        "gssencmode": "disable",
        # A peer that vanished is noticed also while an answer is awaited.
        "keepalives": 1,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 30_000,
        **_tls(spec),
    }


def _tls(spec: sink_postgres_pb2.PostgresSink) -> dict[str, str | int]:
    if not spec.HasField("tls"):
        return {"sslmode": "disable"}
    tls = spec.tls
    mode = _SSL_MODES[tls.mode]
    if bool(tls.certificate_file) != bool(tls.key_file):
        missing = "tls.key_file" if tls.certificate_file else "tls.certificate_file"
        raise _invalid(missing, "a client certificate needs its key, and a key its certificate")
    for name, path in (
        ("tls.ca_file", tls.ca_file),
        ("tls.certificate_file", tls.certificate_file),
        ("tls.key_file", tls.key_file),
    ):
        if path and not Path(path).is_file():
            raise _invalid(name, f"there is no file {path} on this replicator")
    values: dict[str, str | int] = {"sslmode": mode, "sslcertmode": "disable"}
    if tls.certificate_file:
        values |= {
            "sslcertmode": "allow",
            "sslcert": tls.certificate_file,
            "sslkey": tls.key_file,
        }
    if mode != "require":
        values["sslrootcert"] = tls.ca_file or _system_authorities()
    elif tls.ca_file:
        raise _invalid("tls.ca_file", "an authority is looked at with a mode that verifies only")
    else:
        # A file in the home directory would turn `require` into `verify-ca`.
        values["sslrootcert"] = "/nonexistent/root.crt"
    return values


def _system_authorities() -> str:
    default = ssl.get_default_verify_paths().cafile
    for path in (default, *_SYSTEM_AUTHORITIES):
        if path and Path(path).is_file():
            return path
    raise _invalid(
        "tls.ca_file", "this replicator's system has no authorities of its own: name one"
    )
