"""The reading side of one collection assignment: subscriptions, room, and the memory it accounts
for.

Laws: what was read counts against the budget from the moment it is delivered until it is durable.
Who holds nothing may always take one helping, so nobody starves behind a stuck neighbour. Rows that
wait for their tick do not stop the reading that brings it; at the hard limit they are forgotten,
and read again in portions when the tick is known.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Protocol

import structlog
from milvus_cdc.codec.messages import Delete, Message, Tick
from milvus_cdc.errors import CdcError, RetryableError, UserError
from milvus_cdc.order.lane import Lane

from milvus_cdc_replicator.connections import Connections
from milvus_cdc_replicator.convert import Converter
from milvus_cdc_replicator.core.budget import Budget, Share
from milvus_cdc_replicator.reader import Item, PchannelHub, Subscription
from milvus_cdc_replicator.sink_work import Troubles
from milvus_cdc_replicator.spec import CollectionAssignment

log = structlog.get_logger()

LOG_END_QUIET_SECONDS = 2.0
PORTIONS = 2
"""What is read again comes in portions of this part of an assignment's limit."""
CROWDED_SHARE = 16
"""Where many together fill the memory, who holds less than this part of it keeps it."""


class Reading(Protocol):
    """What is fed: the core of an assignment, or what is read beside it."""

    lanes: dict[str, Lane]

    @property
    def resting(self) -> bool:
        """Source time alone goes on, and may be told later."""

    @property
    def buffered_bytes(self) -> int:
        """Of rows that wait for their tick."""

    @property
    def writable_bytes(self) -> int:
        """Of rows whose tick has come."""


