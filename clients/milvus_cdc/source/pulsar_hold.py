"""Holds on Pulsar: a durable subscription keeps every entry that it has not acknowledged.

Laws: it is moved by `seek`, which leaves the entry at its place unacknowledged; a consumer is
connected for a moment only, of a type that suffers another one beside it, so that a forgotten
connection keeps nobody from moving or reading.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pulsar
import structlog

from milvus_cdc.errors import CdcError, LogResetError, RetryableError, UserError
from milvus_cdc.source import PulsarConfig
from milvus_cdc.source.holds import HOLD_PREFIX, HeldLog
from milvus_cdc.source.pulsar_admin import PulsarAdmin
from milvus_cdc.source.pulsar_client import PulsarConnection
from milvus_cdc.source.pulsar_positions import Place, decode

log = structlog.get_logger()

_STOPS_WRITERS = frozenset({"producer_request_hold", "producer_exception"})


class PulsarHolds:
    """Of one source's namespace. What the REST API alone tells is left out without one."""

    def __init__(
        self, config: PulsarConfig, connection: PulsarConnection, admin: PulsarAdmin | None
    ) -> None:
        self.config = config
        self.connection = connection
        self.admin = admin

    def hold(self, pchannel: str, name: str) -> PulsarHold:
        return PulsarHold(self, pchannel, name)

    async def find(self) -> list[HeldLog]:
        return await asyncio.to_thread(self._find)

    async def warnings(self, pchannel: str) -> list[tuple[str, str]]:
        return await asyncio.to_thread(self._warnings, pchannel)

    def _find(self) -> list[HeldLog]:
        if self.admin is None:
            raise UserError(
                "HOLDS_NOT_LISTED",
                "Only Pulsar's REST API lists subscriptions; give source.pulsar.adminUrl",
                field="source.pulsar.admin_url",
            )
        found: list[HeldLog] = []
        for pchannel in self.admin.topics():
            with contextlib.suppress(LogResetError):  # deleted meanwhile
                if any(name.startswith(HOLD_PREFIX) for name in self.admin.subscriptions(pchannel)):
                    found += self.held(pchannel).values()
        return found

    def held(self, pchannel: str) -> dict[str, HeldLog]:
        """By name. With the REST API alone."""
        assert self.admin is not None
        return {
            name: HeldLog(pchannel, name, told.get("msgBacklog", -1), told.get("backlogSize", -1))
            for name, told in self.admin.backlogs(pchannel).items()
            if name.startswith(HOLD_PREFIX)
        }

    def _warnings(self, pchannel: str) -> list[tuple[str, str]]:
        if self.admin is None:
            return []
        try:
            return [
                *map(_quota_warning, _limited(self.admin.policy("backlogQuotaMap", pchannel))),
                *_time_warnings(
                    self.admin.policy("messageTTL", pchannel),
                    self.admin.policy("subscriptionExpirationTime"),
                ),
            ]
        except CdcError as error:
            # A role that may consume need not be allowed to look at policies.
            log.debug("policies are not known", error=str(error))
            return []


