"""Reads the Pulsar topics of a source Milvus (`mq.type: pulsar`).

Pulsar deletes whole ledgers, the oldest first, as soon as everyone subscribed has acknowledged them
and the namespace retains them no longer; its readers then go on behind the hole without a word.
Laws: a reader begins with an entry that must be there (the one it stopped at); every step into
another ledger is proved: the ledgers between hold nothing, and the entry before the step is still
there after it was made, so that nothing behind it was deleted before it was read.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pulsar
import structlog

from milvus_cdc.errors import (
    LogResetError,
    RetryableError,
    UserError,
)
from milvus_cdc.secrets import NO_SECRETS, SecretResolver
from milvus_cdc.source import LogLimits, LogRange, PulsarConfig, check_incarnation
from milvus_cdc.source.pulsar_admin import PulsarAdmin, Topic
from milvus_cdc.source.pulsar_client import MESSAGE_MS, PulsarConnection
from milvus_cdc.source.pulsar_hold import PulsarHolds
from milvus_cdc.source.pulsar_oauth import OauthTokens
from milvus_cdc.source.pulsar_positions import (
    BEGINNING,
    Place,
    decode,
    encode,
    gone,
    order,
    text,
)
from milvus_cdc.source.pulsar_reader import PulsarReader, place_of

log = structlog.get_logger()

SEEK_MESSAGES = 10_000
"""Publication times are the writers' own: so many may be out of order where a seek lands."""


