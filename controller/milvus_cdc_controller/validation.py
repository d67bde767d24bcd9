"""Requests checked against the rules in the protos, and against what a single message's rules
cannot say.
"""

from __future__ import annotations

import protovalidate
from google.protobuf.message import Message
from milvus_cdc.selection import wildcards
from milvus_cdc.sink_connections import connections_each
from milvuscdc.v1 import task_pb2, tls_pb2
from milvuscdc.v1 import task_service_pb2 as pb

from milvus_cdc_controller.api_errors import ApiError
from milvus_cdc_controller.present import endpoint_id

_CARRIES = frozenset(f"carry.{each.name}" for each in task_pb2.Carry.DESCRIPTOR.fields)
_BATCHING = frozenset(f"batching.{each.name}" for each in task_pb2.Batching.DESCRIPTOR.fields)
_LIMITS = frozenset(f"limits.{each.name}" for each in task_pb2.Limits.DESCRIPTOR.fields)
_UPDATABLE = (
    {
        "labels",
        "selection",
        "selection.include",
        "selection.exclude",
        "drift",
        "carry",
        "batching",
        "limits",
        "dead_letters",
        "replicator_labels",
        "split",
        "split.max_parts",
    }
    | _CARRIES
    | _BATCHING
    | _LIMITS
)
WILDCARDS_MAX = 8_192
WAYS_MAX = 2_000
_PARTS = frozenset(path.partition(".")[0] for path in _UPDATABLE)
_ROTATION = {"max_bytes": "rotate_bytes", "linger": "rotate_interval"}
_OUTPUT_ONLY = {
    "uid", "etag", "generation", "observed_generation", "state", "reason", "message",
    "state_time", "create_time", "update_time", "progress", "conditions",
}  # fmt: skip


def check(request: Message) -> None:
    """Raises ApiError INVALID_FIELD that names every field at fault."""
    violations = protovalidate.collect_violations(request)
    if violations:
        found = tuple(
            (_path(violation.proto.field), violation.proto.message or violation.proto.rule_id)
            for violation in violations
        )
        raise invalid(found)


def check_create(request: pb.CreateTaskRequest) -> None:
    check(request)
    task = request.task
    source, sink = task.source.milvus.uri, task.sink.milvus.uri
    if source and sink and endpoint_id(source) == endpoint_id(sink):
        raise ApiError(
            "INVALID_ARGUMENT",
            "SINK_IS_SOURCE",
            "Source and sink are the same Milvus: the task would feed itself.",
            field="task.sink.milvus.uri",
        )
    _check_trust(task)
    check_batching(task)
    check_limits(task)
    check_split(task)
    check_globs(task)


def check_globs(task: task_pb2.Task) -> None:
    """Raises ApiError SELECTION_TOO_COMPLEX: every task's globs are compared with those of the
    others, while everything else waits.
    """
    include, exclude = list(task.selection.include), list(task.selection.exclude)
    rules = [getattr(rule, "from") for rule in task.rename]
    wild = [glob for glob in include if wildcards([glob])]
    wild_rules = [rule for rule in rules if wildcards([rule])]
    ways = len(wild) * len(rules) + len(wild_rules) * len(include)
    length = wildcards([*include, *exclude, *rules])
    if length > WILDCARDS_MAX:
        what = f"globs with a wildcard have {length} characters together, {WILDCARDS_MAX} may be"
    elif ways > WAYS_MAX:
        what = f"selection and rename meet in {ways} ways, {WAYS_MAX} may be"
    else:
        return
    raise ApiError(
        "INVALID_ARGUMENT",
        "SELECTION_TOO_COMPLEX",
        f"The {what}; say it with fewer globs, name collections without a wildcard, or divide it "
        "into several tasks.",
        field="task.selection",
    )


def _check_trust(task: task_pb2.Task) -> None:
    """Raises ApiError INVALID_FIELD for TLS and logins that cannot be meant so."""
    etcd = task.source.etcd
    if bool(etcd.username) != etcd.HasField("password"):
        missing = "password" if etcd.username else "username"
        field = f"task.source.etcd.{missing}"
        raise invalid(((field, "username and password go together"),))
    for field, endpoint in (
        ("task.source.milvus", task.source.milvus),
        ("task.sink.milvus", task.sink.milvus),
    ):
        if endpoint.HasField("tls") and not endpoint.uri.startswith("https://"):
            raise invalid(((f"{field}.tls", f"needs {field}.uri to be https://host:port"),))
        _check_tls(f"{field}.tls", endpoint.tls)
    _check_tls("task.source.etcd.tls", etcd.tls)


def _check_tls(field: str, tls: tls_pb2.Tls) -> None:
    if bool(tls.certificate_file) != bool(tls.key_file):
        missing = "key_file" if tls.certificate_file else "certificate_file"
        text = "a client's certificate and its key go together"
        raise invalid(((f"{field}.{missing}", text),))