class PulsarHold:
    def __init__(self, holds: PulsarHolds, pchannel: str, name: str) -> None:
        self._holds = holds
        self._pchannel = pchannel
        self._name = name

    async def advance(self, position: bytes | None) -> None:
        """As `Hold.advance`. UserError HOLD_REFUSED when the broker makes no subscription."""
        place = None if position is None else decode(position)
        await asyncio.to_thread(self._advance, place)

    async def release(self) -> None:
        with contextlib.suppress(LogResetError):
            await asyncio.to_thread(self._release)

    async def look(self) -> HeldLog:
        if self._holds.admin is None:
            return HeldLog(self._pchannel, self._name)
        found = await asyncio.to_thread(self._holds.held, self._pchannel)
        return found.get(self._name, HeldLog(self._pchannel, self._name))

    def _advance(self, place: Place | None) -> None:
        consumer = self._subscribe()
        try:
            if place is not None:
                # The whole entry stays, whichever message of its batch is meant.
                consumer.seek(pulsar.MessageId(-1, place.ledger, place.entry, -1))
        except pulsar.PulsarException as error:
            raise self._trouble(error) from error
        finally:
            _close(consumer)

    def _release(self) -> None:
        admin = self._holds.admin
        if admin is not None and self._name not in admin.subscriptions(self._pchannel):
            return
        consumer = self._subscribe()
        try:
            consumer.unsubscribe()
        except pulsar.PulsarException as error:
            # Refused while somebody else is connected to it, for a moment or until he is missed.
            if admin is None or self._name in admin.subscriptions(self._pchannel):
                raise self._trouble(error) from error
        finally:
            _close(consumer)

    def _subscribe(self) -> pulsar.Consumer:
        if self._holds.admin is not None:
            # A subscription would make the topic.
            self._holds.admin.subscriptions(self._pchannel)
        try:
            return self._holds.connection.consumer(self._pchannel, self._name)
        except CdcError:
            raise
        except pulsar.PulsarException as error:
            raise self._trouble(error) from error

    def _trouble(self, error: pulsar.PulsarException) -> CdcError:
        text = f"the hold {self._name} on {self._pchannel}: {error}"
        if isinstance(error, pulsar.SubscriptionNotFound):
            return UserError(
                "HOLD_REFUSED",
                f"{text}. The broker lets no consumer make a subscription "
                "(allowAutoSubscriptionCreation); allow it, or have the namespace retain the log "
                "and set source.pulsar.hold to PULSAR_HOLD_NONE",
                field="source.pulsar.hold",
            )
        found = self._holds.connection.trouble(error, self._pchannel)
        if isinstance(found, RetryableError):
            return RetryableError(found.reason, text)
        return found


def _close(consumer: pulsar.Consumer) -> None:
    with contextlib.suppress(pulsar.PulsarException):
        consumer.close()


def _limited(quotas: Any) -> list[tuple[str, int, str]]:
    """(what is limited, the limit, what happens there)."""
    found = []
    for kind, quota in sorted((quotas or {}).items()):
        key = "limitTime" if kind == "message_age" else "limitSize"
        limit = quota.get(key, -1)
        if limit is not None and limit > 0:
            found.append((kind, int(limit), str(quota.get("policy"))))
    return found


def _quota_warning(quota: tuple[str, int, str]) -> tuple[str, str]:
    kind, limit, policy = quota
    what = f"{limit} seconds" if kind == "message_age" else f"{limit} bytes"
    if policy in _STOPS_WRITERS:
        return (
            "HOLD_STOPS_WRITERS",
            f"The source's namespace has a backlog quota of {what} with the policy {policy}: when "
            "a task stands still for so long that its hold reaches it, Pulsar stops the source's "
            "own writers. Raise the quota, or have the namespace retain the log and set "
            "source.pulsar.hold to PULSAR_HOLD_NONE in a new task.",
        )
    return (
        "HOLD_EVICTED",
        f"The source's namespace has a backlog quota of {what} with the policy {policy}: what is "
        "beyond it is deleted though a task still needs it, which fails then (LOG_TRUNCATED). "
        "Raise the quota.",
    )


def _time_warnings(ttl: Any, expiration: Any) -> list[tuple[str, str]]:
    found = []
    if ttl:
        found.append(
            (
                "HOLD_EXPIRES",
                f"The source's namespace counts messages as acknowledged after {ttl} seconds "
                "(messageTTL): no hold keeps them longer. Remove it, or retain them longer than "
                "any pause.",
            )
        )
    if expiration:
        found.append(
            (
                "HOLD_EXPIRES",
                f"The source's namespace removes a subscription {expiration} minutes after its "
                "last use (subscriptionExpirationTime): so long may no replicator be away. "
                "Set it to 0.",
            )
        )
    return found
