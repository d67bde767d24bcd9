"""Which place a task's `dead_letters` means; its adapter is imported when it is first wanted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from milvuscdc.v1 import dead_letters_pb2

from milvus_cdc.dead_letters import FIELD, Letter, Place
from milvus_cdc.errors import CdcError, UserError
from milvus_cdc.secrets import SecretResolver


def open_place(spec: dead_letters_pb2.DeadLetters, secrets: SecretResolver) -> Place:
    """No I/O yet. Raises UserError for settings or secrets that cannot be used."""
    kind = spec.WhichOneof("place")
    place: Place
    with _blamed(kind or ""):
        match kind:
            case "files":
                from milvus_cdc.dead_letters.files import LetterFiles

                place = LetterFiles(spec.files, secrets)
            case "kafka":
                from milvus_cdc.dead_letters.topic import LetterTopic

                place = LetterTopic(spec.kafka, secrets)
            case other:
                raise UserError(
                    "DEAD_LETTERS_UNKNOWN", f"no place of kind {other!r} is known here", field=FIELD
                )
    return _Blaming(place, kind)


class _Blaming:
    """The adapters are those of sinks, and so are the fields that their errors name."""

    def __init__(self, place: Place, kind: str) -> None:
        self._place = place
        self._kind = kind

    async def probe(self) -> str:
        with _blamed(self._kind):
            return await self._place.probe()

    async def put(self, letters: Sequence[Letter], timeout_seconds: float) -> None:
        with _blamed(self._kind):
            await self._place.put(letters, timeout_seconds)

    async def close(self) -> None:
        await self._place.close()


@contextlib.contextmanager
def _blamed(kind: str) -> Iterator[None]:
    try:
        yield
    except CdcError as error:
        here = f"{FIELD}.{kind}"
        error.field = error.field.replace(f"sink.{kind}", here) or here
        error.message = f"dead letters: {error.message.replace(f'sink.{kind}', here)}"
        raise