class Intake:
    """`post` hands an event to the owner of the core, `tick_waits` says that one may call
    `take_ticks`; everything else runs where it is called.
    """

    def __init__(
        self,
        assignment: CollectionAssignment,
        core: Reading,
        *,
        purpose: str = "read",
        connections: Connections,
        converter: Converter,
        budget: Budget,
        limit_bytes: int,
        troubles: Troubles,
        post: Callable[[Callable[[], None]], None],
        tick_waits: Callable[[], None],
        fail: Callable[[CdcError], None],
        on_room: Callable[[], None],
    ) -> None:
        """`purpose`: what is being tried where it does not succeed."""
        self._purpose = purpose
        self._assignment = assignment
        self._core = core
        self._connections = connections
        self._converter = converter
        self._budget = budget
        self._share: Share | None = budget.share(
            assignment.sink.SerializeToString(deterministic=True)
        )
        self._limit_bytes = limit_bytes
        self._troubles = troubles
        self._post = post
        self._tick_waits = tick_waits
        self._fail = fail
        self._on_room = on_room
        self._subscriptions: list[tuple[PchannelHub, Subscription]] = []
        self._incarnations = {lane.vchannel: lane.incarnation for lane in assignment.lanes}
        self._delivered_bytes = 0
        self._deliveries = 0
        """Handed to the owner and not yet taken."""
        self._ticks: dict[Subscription, Item] = {}
        """The newest of each, where no row waits for it: older than whatever is handed over."""
        self._accounted = (0, 0)

    async def open(self) -> None:
        """Subscribes every lane whose log has not ended."""
        for lane in self._core.lanes.values():
            if not lane.ended:
                hub = await self._connections.hub(self._assignment.source, lane.pchannel)
                self._subscribe(hub, lane, lane.read_from)

    def _subscribe(self, hub: PchannelHub, lane: Lane, position: bytes) -> None:
        subscription = Subscription(
            pchannel=lane.pchannel,
            vchannel=lane.vchannel,
            collection_id=self._assignment.want.collection_id,
            position=position,
            last_order=hub.order(position) - 1,
            deliver=lambda _, items: self._deliver(subscription, items),
            has_room=partial(self._has_room, lane),
            on_error=partial(self._on_error, lane.vchannel),
            incarnation=self._incarnations[lane.vchannel],
        )
        self._subscriptions.append((hub, subscription))
        hub.subscribe(subscription)

    async def check(self) -> None:
        """Raises what stands in the way of reading from the start, before anything is given up
        for it.
        """
        for lane in self._assignment.lanes:
            await self._connections.check_log(
                self._assignment.source, lane.pchannel, lane.read_from, lane.incarnation
            )

    def incarnation(self, vchannel: str) -> bytes:
        """Of the topic it is read from; empty before the first reading."""
        for _, subscription in self._subscriptions:
            if subscription.vchannel == vchannel:
                return subscription.incarnation
        return self._incarnations[vchannel]

    def close(self) -> None:
        self.take_ticks()
        for hub, subscription in list(self._subscriptions):
            self._unsubscribe(hub, subscription)

    def leave(self) -> None:
        """It is not wanted any more, while the rest of the assignment goes on."""
        for _, subscription in self._subscriptions:
            self._troubles.clear(f"{self._purpose} {subscription.vchannel}")
        self.close()
        self.account(final=True)

    def _unsubscribe(self, hub: PchannelHub, subscription: Subscription) -> None:
        hub.unsubscribe(subscription)
        self._incarnations[subscription.vchannel] = subscription.incarnation
        self._subscriptions.remove((hub, subscription))
        self._ticks.pop(subscription, None)

    def relieve(self) -> None:
        """At the hard limit, with nothing that writing alone would make room for: the largest
        part of what waits for a tick is forgotten.
        """
        held, writable = self._held()
        if writable or not self._core.buffered_bytes:
            return
        hard = self._budget.hard_limit_bytes
        crowded = self._budget.writable == 0 and self._budget.held >= hard
        least = 0 if held >= hard else hard // CROWDED_SHARE if crowded else held + 1
        lanes = self._core.lanes.values()
        lane = max((x for x in lanes if x.may_forget), key=lambda x: x.buffered_bytes, default=None)
        if lane is not None and lane.buffered_bytes >= least:
            log.info(
                "forgotten until its tick is known",
                vchannel=lane.vchannel,
                bytes=lane.buffered_bytes,
            )
            lane.forget(self._limit_bytes // PORTIONS)
        elif held >= hard and all(x.forgetful or not x.buffered_bytes for x in lanes):
            raise UserError(
                "TICK_INTERVAL_TOO_LARGE",
                "the source sends so many messages between two time ticks that not even their "
                f"places fit in twice memoryMiB ({self._budget.limit_bytes >> 20}): give the "
                "replicator more memoryMiB",
            )

    def account(self, *, final: bool = False) -> None:
        """Keeps the process' memory budget true; `final` gives everything back."""
        if self._share is None:
            return  # nothing is read any more
        held, writable = (0, 0) if final else self._held()
        if (held, writable) != self._accounted:
            before_held, before_writable = self._accounted
            self._share.update(held - before_held, writable - before_writable)
            self._accounted = (held, writable)
            if held < before_held:
                self._on_room()
        if final:
            self._share.leave()
            self._share = None

    @property
    def has_memory(self) -> bool:
        """Reading need not wait for what is unfinished."""
        return self._may_read and self._held()[0] < self._limit_bytes

    @property
    def _may_read(self) -> bool:
        return self._share is not None and self._share.may_read

    def _held(self) -> tuple[int, int]:
        """Bytes of everything not durable, and of the part that writing makes room for."""
        writable = self._core.writable_bytes
        return writable + self._core.buffered_bytes + self._delivered_bytes, writable

    async def look_for_log_ends(self) -> None:
        """Of a dropped collection: ticks may stop with the last collection of a pchannel, then the
        log's end closes the lane.
        """
        for _, subscription in list(self._subscriptions):
            lane = self._core.lanes[subscription.vchannel]
            if not lane.ended:
                await self._look_for_log_end(lane, subscription)

    async def _look_for_log_end(self, lane: Lane, subscription: Subscription) -> None:
        try:
            end = await self._connections.log_end(self._assignment.source, subscription.pchannel)
        except CdcError:
            return  # the reader meets the same trouble and reports it
        read = subscription.last_order
        if read + 1 < end:
            return
        await asyncio.sleep(LOG_END_QUIET_SECONDS)
        current = any(subscription is other for _, other in self._subscriptions)
        if current and subscription.last_order == read:
            # Behind everything delivered so far: the inbox keeps the order.
            self._post(lane.end_of_log)

    def _deliver(self, subscription: Subscription, items: list[Item]) -> None:
        if not self._deliveries and self._core.resting and _only_ticks(items):
            if not self._core.lanes[subscription.vchannel].rereading:
                self._ticks[subscription] = items[-1]
                self._tick_waits()
                return
        size = sum([getattr(item.message, "size", 0) for item in items])
        self._deliveries += 1
        if size:
            self._delivered_bytes += size
            self.account()
        self._post(partial(self._feed, subscription, items, size))

    def take_ticks(self) -> None:
        """What has come while nothing waited for it. Law: before anything handed over since."""
        if self._ticks:
            for subscription, item in self._ticks.items():
                assert isinstance(item.message, Tick)
                self._core.lanes[subscription.vchannel].tick(item.message.ts, item.position)
            self._ticks.clear()

    def _feed(self, subscription: Subscription, items: list[Item], size: int) -> None:
        self._deliveries -= 1
        self._delivered_bytes -= size
        hub = next((h for h, current in self._subscriptions if current is subscription), None)
        if hub is None:
            return  # reading has begun anew elsewhere, or has ended
        lane = self._core.lanes[subscription.vchannel]
        late = lane.late
        for item in items:
            message = item.message
            if isinstance(message, Tick):
                lane.tick(message.ts, item.position)
            elif self._shard_unknown(lane, message):
                break
            else:
                op = self._converter.op(message, item.position, item.order, lane.vchannel)
                if op is not None:
                    lane.add(op)
            if lane.wants_reread:
                break
        if lane.late > late:
            log.info(
                "messages behind a tick that covers them",
                vchannel=lane.vchannel,
                messages=lane.late - late,
                tick=lane.released_ts,
            )
        if (position := lane.take_reread()) is not None:
            self._unsubscribe(hub, subscription)
            self._subscribe(hub, lane, position)

    def _shard_unknown(self, lane: Lane, message: Message) -> bool:
        """A delete that names no shard is that of the collection's only one on its topic. With two
        of them nobody can say whose: a guess could remove a newer row.
        """
        if not isinstance(message, Delete) or message.vchannel:
            return False
        if sum(each.pchannel == lane.pchannel for each in self._core.lanes.values()) == 1:
            return False
        self._fail(
            UserError(
                "DELETE_WITHOUT_SHARD",
                f"topic {lane.pchannel} holds several shards of this collection, and a delete of "
                "its source (Milvus 2.2) does not say of which; upgrade the source, or make the "
                "collection with no more shards than rootCoord.dmlChannelNum there",
            )
        )
        return True

    def _has_room(self, lane: Lane) -> bool:
        mine, writable = self._accounted
        if mine == 0:
            return True
        if mine < self._limit_bytes:
            return self._may_read
        # A portion comes whole, and a single request of the source is never divided.
        return writable == 0 and (mine < self._budget.hard_limit_bytes or lane.rereading)

    def _on_error(self, vchannel: str, error: CdcError | None) -> None:
        if error is None:
            self._troubles.clear(f"{self._purpose} {vchannel}")
        elif isinstance(error, RetryableError):
            self._troubles.add(f"{self._purpose} {vchannel}", error)
        else:
            self._fail(error)


def _only_ticks(items: list[Item]) -> bool:
    return all([isinstance(item.message, Tick) for item in items])
