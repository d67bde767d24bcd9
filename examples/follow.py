"""Follows collections of a Milvus and prints their changes; goes on where it stopped.

python examples/follow.py ETCD ROOT_PATH NATS_URL 'DATABASE.*' POSITIONS_FILE
"""

import asyncio
import sys
from pathlib import Path

from milvus_cdc.follow import ChangeBatch, Follower, NatsConfig, Positions


async def follow(follower: Follower, file: Path) -> None:
    async with follower:
        async for item in follower:
            if isinstance(item, ChangeBatch):
                for row in item.rows():
                    print(item.table.full_name, row["$op"], row[item.table.key.name], flush=True)
            else:
                print(item.table.full_name, item.kind, item.partition, flush=True)
            save(follower.positions(including=item), file)


def save(positions: Positions, file: Path) -> None:
    new = file.with_suffix(".new")
    new.write_text(positions.to_json())
    new.replace(file)  # at once: never half a file


if __name__ == "__main__":
    etcd, root_path, nats, select, name = sys.argv[1:]
    saved = Positions.from_json(Path(name).read_text()) if Path(name).exists() else None
    queue = NatsConfig(nats)
    follower = Follower(
        etcd=[etcd], root_path=root_path, queue=queue, select=[select], positions=saved
    )
    asyncio.run(follow(follower, Path(name)))
