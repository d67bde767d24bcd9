"""What docs/library.md shows is what there is, and it runs."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from milvus_cdc.follow import EventKind, Follower, Positions

from tests.unit.follow.world import START, World, collection, insert, tick

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/library.md").read_text()
P = "by-dev-rootcoord-dml_0"


def block(marker: str) -> str:
    found = re.search(rf"<!-- {re.escape(marker)} -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    assert found, marker
    return found[1]


def test_the_example_is_the_file() -> None:
    code = (ROOT / "examples/follow.py").read_text()
    assert code.split('"""\n', 1)[1].strip() == block("examples/follow.py").strip()


def test_every_argument_and_event_is_named() -> None:
    arguments = set(inspect.signature(Follower).parameters)
    table = PAGE[PAGE.index("| argument of") : PAGE.index("## What comes")]
    assert set(re.findall(r"^\| `(.*?)` \|", table.replace("`, `", "` |\n| `"), re.MULTILINE)) == (
        arguments
    )
    for kind in EventKind:
        assert f"| `{kind}` |" in PAGE


async def test_its_writing_writes(tmp_path: Path) -> None:
    world = World()
    await world.metadata.put(collection(7, "c", P))
    vchannel = f"{P}_7v0"
    world.append(P, insert(vchannel, 7, START + 1, [1, 2]), tick(START + 2))
    (tmp_path / "out").mkdir()

    class Enough(Exception):
        pass

    saved: list[Positions] = []

    def save(positions: Positions) -> None:
        saved.append(positions)
        if len(saved) == 2:
            raise Enough

    page: dict[str, Any] = {"save": save}
    exec(block("writing"), page)
    sink = {"files": {"uri": f"file://{tmp_path}/out"}}
    try:
        await page["copy"](world.follower(), sink)
    except* Enough:
        pass
    files = list((tmp_path / "out").rglob("*.parquet"))
    assert sum(pq.read_metadata(each).num_rows for each in files) == 2
