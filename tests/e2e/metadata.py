"""What two Milvus servers say of themselves, rows aside, through their public APIs, and where they
differ.

Law: nothing here knows how replication works; it asks both servers the same questions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from pymilvus.grpc_gen import common_pb2, milvus_pb2, milvus_pb2_grpc, schema_pb2

Snapshot = dict[str, Any]
"""What is asked -> what was answered, flat, so that a difference has a name."""

_SECONDS = 20.0
_INDEX_PARAMS_IGNORED = frozenset({"dim"})


@contextmanager
def _stub(uri: str) -> Iterator[Any]:
    channel = grpc.insecure_channel(uri.removeprefix("http://"))
    try:
        yield milvus_pb2_grpc.MilvusServiceStub(channel)
    finally:
        channel.close()


def snapshot(uri: str, databases: Iterable[str]) -> Snapshot:
    """Everything below these databases. RuntimeError when the server refuses a question."""
    said: Snapshot = {}
    with _stub(uri) as stub:
        there = set(_ok(stub.ListDatabases(milvus_pb2.ListDatabasesRequest())).db_names)
        for database in databases:
            said[f"{database}: exists"] = database in there
            if database in there:
                _database(stub, database, said)
    return said


def rbac(uri: str, prefix: str, databases: Iterable[str]) -> Snapshot:
    """Roles whose names begin with `prefix`: their members and what they may do in these."""
    said: Snapshot = {}
    with _stub(uri) as stub:
        roles = _ok(stub.SelectRole(milvus_pb2.SelectRoleRequest(include_user_info=True)))
        for result in roles.results:
            role = result.role.name
            if not role.startswith(prefix):
                continue
            said[f"role {role}: members"] = sorted(user.name for user in result.users)
            for database in databases:
                entity = milvus_pb2.GrantEntity(
                    role=milvus_pb2.RoleEntity(name=role), db_name=database
                )
                grants = _ok(stub.SelectGrant(milvus_pb2.SelectGrantRequest(entity=entity)))
                said[f"role {role}: grants in {database}"] = sorted(
                    (grant.object.name, grant.object_name, grant.grantor.privilege.name)
                    for grant in grants.entities
                )
    return said


def differences(left: Snapshot, right: Snapshot) -> list[str]:
    """One line each, empty when both say the same."""
    return [
        f"{question}: {left.get(question, '(nothing)')!r} != {right.get(question, '(nothing)')!r}"
        for question in sorted(left.keys() | right.keys())
        if left.get(question, "(nothing)") != right.get(question, "(nothing)")
    ]


def _database(stub: Any, database: str, said: Snapshot) -> None:
    shown = _ok(stub.ShowCollections(milvus_pb2.ShowCollectionsRequest(db_name=database)))
    names = sorted(shown.collection_names)
    said[f"{database}: collections"] = names
    for name in names:
        _collection(stub, database, name, said)


def _collection(stub: Any, database: str, name: str, said: Snapshot) -> None:
    at = {"db_name": database, "collection_name": name}
    full = f"{database}.{name}"
    described = _ok(stub.DescribeCollection(milvus_pb2.DescribeCollectionRequest(**at)))
    schema = described.schema
    said[f"{full}: description"] = schema.description
    said[f"{full}: dynamic"] = schema.enable_dynamic_field
    said[f"{full}: shards"] = described.shards_num
    said[f"{full}: consistency"] = described.consistency_level
    said[f"{full}: aliases"] = sorted(described.aliases)
    said[f"{full}: properties"] = {p.key: p.value for p in described.properties}
    for field in schema.fields:
        said[f"{full}: field {field.name}"] = _field(field)
    partitions = _ok(stub.ShowPartitions(milvus_pb2.ShowPartitionsRequest(**at)))
    said[f"{full}: partitions"] = sorted(partitions.partition_names)
    for index in _indexes(stub, at):
        params = {p.key: p.value for p in index.params if p.key not in _INDEX_PARAMS_IGNORED}
        if "params" in params:
            params["params"] = json.loads(params["params"])
        said[f"{full}: index {index.index_name}"] = (index.field_name, params)
    _load(stub, at, full, said)


def _field(field: schema_pb2.FieldSchema) -> dict[str, Any]:
    # A collection with automatic keys is followed by one that takes its keys: see README, Limits.
    return {
        "type": schema_pb2.DataType.Name(field.data_type),
        "element": schema_pb2.DataType.Name(field.element_type),
        "primary": field.is_primary_key,
        "partition key": field.is_partition_key,
        "description": field.description,
        "params": {p.key: p.value for p in field.type_params},
    }


def _indexes(stub: Any, at: dict[str, str]) -> list[Any]:
    answer = stub.DescribeIndex(milvus_pb2.DescribeIndexRequest(**at), timeout=_SECONDS)
    if answer.status.code == 700 or "index not found" in answer.status.reason:
        return []
    return list(_ok(answer).index_descriptions)


def _load(stub: Any, at: dict[str, str], full: str, said: Snapshot) -> None:
    state = _ok(stub.GetLoadState(milvus_pb2.GetLoadStateRequest(**at))).state
    said[f"{full}: load"] = common_pb2.LoadState.Name(state)
    if state == common_pb2.LoadStateNotLoad:
        return
    memory = milvus_pb2.ShowPartitionsRequest(**at, type=milvus_pb2.ShowType.InMemory)
    answer = stub.ShowPartitions(memory, timeout=_SECONDS)
    if "not loaded" in answer.status.reason:
        return
    said[f"{full}: loaded partitions"] = sorted(_ok(answer).partition_names)
    replicas = _ok(stub.GetReplicas(milvus_pb2.GetReplicasRequest(**at)))
    said[f"{full}: replicas"] = len(replicas.replicas)


def _ok(answer: Any) -> Any:
    status = answer.status
    if status.code or status.error_code:
        raise RuntimeError(f"{type(answer).__name__}: {status.code} {status.reason}")
    return answer
