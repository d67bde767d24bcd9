"""What a task may say of its PostgreSQL, and which collections its tables can hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from milvus_cdc.errors import UserError
from milvus_cdc.rows import Field, FieldType, Table
from milvus_cdc.secrets import SecretResolver
from milvus_cdc.sink.postgres import PostgresWriter, columns, settings
from milvuscdc.v1 import sink_postgres_pb2, task_pb2

T = FieldType
KEY = Field(100, "id", T.INT64, primary_key=True)
TLS = sink_postgres_pb2.PostgresTls


def spec(**options: Any) -> sink_postgres_pb2.PostgresSink:
    given: dict[str, Any] = {"host": "db", "database": "d", "user": "u", **options}
    return sink_postgres_pb2.PostgresSink(**given)


def read(**options: Any) -> settings.Settings:
    return settings.read(spec(**options), SecretResolver(env_prefix="S_", environ={"S_P": "pw"}))


def table(*fields: Field, database: str = "db", collection: str = "c", at: int = 1) -> Table:
    return Table("tasks/t", "u", at, database, collection, database, collection, (KEY, *fields))


def test_defaults() -> None:
    found = read()
    assert found.names("db", "c") == ("db", "c")
    assert found.checkpoint_schema == "milvus_cdc"
    assert found.max_connections == 4
    assert not found.sparsevec
    assert not found.strip_nul
    assert found.connection["port"] == 5432
    assert found.connection["sslmode"] == "disable"


def test_the_password_is_in_no_text() -> None:
    one = spec()
    one.password.env = "S_P"
    found = settings.read(one, SecretResolver(env_prefix="S_", environ={"S_P": "secret!"}))
    assert found.password() == "secret!"
    assert "secret!" not in repr(found) + found.place
    one.password.env = "S_MISSING"
    with pytest.raises(UserError, match="SECRET_MISSING") as raised:
        settings.read(one, SecretResolver(env_prefix="S_", environ={}))
    assert raised.value.field == "sink.postgres.password"


def test_libpq_takes_nothing_from_its_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that its environment could say is said by us."""
    given = read().connection
    said = {"host", "port", "dbname", "user", "passfile", "options", "sslmode"}
    assert said | {"application_name", "client_encoding", "gssencmode"} <= set(given)
    assert given["passfile"] == "/dev/null"


@pytest.mark.parametrize(
    ("schema", "name", "names"),
    [
        ("", "", ("db", "c")),
        ("lake", "{database}__{collection}", ("lake", "db__c")),
        ("{collection}", "{{x}}{database}", ("c", "{x}db")),
    ],
)
def test_templates(schema: str, name: str, names: tuple[str, str]) -> None:
    assert read(schema=schema, table=name).names("db", "c") == names


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        ({"schema": "{db}"}, "schema", r"unknown variable \{db\}"),
        ({"table": "{collection.__class__}"}, "table", "unknown variable"),
        ({"table": "{collection!r}"}, "table", "unknown variable"),
        ({"table": "{collection:>9}"}, "table", "unknown variable"),
        ({"table": "{}"}, "table", "unknown variable"),
        ({"table": "{collection"}, "table", "no template"),
        ({"checkpoint_schema": "pg_x"}, "checkpoint_schema", "cannot name a schema"),
        ({"tls": TLS(certificate_file="/x")}, "tls.key_file", "needs its key"),
        ({"tls": TLS(key_file="/x")}, "tls.certificate_file", "needs its key"),
        ({"tls": TLS(ca_file="/no/such")}, "tls.ca_file", "no file"),
    ],
)
def test_what_is_refused(options: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(UserError, match=f"INVALID_FIELD.*{words}") as raised:
        read(**options)
    assert raised.value.field == f"sink.postgres.{field}"


def test_tls(tmp_path: Path) -> None:
    pem = tmp_path / "x.pem"
    pem.write_text("")
    found = read(tls=TLS(ca_file=str(pem))).connection
    assert (found["sslmode"], found["sslrootcert"]) == ("verify-full", str(pem))
    assert found["sslcertmode"] == "disable"
    mode = sink_postgres_pb2.POSTGRES_TLS_MODE_VERIFY_CA
    whole = TLS(mode=mode, ca_file=str(pem), certificate_file=str(pem), key_file=str(pem))
    found = read(tls=whole).connection
    assert (found["sslmode"], found["sslcert"], found["sslkey"]) == (
        "verify-ca",
        str(pem),
        str(pem),
    )
    require = TLS(mode=sink_postgres_pb2.POSTGRES_TLS_MODE_REQUIRE, ca_file=str(pem))
    with pytest.raises(UserError, match=r"INVALID_FIELD.*verifies"):
        read(tls=require)


def test_a_task_names_it() -> None:
    from milvus_cdc.sink.registry import open_writer

    sink = task_pb2.Sink(postgres=spec())
    assert isinstance(open_writer(sink, SecretResolver(env_prefix="S_")), PostgresWriter)


# ---- what tables can hold


def violations(*tables: Table, **options: Any) -> list[str]:
    return columns.violations(tables, read(**options))


def test_nothing_is_wrong_with_ordinary_ones() -> None:
    wide = Field(101, "v", T.FLOAT_VECTOR, dim=16_000)
    bits = Field(102, "b", T.BINARY_VECTOR, dim=32_768)
    assert violations(table(wide, bits), table(collection="d"), table(database="e")) == []
    assert violations(table(collection="x" * 63)) == []


@pytest.mark.parametrize(
    ("made", "options", "words"),
    [
        ([table(), table(database="e", at=2)], {"schema": "one"}, "db.c and e.c would share"),
        ([table(collection="x" * 64)], {}, "cannot name its table"),
        ([table(collection="é" * 32)], {}, "cannot name its table"),
        ([table(database="pg_db")], {}, "keeps the schema pg_db"),
        ([table(database="milvus_cdc")], {}, "checkpoint_schema"),
        ([table(Field(101, "_ts", T.INT64))], {}, "field _ts has the name"),
        ([table(Field(101, "_partition", T.INT64))], {}, "field _partition has the name"),
        ([table(Field(101, "ctid", T.INT64))], {}, "field ctid has the name"),
        ([table(Field(101, "x" * 64, T.INT64))], {}, "longer than 63 bytes"),
        ([table(Field(101, "v", T.FLOAT_VECTOR, dim=16_001))], {}, "16001 dimensions"),
        ([table(Field(101, "v", T.FLOAT16_VECTOR, dim=16_001))], {}, "16001 dimensions"),
        (
            [table(*(Field(101 + at, f"f{at}", T.INT64) for at in range(1598)))],
            {},
            "more than 1600 columns",
        ),
    ],
)
def test_what_cannot_be_held(made: list[Table], options: dict[str, Any], words: str) -> None:
    [found] = violations(*made, **options)
    assert words in found


def test_every_type_has_a_column() -> None:
    for kind in T:
        element = T.INT64 if kind is T.ARRAY else None
        field = Field(101, "f", kind, dim=8, element_type=element)
        assert columns.sql_type(field, sparsevec=False), kind
