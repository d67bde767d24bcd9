"""Files that belong to no manifest and never will: what a crash between file and manifest leaves,
or a fenced owner that could not clean up. A new owner removes them before it writes, so that
whoever reads by path alone sees no row twice.

Law: only after an owner's opening is published: then no manifest can name them any more. Looked at
are those that began with or after the oldest manifest that is not folded; what is older was seen by
an earlier opening.
"""

from __future__ import annotations

from milvus_cdc.errors import CdcError
from milvus_cdc.sink.files import places
from milvus_cdc.sink.files.chain import Chain
from milvus_cdc.sink.files.manifest import Manifest
from milvus_cdc.sink.files.store import TEMPORARY, Store


def remove_orphans(
    store: Store, folder: str, chain: Chain, head: Manifest
) -> tuple[tuple[str, str], ...]:
    """`head` is the owner's opening. Answers with a condition where removing is refused."""
    orphans = _orphans(store, folder, chain, head)
    try:
        store.remove(orphans)
    except CdcError as error:
        text = f"{len(orphans)} files below {folder} that no manifest names cannot be removed"
        return (("ORPHANS_LEFT", f"{text}: {error.message}"),)
    return ()


def _orphans(store: Store, folder: str, chain: Chain, head: Manifest) -> list[str]:
    loose = chain.listing().loose
    recent = list(chain.read_all(loose[0] if loose else head.number))
    oldest = recent[0]
    named = {file.path for each in recent for file in each.files}
    # No row at or below it is written again, so no orphan is of an earlier day.
    since = oldest.complete_ts if oldest.generation == head.generation else 0
    first_day = places.date_folder(places.day_of(since)) if since else ""
    generation = f"{folder}/{places.generation_folder(head.generation)}"
    found = []
    for day in store.folders(generation):
        if day < first_day:
            continue
        for entry in store.entries(f"{generation}/{day}"):
            part = places.part_of(entry.path)
            path = entry.path.removeprefix(f"{folder}/")
            if part is not None and part.number >= oldest.number and path not in named:
                found.append(entry.path)
            elif entry.path.endswith(TEMPORARY):
                found.append(entry.path)
    manifests = store.entries(f"{folder}/{places.MANIFESTS}")
    return found + [entry.path for entry in manifests if entry.path.endswith(TEMPORARY)]
