"""A source's metadata, read from its etcd: what there is, how it changes, whether to believe it."""

from milvus_cdc.catalog.decode import Assembly, decode_catalogue
from milvus_cdc.catalog.guard import Doubt, KnownSource, Objection, judge, learn
from milvus_cdc.catalog.layout import Layout
from milvus_cdc.catalog.watch import CatalogueWatcher

__all__ = [
    "Assembly",
    "CatalogueWatcher",
    "Doubt",
    "KnownSource",
    "Layout",
    "Objection",
    "decode_catalogue",
    "judge",
    "learn",
]
