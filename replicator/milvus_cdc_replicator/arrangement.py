"""How one collection's sink wants its requests, bounded by what the task says of them.

Law: neither `batching` nor `limits` of a task raises what the sink takes at once.
"""

from __future__ import annotations

from collections.abc import Iterable

from milvus_cdc.errors import UserError
from milvus_cdc.model import Batching, tso_to_text
from milvus_cdc.sink.writer import Capabilities, Checkpoint

from milvus_cdc_replicator.core.assignment import AssignmentCore
from milvus_cdc_replicator.core.batching import bounded
from milvus_cdc_replicator.core.sequencer import WriteLimits
from milvus_cdc_replicator.pacing import Pacer


class Arrangement:
    """Tells the core's sequencer, whenever one of the two has changed."""

    def __init__(self, core: AssignmentCore, pacer: Pacer, batching: Batching) -> None:
        self._core = core
        self._pacer = pacer
        self._batching = batching
        self._own: tuple[WriteLimits, float] | None = None
        """Of the sink: bounds of a request, and how long an unfinished one waits."""
        self._paced = pacer.limits
        """Those that the bounds of a request speak of."""
        self.linger_seconds = 0.0
        """How long an unfinished request waits for more."""
        self.divisible = True
        """A part of a write may be written alone."""
        self.heartbeats = False
        """The sink wants to hear that source time goes on."""

    def begin(
        self, in_flight: int, writer: Capabilities | None, checkpoints: Iterable[Checkpoint]
    ) -> None:
        """As the sink that was opened says; `in_flight` 0: as many as ours. Raises UserError
        SINK_PUT_BACK.
        """
        if in_flight:
            self._core.sequencer.limit_in_flight(in_flight)
        self._own = self._core.sequencer.limits, 0.0
        if writer is not None:
            self._arrange(writer)
        for known in checkpoints:
            if (lane := self._core.lanes.get(known.vchannel)) is None:
                continue
            if known.resolved_ts < lane.stored_ts:
                raise UserError(
                    "SINK_PUT_BACK",
                    f"the sink has {known.vchannel} up to {tso_to_text(known.resolved_ts)} and "
                    f"once had it up to {tso_to_text(lane.stored_ts)}: it was put back to an "
                    "older state, and rows in between are missing there; `milvus-cdc task resync` "
                    "brings the collection anew",
                    field="sink",
                )
            lane.stored_ts = known.resolved_ts
            lane.resume(known.read_from, known.resolved_ts)
        self._bound()

    def update(self, batching: Batching) -> None:
        """What the task says now."""
        if batching != self._batching:
            self._batching = batching
            self._bound()

    def keep_up(self) -> None:
        """The task's limits may have changed."""
        if self._pacer.limits != self._paced:
            self._bound()

    @property
    def limits_text(self) -> str:
        """The task's limits on this replicator, for people; empty when there are none."""
        limits = self._pacer.limits
        return " and ".join(
            f"{number:,} {what}"
            for number, what in (
                (limits.rows_per_second, "rows/s"),
                (limits.bytes_per_second, "bytes/s"),
                (limits.requests_in_flight, "requests at once"),
            )
            if number
        )

    def _arrange(self, writer: Capabilities) -> None:
        self.heartbeats = writer.heartbeats
        self.divisible = writer.divisible or not writer.own_checkpoint
        limits = WriteLimits(
            writer.rows_per_batch,
            writer.bytes_per_batch,
            1 if writer.own_checkpoint else writer.in_flight,
            ordered=True,
            atomic=writer.own_checkpoint,
        )
        self._own = limits, writer.linger_seconds
        self._core.sequencer.arrange(limits)

    def _bound(self) -> None:
        if self._own is None:
            return  # it is taken up when the sink is open
        self._paced = self._pacer.limits
        limits, self.linger_seconds = bounded(*self._own, self._batching, self._paced)
        self._core.sequencer.bound(
            limits.rows_per_request, limits.bytes_per_request, lingers=limits.lingers
        )
