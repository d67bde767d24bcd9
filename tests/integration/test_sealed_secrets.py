"""Secrets that are written out in requests: sealed in the store, seen by replicators only."""

from __future__ import annotations

import base64
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import field_mask_pb2
from milvus_cdc.errors import UserError
from milvuscdc.v1 import dead_letters_pb2, secret_pb2, sink_kafka_pb2, task_pb2
from milvuscdc.v1 import task_service_pb2 as api_pb

from tests.integration.controller_harness import (
    Api,
    FakeReplicator,
    HandFedSource,
    collection,
    controller,
    task_message,
    until,
)
from tests.integration.test_controller_api import refused

SOURCE, SINK, LETTERS = "source:Plain-1", "sink:Plain-2", "letters:Plain-3"
INVALID = grpc.StatusCode.INVALID_ARGUMENT


def key(folder: Path, name: str) -> dict[str, str]:
    """A new key, as the configuration names it."""
    path = folder / f"key-{name}"
    if not path.exists():
        path.write_bytes(base64.b64encode(os.urandom(32)) + b"\n")
    return {"id": name, "file": str(path)}


def literal(value: str) -> secret_pb2.Secret:
    return secret_pb2.Secret(literal=value)


def letters(secret: secret_pb2.Secret, topic: str = "dead") -> dead_letters_pb2.DeadLetters:
    result = dead_letters_pb2.DeadLetters()
    result.kafka.brokers.append("broker:9092")
    result.kafka.topic = topic
    result.kafka.security.sasl.username = "cdc"
    result.kafka.security.sasl.mechanism = sink_kafka_pb2.KAFKA_SASL_MECHANISM_PLAIN
    result.kafka.security.sasl.password.CopyFrom(secret)
    return result


def with_literals() -> task_pb2.Task:
    task = task_message(dead_letters=letters(literal(LETTERS)))
    task.source.milvus.token.literal = SOURCE
    task.sink.milvus.token.literal = SINK
    return task


def update(task: task_pb2.Task, *paths: str) -> api_pb.UpdateTaskRequest:
    return api_pb.UpdateTaskRequest(task=task, update_mask=field_mask_pb2.FieldMask(paths=paths))


def stored(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.glob("store.db*"))


def forms(value: str) -> Iterator[bytes]:
    """A secret as it may show up; base64 has three phases."""
    yield value.encode()
    for shift in range(3):
        yield base64.b64encode(b"\0" * shift + value.encode())[shift + 1 : -4]


def assert_none_in(where: bytes, *values: str) -> None:
    for value in values:
        for form in forms(value):
            assert form not in where


async def test_a_literal_is_refused_without_a_key(tmp_path: Path) -> None:
    async with controller(tmp_path / "store.db", HandFedSource()) as api:
        request = api_pb.CreateTaskRequest(task=with_literals())
        code, info = await refused(api.tasks.CreateTask(request))
        assert (code, info.reason) == (INVALID, "LITERAL_SECRET")
        assert info.metadata["field"] == "task.source.milvus.token"
        await api.tasks.CreateTask(api_pb.CreateTaskRequest(task=task_message()))
        changed = task_message(dead_letters=letters(literal(LETTERS)))
        code, info = await refused(api.tasks.UpdateTask(update(changed, "dead_letters")))
        assert (code, info.reason) == (INVALID, "LITERAL_SECRET")
    assert_none_in(stored(tmp_path), SOURCE, SINK, LETTERS)


async def test_a_literal_is_sealed_shown_to_nobody_and_opened_for_replicators(
    tmp_path: Path,
) -> None:
    source, keys = HandFedSource(collection(11)), [key(tmp_path, "one")]
    seen: list[Any] = []
    async with controller(tmp_path / "store.db", source, keys=keys) as api:
        async with FakeReplicator(api, "r1") as replicator:
            again = str(uuid.uuid4())
            request = api_pb.CreateTaskRequest(task=with_literals(), request_id=again)
            checked = api_pb.CreateTaskRequest(task=with_literals(), validate_only=True)
            seen.append(await api.tasks.CreateTask(checked))
            created = (await api.tasks.CreateTask(request)).task
            # Encrypted anew, it is the same request all the same, and another one is told apart.
            assert (await api.tasks.CreateTask(request)).task.uid == created.uid
            other = api_pb.CreateTaskRequest(task=with_literals(), request_id=again)
            other.task.sink.milvus.token.literal += "?"
            _, info = await refused(api.tasks.CreateTask(other))
            assert info.reason == "REQUEST_ID_REUSED"
            assert created.sink.milvus.token == secret_pb2.Secret(
                sealed=secret_pb2.SealedSecret(key="one")
            )
            await until(lambda: replicator.collections() and len(replicator.held) == 2)
            for assign in replicator.held.values():
                assert assign.source.milvus.token.literal == SOURCE
                assert assign.sink.milvus.token.literal == SINK
                assert assign.dead_letters == letters(literal(LETTERS))
            probes = [job.probe for job in replicator.jobs if job.WhichOneof("job") == "probe"]
            assert {probe.sink.milvus.token.literal for probe in probes} == {SINK}
            seen += [
                created,
                await api.tasks.GetTask(api_pb.GetTaskRequest(name=created.name)),
                await api.tasks.ListTasks(api_pb.ListTasksRequest()),
                await _first(api.tasks.WatchTasks(api_pb.WatchTasksRequest())),
            ]
    for message in seen:
        assert "sealed" in str(message)
        assert_none_in(message.SerializeToString(), SOURCE, SINK, LETTERS)
        assert "box" not in str(message)
    assert_none_in(stored(tmp_path), SOURCE, SINK, LETTERS)


