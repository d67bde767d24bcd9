"""Reads one Pulsar topic of a source Milvus, in a thread of its own.

Laws: messages are compared by (ledger, entry, batch index); within a ledger each entry follows the
one before; a step into another ledger is proved before anything from there is handed out; the
client's own reconnecting is trusted with nothing but bringing messages.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import pulsar
import structlog

from milvus_cdc.errors import CdcError, RetryableError
from milvus_cdc.source import STREAMING_HEADER, TRACE_HEADER, LogEntry
from milvus_cdc.source.pulsar_client import HELD_MESSAGES
from milvus_cdc.source.pulsar_positions import Place, encode, gone
from milvus_cdc.source.read_ahead import ReadAhead

if TYPE_CHECKING:
    from milvus_cdc.source.pulsar import PulsarSource

log = structlog.get_logger()

POLL_MS = 500
BATCH_MESSAGES = 256
CHECK_SECONDS = 5.0
"""How often a reader asks whether the topic still is the same one and holds its place."""
ANCHOR_SECONDS = 15.0
"""How long the entry that a reader begins with may take to come."""
DOWN_SECONDS = 3.0
"""The client comes back by itself from what is shorter, as when a topic moves to another broker."""


class PulsarReader:
    """One reader of the client; after a RetryableError a new one begins where it stopped."""

    def __init__(
        self, source: PulsarSource, pchannel: str, start: Place, incarnation: bytes
    ) -> None:
        self._source = source
        self._pchannel = pchannel
        self.incarnation = incarnation
        self._start = start
        """What lies before it is not handed out."""
        self._last: Place | None = None
        """The newest message that came, in order."""
        self._ahead = ReadAhead(f"pulsar {pchannel}", self._fetch, self._drop)
        self._reader: pulsar.Reader | None = None
        self._anchor: Place | None = None
        """The place whose entry the client's reader must bring first."""
        self._since = self._check_at = 0.0
        self._down_since: float | None = None
        self._gap_after: Place | None = None
        """Behind it the client left something out once before."""
        self._late: CdcError | None = None

    async def read(self, max_bytes: int, wait_seconds: float) -> list[LogEntry]:
        return await self._ahead.read(max_bytes, wait_seconds)

    async def close(self) -> None:
        await self._ahead.close()

    # Everything below runs in the reader's thread.

    def _fetch(self) -> list[LogEntry]:
        try:
            return self._next_entries()
        except BaseException:
            self._drop()
            raise

    def _next_entries(self) -> list[LogEntry]:
        if self._late is not None:
            late, self._late = self._late, None
            raise late
        reader = self._reader or self._attach()
        if time.monotonic() >= self._check_at:
            self._source.check_topic(self._pchannel, self._last or self._start, self.incarnation)
            self._check_at = time.monotonic() + CHECK_SECONDS
        entries: list[LogEntry] = []
        size = 0
        wait_ms = POLL_MS
        while len(entries) < BATCH_MESSAGES and size <= self._ahead.batch_bytes:
            try:
                message = reader.read_next(wait_ms)
            except pulsar.Timeout:
                if wait_ms:
                    self._quiet(reader)
                break
            except pulsar.PulsarException as error:
                self._late = self._source.connection.trouble(error, self._pchannel)
                break
            wait_ms = 0
            try:
                if not self._follows(place_of(message.message_id())):
                    if self._reader is None:
                        break  # it begins again
                    continue
            except CdcError as error:
                # What came before it is whole and goes out first.
                self._late = error
                break
            entry = _entry(message)
            size += len(entry.payload)
            entries.append(entry)
        if self._late is not None and not entries:
            return self._next_entries()
        return entries

    def _attach(self) -> pulsar.Reader:
        """A reader that begins with the entry of the last message, or of the start."""
        place = self._last or self._start
        self.incarnation = self._source.check(self._pchannel, place, self.incarnation)
        reader = self._source.reader(self._pchannel, place, held=HELD_MESSAGES)
        self._reader, self._anchor = reader, place
        self._since = time.monotonic()
        self._check_at = self._since + CHECK_SECONDS
        self._down_since = None
        return reader

    def _quiet(self, reader: pulsar.Reader) -> None:
        """Nothing came: is that for want of messages, or of a connection?"""
        now = time.monotonic()
        if reader.is_connected():
            self._down_since = None
            # At the beginning of an empty ledger nothing has to be there.
            waits = self._anchor not in (None, Place(self._start.ledger, 0))
            if waits and now - self._since > ANCHOR_SECONDS:
                raise RetryableError(
                    "QUEUE_UNREACHABLE", f"topic {self._pchannel} does not bring {self._anchor}"
                )
        elif self._down_since is None:
            self._down_since = now
        elif now - self._down_since > DOWN_SECONDS:
            raise self._source.connection.trouble(None, self._pchannel)

    def _follows(self, found: Place) -> bool:
        """Whether the message is the next one to hand out. False: it was before, or the reader had
        to begin again. Raises LogTruncatedError for a hole.
        """
        anchor, last = self._anchor, self._last
        if anchor is not None:
            if found < (anchor.ledger, anchor.entry):
                return False
            if found[:2] != anchor[:2] and not self._from_empty_ledger(anchor, found):
                self._left_out(anchor, found)
                return False
            self._anchor = None
        if last is not None and found <= last:
            return False
        if last is not None and not self._is_next(last, found):
            self._left_out(last, found)
            return False
        self._gap_after = None
        if found < self._start:
            return False
        self._last = found
        return True

    def _is_next(self, last: Place, found: Place) -> bool:
        if found in (last.after, Place(last.ledger, last.entry + 1)):
            return True
        if found.ledger == last.ledger or found != Place(found.ledger, 0):
            return False
        return self._source.prove_step(self._pchannel, last, found, self.incarnation)

    def _from_empty_ledger(self, place: Place, found: Place) -> bool:
        """It stood at the beginning of a ledger that never got a message."""
        if (
            self._last is not None
            or place != Place(place.ledger, 0)
            or found != (found.ledger, 0, 0)
        ):
            return False
        nothing = Place(place.ledger, -1)
        return self._source.prove_step(self._pchannel, nothing, found, self.incarnation)

    def _left_out(self, last: Place, found: Place) -> None:
        """Begins again behind `last`, where the client jumped over something; that may be there
        all the same (as when a message's time to live ran out). The second time it is a hole.
        """
        if self._gap_after == last:
            raise gone(self._pchannel, last, found)
        log.warning("messages left out", topic=self._pchannel, after=str(last), found=str(found))
        self._gap_after = last
        self._drop()

    def _drop(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            with contextlib.suppress(pulsar.PulsarException):
                reader.close()


def place_of(found: pulsar.MessageId) -> Place:
    return Place(found.ledger_id(), found.entry_id(), max(found.batch_index(), 0))


def _entry(message: pulsar.Message) -> LogEntry:
    properties = message.properties()
    return LogEntry(
        encode(place_of(message.message_id())),
        message.data(),
        STREAMING_HEADER in properties,
        properties.get(TRACE_HEADER, ""),
    )
