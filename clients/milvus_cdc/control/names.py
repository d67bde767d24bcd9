"""Resource names, from what people type."""

from __future__ import annotations


def replicator_name(name: str) -> str:
    """The resource name of a replicator given by it or by its last part."""
    return name if name.startswith("replicators/") else f"replicators/{name}"


def assignment_name(name: str) -> str:
    """The same of an assignment."""
    return name if name.startswith("assignments/") else f"assignments/{name}"


def task_name(name: str) -> str:
    """The resource name of a task given by it or by its last part."""
    return name if name.startswith("tasks/") else f"tasks/{name}"
