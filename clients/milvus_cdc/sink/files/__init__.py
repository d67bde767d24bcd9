"""Rows to files: Parquet or JSON lines below a folder or a bucket; see docs/files.md."""

from milvus_cdc.sink.files.writer import FileWriter

__all__ = ["FileWriter"]
