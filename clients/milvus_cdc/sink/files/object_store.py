"""An S3-compatible store, by way of obstore (Rust's `object_store`), which alone of the candidates
offers the conditional PUT that `create` needs.

Facts: a PUT or the completion of a multipart upload shows an object whole or not at all, listings
and reads are consistent after it (AWS since 2020, so do MinIO and Ceph). `If-None-Match: *` lets
one of several creations win (AWS since August 2024, MinIO, Ceph; a server that does not know the
header ignores it: `probe` finds that out, and `create` then looks first, which leaves a gap between
the look and the PUT that only the replicators' leases close).
"""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, Literal

import obstore
import pyarrow as pa
from obstore import exceptions
from obstore.store import S3Store

from milvus_cdc.errors import CdcError, RetryableError, UnknownOutcomeError, UserError
from milvus_cdc.sink.files.store import URI_FIELD, Bytes, Entry, MissingError

_MULTIPART_BYTES = 16 * 2**20
_CODE = re.compile(r"<Code>(\w+)</Code>")
_STATUS = re.compile(r"status code: (\d{3})")
_WHY = re.compile(r"<Message>([^<]+)</Message>")
_IDENTITY = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "TokenRefreshRequired",
    "InvalidToken",
    "RequestTimeTooSkewed",
}
_DISTRUST = re.compile(r"InvalidCertificate\(\s*(\w+)")
_ACCESS_FIELD = "sink.files.s3"
_ENDPOINT_FIELD = "sink.files.s3.endpoint"
NOT_EXCLUSIVE = (
    "NO_CONDITIONAL_PUT",
    "this store ignores `If-None-Match`, so two writers of one collection are kept apart by the "
    "replicators' leases alone; use a store that has conditional writes",
)


class ObjectStore:
    """A bucket, or a prefix in it."""

    def __init__(
        self,
        bucket: str,
        prefix: str,
        *,
        endpoint: str = "",
        region: str = "",
        access_key_id: str | None = None,
        secret_access_key: str | None = None,
        session_token: str | None = None,
        request_seconds: float = 30.0,
    ) -> None:
        """Without keys: the process' own, from the environment or the machine's role."""
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._bucket = bucket
        self._exclusive: bool | None = None
        config: dict[str, Any] = {
            "endpoint": endpoint or None,
            "region": region or ("us-east-1" if endpoint else None),
            "access_key_id": access_key_id,
            "secret_access_key": secret_access_key,
            "session_token": session_token,
        }
        self._store = S3Store(
            bucket,
            prefix=prefix or None,
            client_options={
                "allow_http": endpoint.startswith("http://"),
                "timeout": timedelta(seconds=request_seconds),
                "connect_timeout": timedelta(seconds=3),
            },
            # Our callers retry, and say so; these bridge what is over in a moment.
            retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=5)},
            **{key: value for key, value in config.items() if value},
        )

    def probe(self) -> str:
        self._exclusive = None
        self._find_out()
        return f"S3 bucket {self._bucket}"

    def conditions(self) -> tuple[tuple[str, str], ...]:
        return () if self._find_out() else (NOT_EXCLUSIVE,)

    def _find_out(self) -> bool:
        if self._exclusive is None:
            name = f"_probe/{uuid.uuid4().hex}"
            with self._errors(name):
                obstore.put(self._store, name, b"probe")
                try:
                    obstore.put(self._store, name, b"again", mode="create", use_multipart=False)
                    self._exclusive = False
                except exceptions.AlreadyExistsError:
                    self._exclusive = True
                except exceptions.NotSupportedError:
                    self._exclusive = False
                if bytes(obstore.get(self._store, name).bytes()) not in (b"probe", b"again"):
                    raise RetryableError(
                        "SINK_IO_ERROR", f"{self.uri} does not give back what was written"
                    )
            self.entries("_probe")
            # Whoever keeps everything for ever may forbid it.
            with contextlib.suppress(CdcError):
                self.remove([name])
        return self._exclusive

    def put(self, path: str, data: Bytes) -> None:
        with self._errors(path):
            large = memoryview(data).nbytes > _MULTIPART_BYTES
            obstore.put(
                self._store, path, data, use_multipart=large, chunk_size=_MULTIPART_BYTES // 2
            )

    def create(self, path: str, data: Bytes) -> bool:
        if not self._find_out() and self._exists(path):
            return False
        mode: Literal["create", "overwrite"] = "create" if self._exclusive else "overwrite"
        try:
            with self._errors(path):
                obstore.put(self._store, path, data, mode=mode, use_multipart=False)
        except RetryableError as error:
            # The request may have arrived, and only its answer be lost.
            raise UnknownOutcomeError(error.reason, error.message, field=error.field) from error
        except _ExistsError:
            return False
        return True

    def _exists(self, path: str) -> bool:
        try:
            with self._errors(path):
                obstore.head(self._store, path)
        except MissingError:
            return False
        return True

    def get(self, path: str) -> bytes:
        with self._errors(path):
            return bytes(obstore.get(self._store, path).bytes())

    def open(self, path: str) -> pa.NativeFile:
        with self._errors(path):
            size = int(obstore.head(self._store, path)["size"])
            return pa.PythonFile(_Readable(self, path, size), mode="r")

    def get_range(self, path: str, start: int, length: int) -> bytes:
        """Raises MissingError."""
        with self._errors(path):
            return bytes(obstore.get_range(self._store, path, start=start, length=length))

    def entries(self, folder: str) -> list[Entry]:
        with self._errors(folder):
            return [
                Entry(str(each["path"]), int(each["size"]))
                for chunk in obstore.list(self._store, folder or None)
                for each in chunk
            ]

    def folders(self, folder: str) -> list[str]:
        with self._errors(folder):
            found = obstore.list_with_delimiter(self._store, folder or None)
            return sorted(str(each).rpartition("/")[2] for each in found["common_prefixes"])

    def remove(self, paths: Sequence[str]) -> None:
        if not paths:
            return
        with contextlib.suppress(MissingError), self._errors(paths[0]):
            obstore.delete(self._store, list(paths))

    @contextlib.contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        try:
            yield
        except exceptions.AlreadyExistsError:
            raise _ExistsError(path) from None
        except (exceptions.BaseError, OSError) as error:
            missing = isinstance(error, FileNotFoundError) and "NoSuchBucket" not in str(error)
            if missing:
                raise MissingError(path) from None
            raise _s3_error(f"{self.uri}/{path}", self._bucket, error) from error