class PulsarSource:
    """The queue of one source; readers share its client."""

    def __init__(self, config: PulsarConfig, secrets: SecretResolver | None = None) -> None:
        """`secrets` says which ones `config.oauth` may refer to: none when it is left out."""
        if config.oauth is not None:
            config = replace(config, token=OauthTokens(config.oauth, secrets or NO_SECRETS))
        self._config = config
        self.connection = PulsarConnection(config)
        self._admin = PulsarAdmin(config) if config.admin_url else None
        self.holds = PulsarHolds(config, self.connection, self._admin)
        self._known: dict[int, Topic] = {}
        """What was last heard of the topic that a ledger belongs to; ids are a cluster's own."""
        self._retention_denied = False

    async def open(self, pchannel: str, position: bytes, incarnation: bytes = b"") -> PulsarReader:
        start = decode(position)
        found = await asyncio.to_thread(self.check, pchannel, start, incarnation)
        return PulsarReader(self, pchannel, start, found)

    async def log_range(self, pchannel: str) -> LogRange:
        return await asyncio.to_thread(self._range, pchannel)

    async def limits(self, pchannel: str) -> LogLimits:
        """With a hold there is no limit: what was not read is kept. Whether anything is gone
        already, Pulsar does not tell.
        """
        return await asyncio.to_thread(self._limits, pchannel)

    async def seek(self, pchannel: str, unix_ms: int) -> bytes:
        """By the time at which it was published, by the publisher's clock."""
        return await asyncio.to_thread(self._seek, pchannel, unix_ms)

    def order(self, position: bytes) -> int:
        return order(decode(position))

    def back(self, position: bytes, entries: int) -> bytes:
        place = decode(position)
        entry = place.entry + (1 if place.batch else 0) - entries
        if entry >= 0:
            return encode(Place(place.ledger, entry))
        topic = self._known.get(place.ledger)
        for ledger in reversed(topic.ledgers if topic else ()):
            if ledger.ledger_id < place.ledger:
                entry += ledger.entries
                if entry >= 0:
                    return encode(Place(ledger.ledger_id, entry))
        return encode(BEGINNING)

    def behind(self, earlier: bytes, later: bytes) -> int:
        first, last = decode(earlier), decode(later)
        topic = self._known.get(last.ledger)
        end = last.entry + (1 if last.batch else 0)
        if first.ledger == last.ledger or topic is None:
            return max(end - first.entry, 0) if first.ledger == last.ledger else 0
        own = topic.find(first.ledger)
        rest = max(own.entries - first.entry, 0) if own else 0
        return rest + topic.between(first.ledger, last.ledger) + end

    def text(self, position: bytes) -> str:
        return text(position)

    async def probe(self) -> None:
        def ask() -> None:
            self.connection.probe()
            if self._admin is not None:
                self._admin.probe()

        await asyncio.to_thread(ask)

    async def close(self) -> None:
        await asyncio.to_thread(self.connection.close)
        if self._admin is not None:
            self._admin.close()

    # What follows blocks, and is called by readers too.

    def reader(self, pchannel: str, place: Place, held: int) -> pulsar.Reader:
        """One that begins with the entry at `place`."""
        return self.connection.reader(pchannel, message_id(place), held=held)

    def check(self, pchannel: str, wanted: Place, incarnation: bytes) -> bytes:
        """Whether the topic is the incarnation that is meant and holds `wanted` (or ends there);
        which one it is.
        """
        if self._admin is None:
            self._check_by_reading(pchannel, wanted)
            return b""
        topic = self.ask(pchannel)
        check_incarnation(pchannel, incarnation, topic.incarnation)
        ledger = topic.find(wanted.ledger)
        if ledger is None and wanted.ledger < topic.ledgers[-1].ledger_id:
            raise gone(pchannel, wanted, topic.first)
        # An empty ledger has a place only at its beginning, where nothing is yet.
        if ledger is None or wanted.entry >= max(ledger.entries, 1):
            raise _beyond(pchannel, wanted)
        return topic.incarnation

    def ask(self, pchannel: str) -> Topic:
        """With the admin API alone."""
        assert self._admin is not None
        topic = self._admin.topic(pchannel)
        for ledger in topic.ledgers:
            self._known[ledger.ledger_id] = topic
        return topic

    def check_topic(self, pchannel: str, place: Place, incarnation: bytes) -> None:
        """Now and then: the topic is the same and still holds `place`, where that can be asked
        cheaply. A REST API that does not answer does not keep anyone from reading.
        """
        if self._admin is not None:
            with contextlib.suppress(RetryableError):
                self.check(pchannel, place, incarnation)

    def prove_step(self, pchannel: str, last: Place, found: Place, incarnation: bytes) -> bool:
        """Whether nothing can have lain between the message at `last` and the one at `found` in a
        later ledger, the first message of which it is. False: the client left something out that
        is there. Raises LogTruncatedError when it is gone, or that cannot be told.
        """
        if self._admin is not None:
            with contextlib.suppress(RetryableError):
                topic = self.ask(pchannel)
                check_incarnation(pchannel, incarnation, topic.incarnation)
                ledger = topic.find(last.ledger)
                if ledger is None:
                    raise gone(pchannel, last, found)
                # An empty ledger may have been followed by another one before anything came.
                left = ledger.entries - (last.entry + 1)
                return left <= 0 and topic.between(last.ledger, found.ledger) == 0
        if last.entry < 0:
            raise gone(pchannel, last, found)
        with self._reading(pchannel, last) as reader:
            again = self._next(reader, pchannel)
            if again is None or again[:2] != last[:2]:
                raise gone(pchannel, last, found)
            while again is not None and again <= last:
                again = self._next(reader, pchannel)
            return again is not None and again == found

    def _check_by_reading(self, pchannel: str, wanted: Place) -> None:
        with self._reading(pchannel, wanted) as reader:
            found = self._next(reader, pchannel)
        if found is None:
            end = self._last(pchannel)
            raise gone(pchannel, wanted, None) if end is None else _beyond(pchannel, wanted)
        if found[:2] != wanted[:2]:
            raise gone(pchannel, wanted, found)

    def _range(self, pchannel: str) -> LogRange:
        if self._admin is None:
            last = self._last(pchannel)
            with self._reading(pchannel, None) as reader:
                first = self._next(reader, pchannel)
            if first is None or last is None:
                raise UserError(
                    "QUEUE_EMPTY",
                    f"topic {pchannel} at Pulsar {self._config.service_url} is empty or missing, "
                    "which only its REST API tells apart; give source.pulsar.adminUrl",
                    field="source.pulsar.admin_url",
                )
            return LogRange(encode(first), encode(last.after))
        topic = self.ask(pchannel)
        last = self._admin.last(pchannel)
        if last is None or topic.find(last.ledger) is None:
            # Rolled between the two questions, or nothing is there.
            topic = self.ask(pchannel)
        end = topic.first if last is None or last < topic.first else last.after
        return LogRange(encode(topic.first), encode(end), topic.incarnation)

    def _limits(self, pchannel: str) -> LogLimits:
        found = self._range(pchannel)
        topic = self._known.get(decode(found.first).ledger)
        if topic is None:
            return LogLimits(found, whole=False)
        entries = sum(ledger.entries for ledger in topic.ledgers)
        size = sum(ledger.size for ledger in topic.ledgers)
        max_age_ms = max_bytes = 0
        if not self._config.held and (kept := self.retention(pchannel)) is not None:
            # Where nothing is retained, what Milvus has read goes with the next ledger.
            minutes, megabytes = kept
            max_age_ms = 0 if minutes < 0 else max(minutes * 60_000, 1)
            max_bytes = 0 if megabytes < 0 else max(megabytes * 2**20, 1)
        return LogLimits(
            found,
            whole=False,
            max_age_ms=max_age_ms,
            max_bytes=max_bytes,
            entry_bytes=-(-size // entries) if entries else 0,
        )

    def retention(self, pchannel: str) -> tuple[int, int] | None:
        """Minutes and megabytes, -1 = without end; None when nobody may tell."""
        if self._admin is None:
            return None
        try:
            return self._admin.retention(pchannel)
        except UserError as error:
            # Reading must not depend on a right that only looking at limits needs.
            if not self._retention_denied:
                log.warning("retention is not known", reason=error.reason, error=str(error))
            self._retention_denied = True
            return None

    def _seek(self, pchannel: str, unix_ms: int) -> bytes:
        found = self._range(pchannel)
        with self._reading(pchannel, None) as reader:
            try:
                reader.seek(max(unix_ms, 1))
                for _ in range(SEEK_MESSAGES):
                    if not reader.has_message_available():
                        break
                    message = reader.read_next(MESSAGE_MS)
                    if message.publish_timestamp() >= unix_ms:
                        return encode(place_of(message.message_id()))
            except pulsar.PulsarException as error:
                raise self.connection.trouble(error, pchannel) from error
        return found.end

    def _last(self, pchannel: str) -> Place | None:
        reader = self.connection.reader(pchannel, pulsar.MessageId.latest)
        with _closed(reader):
            return self._next(reader, pchannel)

    @contextlib.contextmanager
    def _reading(self, pchannel: str, start: Place | None) -> Iterator[pulsar.Reader]:
        """A reader that begins with the entry at `start`; None = the first one there is."""
        at = pulsar.MessageId.earliest if start is None else message_id(start)
        reader = self.connection.reader(pchannel, at)
        with _closed(reader):
            yield reader

    def _next(self, reader: pulsar.Reader, pchannel: str) -> Place | None:
        """None when the log ends here."""
        try:
            if not reader.has_message_available():
                return None
            return place_of(reader.read_next(MESSAGE_MS).message_id())
        except pulsar.PulsarException as error:
            raise self.connection.trouble(error, pchannel) from error


@contextlib.contextmanager
def _closed(reader: pulsar.Reader) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(pulsar.PulsarException):
            reader.close()


def message_id(place: Place) -> pulsar.MessageId:
    """Of the whole entry: the client would not find a batch index that is not there."""
    return pulsar.MessageId(-1, place.ledger, place.entry, -1)


def _beyond(pchannel: str, wanted: Place) -> LogResetError:
    return LogResetError(
        f"topic {pchannel} ends before message {wanted}: "
        "it was deleted and made again, or lost its end; resync"
    )
