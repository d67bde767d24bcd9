"""Which role may call which of our methods, and on whose behalf a controller calls.

Law: who is not in the table may not; only a controller, by a credential of its own, may say who
asked it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc
from milvus_cdc.trust.authentication import Authenticator, Metadata
from milvus_cdc.trust.caller import Caller, Role, heard
from milvus_cdc.trust.guard import ADMINS, EVERYWHERE, OPERATORS, VIEWERS, Guard, Rule
from milvus_cdc.trust.quotas import Quotas
from milvus_cdc.trust.refusal import Refusal

from milvus_cdc_controller.config import Config
from milvus_cdc_controller.forwarding import CALLER, HOP, PEER

_READS = Rule(VIEWERS)
_WATCHES = Rule(VIEWERS, streams=True)
_WORKS = Rule(OPERATORS, streams=True)
"""Costs the servers much, or shows keys of rows; changes nothing."""
_RUNS = Rule(OPERATORS, changes=True)
_RULES = Rule(ADMINS, changes=True)
"""Says where rows go, or what is to become of what is there."""

_TASKS = {
    "GetTask": _READS,
    "ListTasks": _READS,
    "WatchTasks": _WATCHES,
    "ListTaskCollections": _READS,
    "VerifyTask": _WORKS,
    "DiffTask": _WORKS,
    "PauseTask": _RUNS,
    "ResumeTask": _RUNS,
    "RetryTask": _RUNS,
    "CreateTask": _RULES,
    "UpdateTask": _RULES,
    "DeleteTask": _RULES,
    "ResyncCollection": _RULES,
    "SetTaskPositions": _RULES,
}
_FLEET = {
    "ListControllers": _READS,
    "ListReplicators": _READS,
    "GetReplicator": _READS,
    "WatchReplicators": _WATCHES,
    "ListAssignments": _READS,
    "ListHolds": _READS,
    "CordonReplicator": _RUNS,
    "UncordonReplicator": _RUNS,
    "DrainReplicator": _RUNS,
    "CancelDrain": _RUNS,
    "MoveAssignment": _RUNS,
    "RebalanceAssignments": _RUNS,
    "DeleteHold": _RULES,
}
METHODS: Mapping[str, Rule] = {
    **EVERYWHERE,
    **{f"/milvuscdc.v1.TaskService/{name}": rule for name, rule in _TASKS.items()},
    **{f"/milvuscdc.v1.FleetService/{name}": rule for name, rule in _FLEET.items()},
    "/milvuscdc.v1.ReplicationService/Connect": Rule(frozenset((Role.REPLICATOR,)), streams=True),
}
"""Every method that a controller serves."""


def authenticator(config: Config) -> Authenticator | None:
    """None where nobody is asked. Raises UserError for files that cannot be used."""
    return Authenticator(config.auth) if config.auth is not None else None


class ControllerGuard(Guard):
    """Knows calls that another controller passes on."""

    def __init__(self, who: Authenticator | None, quotas: Quotas | None = None) -> None:
        super().__init__(METHODS, who, quotas)
        self._asks = who is not None

    def origin(self, metadata: Metadata, context: grpc.aio.ServicerContext[Any, Any]) -> str:
        """Of the first caller."""
        return next((str(value) for key, value in metadata if key == PEER), context.peer())

    async def caller(
        self, metadata: Metadata, context: grpc.aio.ServicerContext[Any, Any]
    ) -> Caller:
        """The first one."""
        told = [value for key, value in metadata if key == CALLER]
        if not any(key in (HOP, PEER, CALLER) for key, _ in metadata):
            return await super().caller(metadata, context)
        if self._asks:
            await self._check_controller(metadata, context)
        elif not told:
            return await super().caller(metadata, context)
        try:
            [word] = told
            return heard(word if isinstance(word, bytes) else word.encode())
        except ValueError:
            raise _hop_refused("it does not say who asked it") from None

    async def _check_controller(
        self, metadata: Metadata, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        try:
            between = await super().caller(metadata, context)
        except Refusal as refusal:
            raise _hop_refused(f"{refusal.reason}: {refusal.message}") from refusal
        if Role.CONTROLLER not in between.roles:
            raise Refusal(
                "PERMISSION_DENIED",
                "NOT_A_CONTROLLER",
                f"Only a controller may pass calls on; {between.name} has not the role "
                f"{Role.CONTROLLER}.",
                roles=Role.CONTROLLER,
            )


def _hop_refused(why: str) -> Refusal:
    return Refusal(
        "UNAVAILABLE",
        "HOP_REFUSED",
        "The controller that leads does not accept the credential of the one that was asked: "
        f"{why} Check the controllerTls and controllerToken of that one.",
    )
