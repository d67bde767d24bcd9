"""Following a Milvus from a program of one's own: changes in order, positions to go on from.

No service runs: the program reads the source's etcd and queue itself. See `docs/library.md`.
"""

from milvus_cdc.follow.follower import Follower
from milvus_cdc.follow.items import ChangeBatch, EventKind, Item, SchemaEvent
from milvus_cdc.follow.positions import CollectionPosition, Positions, VchannelPosition
from milvus_cdc.follow.writing import WriterFeed
from milvus_cdc.source import KafkaConfig, NatsConfig, PulsarConfig

__all__ = [
    "ChangeBatch",
    "CollectionPosition",
    "EventKind",
    "Follower",
    "Item",
    "KafkaConfig",
    "NatsConfig",
    "Positions",
    "PulsarConfig",
    "SchemaEvent",
    "VchannelPosition",
    "WriterFeed",
]