class _ExistsError(Exception):
    pass


class _Readable:
    """What pyarrow asks of a Python file: each read is one ranged GET."""

    closed = False

    def __init__(self, store: ObjectStore, path: str, size: int) -> None:
        self._store, self._path, self._size, self._at = store, path, size, 0

    def read(self, size: int = -1) -> bytes:
        left = self._size - self._at
        count = left if size < 0 else min(size, left)
        if count <= 0:
            return b""
        data = self._store.get_range(self._path, self._at, count)
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def size(self) -> int:
        return self._size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def _s3_error(where: str, bucket: str, error: Exception) -> CdcError:
    text = str(error)
    found = _CODE.search(text)
    code = found[1] if found else ""
    why = _WHY.search(text)
    shown = f"{where}: {code}: {why[1]}" if code and why else f"{where}: {_first_line(text)}"
    if distrust := _DISTRUST.search(text):
        return UserError(
            "TLS_SERVER_UNTRUSTED",
            f"{where}: its certificate is refused: {distrust[1]}; trust its authority on the "
            "replicators' machines, or name a file of authorities in their SSL_CERT_FILE",
            field=_ENDPOINT_FIELD,
        )
    if code == "NoSuchBucket":
        return UserError(
            "BUCKET_MISSING", f"{shown}; create the bucket {bucket!r}", field=URI_FIELD
        )
    if code in _IDENTITY or isinstance(error, exceptions.UnauthenticatedError):
        return UserError(
            "SINK_UNAUTHENTICATED",
            f"{shown}; check the access key and its secret",
            field=_ACCESS_FIELD,
        )
    status = _STATUS.search(text)
    if isinstance(error, exceptions.PermissionDeniedError) or (status and status[1] == "403"):
        return UserError(
            "SINK_PERMISSION_DENIED",
            f"{shown}; grant s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject",
            field=_ACCESS_FIELD,
        )
    return RetryableError("SINK_UNAVAILABLE", shown, field=URI_FIELD)


def _first_line(text: str) -> str:
    return " ".join(text.partition("\n\nDebug source")[0].split())[:400]
