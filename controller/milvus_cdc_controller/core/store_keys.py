"""Under which key a record of the core is stored."""

from __future__ import annotations

from milvus_cdc_controller.core.hold import HoldRecord


def task_key(uid: str) -> str:
    return f"tasks/{uid}"


def collection_key(uid: str, collection_id: int) -> str:
    return f"collections/{uid}/{collection_id}"


def progress_key(uid: str, collection_id: int) -> str:
    return f"checkpoints/{uid}/{collection_id}"


def metadata_key(uid: str) -> str:
    return f"metadata/{uid}"


def grant_key(assignment_id: str) -> str:
    return f"assignments/{assignment_id}"


def source_key(source_id: str) -> str:
    return f"sources/{source_id}"


def replicator_key(name: str) -> str:
    return f"replicators/{name}"


def hold_key(hold: HoldRecord) -> str:
    return f"holds/{hold.key}"
