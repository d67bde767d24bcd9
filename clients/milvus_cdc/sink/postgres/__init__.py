"""Rows in PostgreSQL: one table per collection, vectors as pgvector's types, exactly once.

Laws: rows and checkpoints are written in one transaction, which first locks the collection's row in
the ledger and finds its own epoch there, so an older owner's transaction never commits after a
newer owner has opened the collection; a write whose COMMIT went unanswered is looked up before
it is done again. A table that is not ours is never written to unless the task adopts it.
"""

from milvus_cdc.sink.postgres.writer import PostgresWriter

__all__ = ["PostgresWriter"]
