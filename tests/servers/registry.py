"""A small schema registry that conforms to Confluent's where a producer or consumer looks.

In this process, on loopback, in memory. It keeps schemas by subject with global ids, takes Avro and
Protobuf, refuses what its compatibility level (BACKWARD unless told otherwise) does not allow, and
can ask for a login or be down. Facts: Confluent's "Schema Registry API Reference" (paths, codes).
"""

from __future__ import annotations

import base64
import json
import re
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import fastavro

from tests.servers.certificates import Authority
from tests.servers.ports import free_port

_MEDIA_TYPE = "application/vnd.schemaregistry.v1+json"


class _Refused(Exception):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class SchemaRegistryServer:
    """`with SchemaRegistryServer() as registry:`; `registry.url` is its address."""

    def __init__(
        self, *, username: str = "", password: str = "", authority: Authority | None = None
    ) -> None:
        """With an `authority` it speaks TLS."""
        self.port = free_port()
        self.url = f"{'http' if authority is None else 'https'}://127.0.0.1:{self.port}"
        self._tls: ssl.SSLContext | None = None
        if authority is not None:
            own = authority.server("registry")
            self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self._tls.load_cert_chain(own.certificate, own.key)
        self.compatibility = "BACKWARD"
        self.read_only = False
        """As a registry whose mode is READONLY."""
        self.answer_with: tuple[int, bytes] | None = None
        """Status and body of every answer, as from a broken registry or another server."""
        self.requests: list[str] = []
        self._login = f"{username}:{password}" if username else ""
        self._mutex = threading.Lock()
        self._schemas: list[tuple[str, str]] = []
        """(type, text); a schema's id is its place, from 1."""
        self._subjects: dict[str, list[int]] = {}
        self._server: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        registry = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                registry._serve(self)

            def do_POST(self) -> None:
                registry._serve(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        if self._tls is not None:
            self._server.socket = self._tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def stop(self) -> None:
        """Nobody listens any more; what was registered stays."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
        self._server = None

    def __enter__(self) -> SchemaRegistryServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def schema(self, schema_id: int) -> str:
        return self._schemas[schema_id - 1][1]

    @property
    def subjects(self) -> dict[str, list[int]]:
        """Schema ids by subject, oldest first."""
        return {name: list(ids) for name, ids in self._subjects.items()}

    def _serve(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        self.requests.append(f"{request.command} {request.path}")
        if self.answer_with is not None:
            self._reply(request, *self.answer_with)
            return
        try:
            self._check_login(request.headers.get("Authorization", ""))
            with self._mutex:
                answer = self._answer(
                    request.command, urlsplit(request.path).path, json.loads(body or b"{}")
                )
            self._reply(request, 200, json.dumps(answer).encode())
        except _Refused as error:
            text = json.dumps({"error_code": error.code, "message": str(error)}).encode()
            self._reply(request, int(str(error.code)[:3]), text)

    def _reply(self, request: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
        request.send_response(status)
        request.send_header("Content-Type", _MEDIA_TYPE)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    def _check_login(self, header: str) -> None:
        if not self._login:
            return
        wanted = "Basic " + base64.b64encode(self._login.encode()).decode()
        if header != wanted:
            raise _Refused(401, "User cannot access the resource")

    def _answer(self, method: str, path: str, body: dict[str, Any]) -> Any:
        parts = [unquote(part) for part in path.strip("/").split("/")]
        match method, parts:
            case "POST", ["subjects", subject, "versions"]:
                return {"id": self._register(subject, *_parsed(body))}
            case "POST", ["subjects", subject]:
                return self._look_up(subject, *_parsed(body))
            case "GET", ["schemas", "ids", number]:
                if not 0 < int(number) <= len(self._schemas):
                    raise _Refused(40403, "Schema not found")
                return self._described(int(number))
            case "GET", ["subjects"]:
                return sorted(self._subjects)
            case "GET", ["subjects", subject, "versions", version]:
                ids = self._subjects.get(subject)
                if not ids:
                    raise _Refused(40401, f"Subject '{subject}' not found.")
                place = len(ids) if version == "latest" else int(version)
                return {
                    "subject": subject,
                    "version": place,
                    "id": ids[place - 1],
                    **self._described(ids[place - 1]),
                }
        raise _Refused(404, "HTTP 404 Not Found")

    def _described(self, schema_id: int) -> dict[str, str]:
        kind, text = self._schemas[schema_id - 1]
        return {"schema": text} if kind == "AVRO" else {"schema": text, "schemaType": kind}

    def _register(self, subject: str, kind: str, text: str) -> int:
        ids = self._subjects.get(subject, [])
        known = [each for each in ids if self._schemas[each - 1] == (kind, text)]
        if known:
            return known[0]
        if self.read_only:
            raise _Refused(42205, f"Subject {subject} is in read-only mode")
        if ids and self.compatibility == "BACKWARD":
            old_kind, old = self._schemas[ids[-1] - 1]
            why = (
                f"{old_kind} is not {kind}" if old_kind != kind else _incompatible(kind, old, text)
            )
            if why:
                raise _Refused(
                    409, f"Schema being registered is incompatible with an earlier schema: {why}"
                )
        if (kind, text) not in self._schemas:
            self._schemas.append((kind, text))
        schema_id = self._schemas.index((kind, text)) + 1
        self._subjects.setdefault(subject, []).append(schema_id)
        return schema_id

    def _look_up(self, subject: str, kind: str, text: str) -> dict[str, Any]:
        if subject not in self._subjects:
            raise _Refused(40401, f"Subject '{subject}' not found.")
        for version, schema_id in enumerate(self._subjects[subject], 1):
            if self._schemas[schema_id - 1] == (kind, text):
                described = self._described(schema_id)
                return {"subject": subject, "version": version, "id": schema_id, **described}
        raise _Refused(40403, "Schema not found")


def _parsed(body: dict[str, Any]) -> tuple[str, str]:
    kind, text = body.get("schemaType", "AVRO"), body.get("schema", "")
    try:
        if kind == "AVRO":
            fastavro.parse_schema(json.loads(text))
        elif kind != "PROTOBUF" or not text.startswith('syntax = "proto3";'):
            raise ValueError(f"no schema of type {kind}")
    except Exception as error:
        raise _Refused(42201, f"Invalid schema: {error}") from error
    return kind, text


def _incompatible(kind: str, old: str, new: str) -> str:
    """Why a reader with the new schema cannot read what the old one wrote; empty when it can."""
    if kind == "PROTOBUF":
        before, after = _proto_fields(old), _proto_fields(new)
        changed = [n for n in before.keys() & after.keys() if before[n] != after[n]]
        return f"field {changed[0]} has another type" if changed else ""
    writer, reader = json.loads(old), json.loads(new)
    if (writer["namespace"], writer["name"]) != (reader["namespace"], reader["name"]):
        return f"record {writer['name']} is now {reader['name']}"
    written = {field["name"]: field for field in writer["fields"]}
    for field in reader["fields"]:
        if field["name"] not in written:
            if "default" not in field:
                return f"field {field['name']} has no default"
        elif written[field["name"]]["type"] != field["type"]:
            return f"field {field['name']} has another type"
    return ""


def _proto_fields(text: str) -> dict[str, str]:
    fields = re.findall(r"^  ((?:optional |repeated )?\S+) \w+ = (\d+)", text, re.MULTILINE)
    return {number: kind for kind, number in fields}