async def _first(call: Any) -> Any:
    async for message in call:
        return message


async def test_what_get_gave_can_be_sent_back_and_ciphertext_cannot(tmp_path: Path) -> None:
    source, keys = HandFedSource(collection(11)), [key(tmp_path, "one")]
    async with controller(tmp_path / "store.db", source, keys=keys) as api:
        async with FakeReplicator(api, "r1") as replicator:
            task = (await api.tasks.CreateTask(api_pb.CreateTaskRequest(task=with_literals()))).task
            await until(lambda: len(replicator.held) == 2)

            async def given() -> set[str]:
                found = replicator.held.values()
                return {a.dead_letters.kafka.security.sasl.password.literal for a in found}

            task.labels["team"] = "search"
            changed = (await api.tasks.UpdateTask(update(task, "labels", "dead_letters"))).task
            assert changed.dead_letters == letters(
                secret_pb2.Secret(sealed=secret_pb2.SealedSecret(key="one"))
            )
            assert await given() == {LETTERS}
            # Not with another address beside it: nobody is to have it sent to himself.
            changed.dead_letters.kafka.brokers[0] = "mine:9092"
            code, info = await refused(api.tasks.UpdateTask(update(changed, "dead_letters")))
            assert (code, info.reason) == (INVALID, "SEALED_SECRET")
            # Written out anew, together with the address, it is taken.
            new = letters(literal("letters:New-4"), topic="other")
            await api.tasks.UpdateTask(update(task_message(dead_letters=new), "dead_letters"))

            def owned() -> list[str]:
                found = replicator.collections().values()
                return [a.dead_letters.kafka.security.sasl.password.literal for a in found]

            await until(lambda: owned() == ["letters:New-4"])
            placeholder = secret_pb2.Secret(sealed=secret_pb2.SealedSecret(key="one"))
            foreign = task_message("second", ("other.*",))
            foreign.sink.milvus.token.CopyFrom(placeholder)
            code, info = await refused(api.tasks.CreateTask(api_pb.CreateTaskRequest(task=foreign)))
            assert (code, info.reason) == (INVALID, "SEALED_SECRET")
            foreign.sink.milvus.token.sealed.box = b"x" * 40
            code, info = await refused(api.tasks.CreateTask(api_pb.CreateTaskRequest(task=foreign)))
            assert (code, info.reason) == (INVALID, "INVALID_FIELD")
            # Without any, an update that clears them.
            cleared = (await api.tasks.UpdateTask(update(task_message(), "dead_letters"))).task
            assert not cleared.HasField("dead_letters")
            again = task_message(dead_letters=letters(placeholder))
            code, info = await refused(api.tasks.UpdateTask(update(again, "dead_letters")))
            assert (code, info.reason) == (INVALID, "SEALED_SECRET")


async def test_keys_are_rotated_by_a_restart(tmp_path: Path) -> None:
    source, path = HandFedSource(collection(11)), tmp_path / "store.db"
    one, two = key(tmp_path, "one"), key(tmp_path, "two")

    async def shown(api: Api) -> task_pb2.Task:
        answer = await api.tasks.GetTask(api_pb.GetTaskRequest(name="tasks/copy"))
        return answer.task  # type: ignore[no-any-return]

    async with controller(path, source, keys=[one]) as api:
        await api.tasks.CreateTask(api_pb.CreateTaskRequest(task=with_literals()))
        before = await shown(api)
    with pytest.raises(UserError, match=r"tasks/copy: source\.milvus\.token .* 'one'"):
        async with controller(path, source, keys=[two]):
            pass
    async with controller(path, source, keys=[two, one]) as api:
        task = await shown(api)
        assert task.sink.milvus.token.sealed.key == "two"
        assert (task.etag, task.uid) == (before.etag, before.uid)
    async with controller(path, source, keys=[two]) as api:
        async with FakeReplicator(api, "r1") as replicator:
            await until(lambda: len(replicator.held) == 2)
            assert {a.sink.milvus.token.literal for a in replicator.held.values()} == {SINK}
    # Another key under the same name opens nothing.
    (tmp_path / "key-two").write_bytes(base64.b64encode(os.urandom(32)))
    with pytest.raises(UserError, match="another key under the same id"):
        async with controller(path, source, keys=[two]):
            pass


@pytest.mark.parametrize("content", ["", "short", base64.b64encode(b"x" * 31).decode(), "ä" * 44])
async def test_a_key_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "key").write_text(content)
    keys = [{"id": "one", "file": str(tmp_path / "key")}]
    with pytest.raises(UserError, match="openssl rand") as failed:
        async with controller(tmp_path / "store.db", HandFedSource(), keys=keys):
            pass
    assert failed.value.field == "secretsKeys[0]"
    for missing in ({"file": str(tmp_path / "none")}, {"env": "NO_SUCH_VARIABLE_HERE"}):
        with pytest.raises(UserError, match=r"secretsKeys\[0\]"):
            async with controller(
                tmp_path / "store.db", HandFedSource(), keys=[{"id": "one", **missing}]
            ):
                pass
