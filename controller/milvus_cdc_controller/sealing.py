"""Secrets that users write out: encrypted before anything is stored, opened for replicators only.

Laws: what is stored or shown holds no secret in clear; a sealed secret opens only in the task and
at the place where it was sealed, so that who can write to the store cannot move it to an address
of his own; a client never sends ciphertext.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
from collections.abc import Sequence
from dataclasses import replace

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from google.protobuf.message import Message
from milvus_cdc.errors import UserError
from milvus_cdc.secrets import secrets_in
from milvuscdc.v1 import dead_letters_pb2, secret_pb2, task_pb2
from milvuscdc.v1 import replication_service_pb2 as pb

from milvus_cdc_controller.api_errors import ApiError
from milvus_cdc_controller.config import KeyConfig
from milvus_cdc_controller.core.effects import Record
from milvus_cdc_controller.core.task import TaskRecord

KEY_BYTES = 32
NONCE_BYTES = 12
"""Random for each value. NIST SP 800-38D allows 2^32 values with one key."""


class Seals:
    """AES-256-GCM with the first of its keys; every one of them opens."""

    def __init__(self, keys: Sequence[tuple[str, bytes]] = ()) -> None:
        self._keys = {name: AESGCM(key) for name, key in keys}
        self._first = keys[0][0] if keys else ""
        self._marks = hashlib.sha256(b"milvus-cdc marks" + keys[0][1]).digest() if keys else b""

    @classmethod
    def read(cls, wanted: Sequence[KeyConfig]) -> Seals:
        """Raises UserError SECRETS_KEY_UNUSABLE with the key of the configuration."""
        return cls([(key.id, _read(key, f"secretsKeys[{at}]")) for at, key in enumerate(wanted)])

    def seal_task(self, task: task_pb2.Task, uid: str) -> None:
        """In place. Raises ApiError LITERAL_SECRET, SEALED_SECRET."""
        for path, secret in secrets_in(task):
            if secret.WhichOneof("ref") == "sealed":
                raise _nothing_sealed(path)
            self._seal(secret, uid, path)

    def seal_dead_letters(
        self, wanted: dead_letters_pb2.DeadLetters, stored: bytes, uid: str
    ) -> None:
        """In place, what is shown as sealed becoming what is stored. That only where the rest is as
        it is stored: a secret that nobody can read must not go to another address by an update.

        Raises ApiError LITERAL_SECRET, SEALED_SECRET.
        """
        known = dead_letters_pb2.DeadLetters.FromString(stored)
        kept = {
            path: secret
            for path, secret in secrets_in(known, "dead_letters")
            if secret.WhichOneof("ref") == "sealed"
        }
        same = _bare(wanted) == _bare(known)
        for path, secret in secrets_in(wanted, "dead_letters"):
            if secret.WhichOneof("ref") != "sealed":
                self._seal(secret, uid, path)
            elif path not in kept:
                raise _nothing_sealed(path)
            elif not same:
                raise ApiError(
                    "INVALID_ARGUMENT",
                    "SEALED_SECRET",
                    f"task.{path}: the sealed secret stays only where all else in dead_letters "
                    "stays; write the secret out again, or refer to it by env or file.",
                    field=f"task.{path}",
                )
            else:
                secret.CopyFrom(kept[path])

    def mark_literals(self, task: task_pb2.Task) -> None:
        """In place: literals become what tells them apart, to whoever has the key only."""
        for _, secret in secrets_in(task):
            if secret.WhichOneof("ref") == "literal":
                mark = hmac.new(self._marks, secret.literal.encode(), hashlib.sha256)
                secret.literal = mark.hexdigest()

    def open(self, message: Message, path: str = "") -> None:
        """In place, every sealed secret; `path` is the message's place in its task. Raises
        UserError SEALED_SECRET.
        """
        if not self._keys:
            return
        for place, secret in secrets_in(message, path):
            if secret.WhichOneof("ref") == "sealed":
                secret.literal = self._opened(secret.sealed, secret.sealed.task_uid, place)

    def open_response(self, response: pb.ConnectResponse) -> None:
        """What a replicator is sent."""
        match response.WhichOneof("message"):
            case "assign":
                self.open(response.assign)
            case "job_request":
                request = response.job_request
                self.open(getattr(request, str(request.WhichOneof("job"))))

    def renewed(self, record: Record) -> Record:
        """A stored record, its secrets sealed with the first key; the same object where nothing has
        changed. Raises UserError SECRETS_KEY_MISSING, SEALED_SECRET naming task and place.
        """
        if not isinstance(record, TaskRecord):
            return record
        spec = record.spec
        parts: dict[str, Message] = {
            "source": task_pb2.Source.FromString(spec.source),
            "sink": task_pb2.Sink.FromString(spec.sink),
            "dead_letters": dead_letters_pb2.DeadLetters.FromString(spec.dead_letters),
        }
        changed: dict[str, bytes] = {}
        for name, part in parts.items():
            for path, secret in secrets_in(part, name):
                if secret.WhichOneof("ref") != "sealed":
                    continue
                try:
                    value = self._opened(secret.sealed, record.uid, path)
                except UserError as error:
                    raise UserError(error.reason, f"{spec.name}: {error.message}") from error
                if secret.sealed.key != self._first:
                    secret.literal = value
                    self._seal(secret, record.uid, path)
                    changed[name] = part.SerializeToString(deterministic=True)
        return record if not changed else replace(record, spec=replace(spec, **changed))  # type: ignore[arg-type]

    def _seal(self, secret: secret_pb2.Secret, uid: str, path: str) -> None:
        if secret.WhichOneof("ref") != "literal":
            return
        if not self._keys:
            raise ApiError(
                "INVALID_ARGUMENT",
                "LITERAL_SECRET",
                f"task.{path} is written out, and this controller has no key to store it "
                "encrypted; refer to it by env or file, read where the replicator runs, or give "
                "the controller `secretsKeys`.",
                field=f"task.{path}",
            )
        nonce = os.urandom(NONCE_BYTES)
        box = self._keys[self._first].encrypt(nonce, secret.literal.encode(), _bound(uid, path))
        secret.sealed.CopyFrom(
            secret_pb2.SealedSecret(key=self._first, task_uid=uid, box=nonce + box)
        )

    def _opened(self, sealed: secret_pb2.SealedSecret, uid: str, path: str) -> str:
        key = self._keys.get(sealed.key)
        if key is None:
            raise UserError(
                "SECRETS_KEY_MISSING",
                f"{path} is sealed with the key {sealed.key!r}, which is not among secretsKeys; "
                "put it back, after the first one, until the controller has started once with both",
                field="secretsKeys",
            )
        nonce, box = sealed.box[:NONCE_BYTES], sealed.box[NONCE_BYTES:]
        try:
            return key.decrypt(nonce, box, _bound(uid, path)).decode()
        except (InvalidTag, ValueError) as error:
            raise UserError(
                "SEALED_SECRET",
                f"{path} cannot be opened with the key {sealed.key!r}: either that is another key "
                "under the same id, or the store was changed by somebody else",
                field="secretsKeys",
            ) from error


def shown(message: Message) -> None:
    """In place: of a sealed secret only the id of its key stays."""
    for _, secret in secrets_in(message):
        if secret.WhichOneof("ref") == "sealed":
            secret.sealed.ClearField("task_uid")
            secret.sealed.ClearField("box")


def _bound(uid: str, path: str) -> bytes:
    """What a box opens with only: its task and its place there."""
    return f"{uid}\n{path}".encode()


def _bare(letters: dead_letters_pb2.DeadLetters) -> bytes:
    """All but the sealed secrets' contents."""
    bare = dead_letters_pb2.DeadLetters()
    bare.CopyFrom(letters)
    for _, secret in secrets_in(bare):
        secret.env = "SECRET"
    return bare.SerializeToString(deterministic=True)


def _nothing_sealed(path: str) -> ApiError:
    return ApiError(
        "INVALID_ARGUMENT",
        "SEALED_SECRET",
        f"task.{path} is `sealed`, and there is no secret of this task that it could stand for; "
        "write the secret out, or refer to it by env or file.",
        field=f"task.{path}",
    )


def _read(key: KeyConfig, place: str) -> bytes:
    try:
        text = key.file.read_text() if key.file is not None else os.environ[key.env or ""]
        value = base64.b64decode(text.strip(), validate=True)
    except OSError as error:
        raise _unusable(f"{place}: {key.file}: {error.strerror}", place) from error
    except KeyError:
        raise _unusable(f"{place}: the variable {key.env} is not set", place) from None
    except (binascii.Error, ValueError):
        value = b""
    if len(value) != KEY_BYTES:
        text = f"{place}: the key is not base64 of {KEY_BYTES} bytes; make one with "
        raise _unusable(f"{text}`openssl rand -base64 {KEY_BYTES}`", place)
    return value


def _unusable(message: str, place: str) -> UserError:
    return UserError("SECRETS_KEY_UNUSABLE", message, field=place)
