"""A `Writer` where the replicator expects a `Sink`: what Milvus alone has is nothing here."""

from __future__ import annotations

from milvus_cdc.sink.writer import Writer


class WriterSink:
    """See module docstring."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
