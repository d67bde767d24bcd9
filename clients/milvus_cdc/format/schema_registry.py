"""A Confluent-compatible schema registry: a schema in, its id out, once per subject and schema.

Facts: the registry's REST API (`POST /subjects/{subject}/versions` registers, `POST
/subjects/{subject}` looks up; both answer with `id`), its error codes (409 incompatible, 422
refused, 404 unknown), and the wire format of records: a zero byte, then the id in four bytes,
big-endian. The client that comes with confluent-kafka is not used: it brings authlib and more for
what is one request here.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Final, Literal
from urllib.parse import quote

import httpx
from milvuscdc.v1 import format_pb2

from milvus_cdc.errors import CdcError, RetryableError, UserError
from milvus_cdc.secrets import SecretResolver, resolve

MEDIA_TYPE: Final = "application/vnd.schemaregistry.v1+json"
_TIMEOUT_SECONDS: Final = 10.0
_CONNECTIONS: Final = 4
"""At once: a task of a thousand collections begins with two thousand schemas."""

SchemaType = Literal["AVRO", "PROTOBUF"]
Part = Literal["key", "value"]


def frame(schema_id: int) -> bytes:
    """What a record begins with."""
    return b"\x00" + schema_id.to_bytes(4, "big")


class Registry:
    """`field` is its place in the task. No I/O before the first schema."""

    def __init__(
        self, spec: format_pb2.SchemaRegistry, secrets: SecretResolver, field: str
    ) -> None:
        self._field = field
        self._url = spec.url.rstrip("/")
        self._subject = spec.subject
        self._lookup_only = spec.lookup_only
        password = resolve(secrets, spec.password, f"{field}.password")
        if password is not None and not spec.username:
            raise UserError(
                "INVALID_FIELD",
                f"{field}.password without {field}.username; set both or none",
                field=f"{field}.username",
            )
        self._login = (spec.username, password or "") if spec.username else None
        # Without TLS there is nothing to trust, and loading authorities takes a while.
        self._verify: ssl.SSLContext | bool = self._url.startswith("https:")
        if spec.ca_file:
            try:
                self._verify = ssl.create_default_context(cafile=spec.ca_file)
            except OSError as error:
                raise UserError(
                    "INVALID_FIELD",
                    f"{field}.caFile: {spec.ca_file} cannot be read at this replicator: {error}",
                    field=f"{field}.caFile",
                ) from error
        self._client: httpx.AsyncClient | None = None
        self._ids: dict[tuple[str, str], asyncio.Task[int]] = {}

    def subject(self, topic: str, record: str, part: Part) -> str:
        """Name under which the schema of a topic's records is kept; `record` is its full name."""
        match self._subject:
            case format_pb2.SUBJECT_STRATEGY_RECORD:
                return record
            case format_pb2.SUBJECT_STRATEGY_TOPIC_RECORD:
                return f"{topic}-{record}"
            case _:
                return f"{topic}-{part}"

    async def schema_id(self, subject: str, kind: SchemaType, schema: str) -> int:
        """Registers, or looks up with `lookup_only`; known ones are not asked for again. Raises
        RetryableError REGISTRY_UNAVAILABLE; UserError SCHEMA_INCOMPATIBLE, SCHEMA_REFUSED,
        SCHEMA_NOT_REGISTERED, REGISTRY_DENIED, REGISTRY_CERTIFICATE, REGISTRY_NOT_FOUND.
        """
        place = (subject, schema)
        asked = self._ids.get(place)
        if asked is None or (asked.done() and (asked.cancelled() or asked.exception())):
            asked = asyncio.ensure_future(self._ask(subject, kind, schema))
            self._ids[place] = asked
        # Whoever waits may be cancelled; the answer is still of use to others.
        return await asyncio.shield(asked)

    async def _ask(self, subject: str, kind: SchemaType, schema: str) -> int:
        if self._client is None:
            self._client = httpx.AsyncClient(
                auth=self._login,
                verify=self._verify,
                timeout=_TIMEOUT_SECONDS,
                limits=httpx.Limits(max_connections=_CONNECTIONS),
                headers={"Accept": MEDIA_TYPE},
            )
        path = f"/subjects/{quote(subject, safe='')}"
        body = {"schema": schema} if kind == "AVRO" else {"schema": schema, "schemaType": kind}
        try:
            answer = await self._client.post(
                self._url + path + ("" if self._lookup_only else "/versions"),
                json=body,
                headers={"Content-Type": MEDIA_TYPE},
            )
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if answer.status_code != httpx.codes.OK:
            raise self._refusal(answer, subject)
        try:
            return int(answer.json()["id"])
        except (ValueError, KeyError, TypeError) as error:
            raise self._user(
                "REGISTRY_NOT_FOUND",
                f"{self._url} answers, but not as a schema registry; check the address",
                ".url",
            ) from error

    def _unreachable(self, error: httpx.HTTPError) -> CdcError:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                return self._user(
                    "REGISTRY_CERTIFICATE",
                    f"the certificate of {self._url} is not trusted ({cause.verify_message}); name "
                    "the authority in caFile",
                    ".caFile",
                )
            cause = cause.__cause__ or cause.__context__
        what = str(error) or type(error).__name__
        return RetryableError(
            "REGISTRY_UNAVAILABLE",
            f"the schema registry {self._url} does not answer ({what}); is it running?",
            field=f"{self._field}.url",
        )

    def _refusal(self, answer: httpx.Response, subject: str) -> CdcError:
        try:
            content = answer.json()
            said, code = str(content.get("message", "")), content.get("error_code")
        except (ValueError, AttributeError):
            said, code = answer.text[:200], None
        said = f"{said or answer.reason_phrase} ({code or answer.status_code})"
        match answer.status_code:
            case 401 | 403:
                who = self._login[0] if self._login else "nobody"
                return self._user(
                    "REGISTRY_DENIED",
                    f"the schema registry does not let {who} use the subject {subject}: {said}; "
                    "check username and password, and the rights on the subject",
                    ".username",
                )
            case 404 if self._lookup_only and code in (40401, 40403):
                return self._user(
                    "SCHEMA_NOT_REGISTERED",
                    f"the subject {subject} does not hold this collection's schema: {said}; "
                    "register it or clear lookupOnly",
                    ".lookupOnly",
                )
            case 409:
                return self._user(
                    "SCHEMA_INCOMPATIBLE",
                    f"the subject {subject} refuses the schema as incompatible with those it has: "
                    f"{said}; use another topic, another subject strategy if collections share one "
                    "topic, or relax the subject's compatibility",
                    ".subject",
                )
            case 408 | 425 | 429 | 500 | 502 | 503 | 504:
                return RetryableError(
                    "REGISTRY_UNAVAILABLE",
                    f"the schema registry {self._url} cannot answer now: {said}",
                    field=f"{self._field}.url",
                )
            case 400 | 413 | 422:
                return self._user(
                    "SCHEMA_REFUSED",
                    f"the schema registry refuses the schema of the subject {subject}: {said}; see "
                    "what it supports and in which mode the subject is",
                    "",
                )
        return self._user(
            "REGISTRY_NOT_FOUND",
            f"{self._url} answers with {said}; check that it is a schema registry's address",
            ".url",
        )

    def _user(self, reason: str, message: str, at: str) -> UserError:
        return UserError(reason, message, field=self._field + at)

    async def close(self) -> None:
        for asked in self._ids.values():
            asked.cancel()
        self._ids.clear()
        if self._client is not None:
            await self._client.aclose()
            self._client = None