def check_batching(task: task_pb2.Task) -> None:
    """Raises ApiError for what has no meaning at the task's kind of sink."""
    if task.sink.WhichOneof("kind") != "files":
        return
    for field, _ in task.batching.ListFields():
        if field.name in _ROTATION:
            raise ApiError(
                "INVALID_ARGUMENT",
                "NOT_FOR_THIS_SINK",
                f"batching.{field.name} says nothing about files, which are published whole; "
                f"sink.files.{_ROTATION[field.name]} says when.",
                field=f"task.batching.{field.name}",
            )


def check_limits(task: task_pb2.Task) -> None:
    """Raises ApiError for connections that nobody counts, or too few for one replicator."""
    wanted, field = task.limits.connections, "task.limits.connections"
    if not wanted:
        return
    each = connections_each(task.sink)
    if not each:
        raise ApiError(
            "INVALID_ARGUMENT",
            "NOT_FOR_THIS_SINK",
            "limits.connections is for a Milvus or a PostgreSQL: how many connections others need "
            "is up to their clients; limits.requestsInFlight bounds what they are asked at once.",
            field=field,
        )
    if wanted < each:
        raise invalid(((field, f"one replicator has {each} (sink.postgres.maxConnections)"),))


def check_split(task: task_pb2.Task) -> None:
    """Raises ApiError where the task's kind of sink takes no parts of a collection."""
    if task.split.max_parts > 1 and task.sink.WhichOneof("kind") != "milvus":
        raise ApiError(
            "INVALID_ARGUMENT",
            "NOT_FOR_THIS_SINK",
            "split.max_parts is for sink.milvus only: other sinks have one writer for each "
            "collection; leave it out.",
            field="task.split.max_parts",
        )


def check_update(request: pb.UpdateTaskRequest) -> tuple[bool, bool]:
    """Whether labels and selection are to be changed. The task in the request may be partial."""
    paths = list(request.update_mask.paths)
    if not request.HasField("task") or not request.task.name:
        raise invalid((("task.name", "value is required"),))
    if not paths:
        raise invalid((("update_mask", "must name at least one field"),))
    fields = task_pb2.Task.DESCRIPTOR.fields_by_name
    for path in paths:
        if path in _UPDATABLE:
            continue
        head = path.partition(".")[0]
        if path == "*" or head not in fields:
            raise ApiError(
                "INVALID_ARGUMENT",
                "UNKNOWN_FIELD_PATH",
                f"{path!r} is no field of a task that can be updated; {_can()}.",
                field="update_mask",
            )
        if head in _OUTPUT_ONLY:
            raise ApiError(
                "INVALID_ARGUMENT",
                "FIELD_OUTPUT_ONLY",
                f"{path!r} is set by the server; {_can()}.",
                field="update_mask",
            )
        if head in _PARTS:
            raise ApiError(
                "INVALID_ARGUMENT",
                "UNKNOWN_FIELD_PATH",
                f"{path!r} cannot be updated alone; {_can()}.",
                field="update_mask",
            )
        raise ApiError(
            "INVALID_ARGUMENT",
            "FIELD_IMMUTABLE",
            f"{path!r} cannot be changed after creation; delete the task and create another. "
            f"{_can()[0].upper()}{_can()[1:]}.",
            field=f"task.{path}",
        )
    return "labels" in paths, any(path.startswith("selection") for path in paths)


def check_task_part(task: task_pb2.Task, part: str) -> None:
    """Raises ApiError INVALID_FIELD when the named field of a whole task breaks a rule."""
    violations = protovalidate.collect_violations(task)
    found = tuple(
        (f"task.{_path(v.proto.field)}", v.proto.message or v.proto.rule_id)
        for v in violations
        if _path(v.proto.field).startswith(part)
    )
    if found:
        raise invalid(found)


def invalid(violations: tuple[tuple[str, str], ...]) -> ApiError:
    field, text = violations[0]
    return ApiError(
        "INVALID_ARGUMENT", "INVALID_FIELD", f"{field}: {text}", field=field, violations=violations
    )


def _can() -> str:
    return (
        "only labels, selection, carry, drift, batching, limits, dead_letters, "
        "replicator_labels and split can be updated"
    )


def _path(path: object) -> str:
    """`source.etcd.endpoints[0]` from protovalidate's FieldPath."""
    out = ""
    for element in path.elements:  # type: ignore[attr-defined]
        out += ("." if out else "") + element.field_name
        match element.WhichOneof("subscript"):
            case "index":
                out += f"[{element.index}]"
            case "string_key":
                out += f"[{element.string_key!r}]"
            case "int_key" | "uint_key" | "bool_key" as kind:
                out += f"[{getattr(element, kind)}]"
            case _:
                pass
    return out
