"""Identity providers on loopback, for OAuth 2.0 client credentials of `alice-client`."""

from __future__ import annotations

import base64
import contextlib
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote_plus

from tests.servers.certificates import Pair

METADATA = "/.well-known/openid-configuration"


@dataclass
class Provider:
    """What it does now; a test may change it while it serves."""

    make: Callable[[int], str]
    """A token that holds for so many seconds."""
    seconds: int = 600
    """How long tokens hold, and are said to."""
    secret: str = "right"
    methods: tuple[str, ...] = ("client_secret_basic", "client_secret_post")
    url: str = ""
    """The issuer; `token_url` is where tokens are."""
    token_url: str = ""
    broken: int = 0
    """With which status everything is answered; 0: as it should be."""
    asked: list[dict[str, str]] = field(default_factory=list)
    """The forms of those who wanted a token."""

    def metadata(self) -> dict[str, object]:
        return {
            "issuer": self.url,
            "token_endpoint": self.token_url,
            "token_endpoint_auth_methods_supported": list(self.methods),
        }

    def login(self, authorization: str, form: dict[str, str]) -> tuple[int, dict[str, object]]:
        """The answer to who asks for a token."""
        self.asked.append(form)
        method = "client_secret_basic" if authorization else "client_secret_post"
        known = (form.get("client_id", ""), form.get("client_secret", ""))
        if authorization:
            login = base64.b64decode(authorization.split()[1]).decode().partition(":")
            known = (unquote_plus(login[0]), unquote_plus(login[2]))
        if known != ("alice-client", self.secret) or method not in self.methods:
            return 401, {"error": "invalid_client", "error_description": "nobody we know"}
        if form.get("scope") == "unheard":
            return 400, {"error": "invalid_scope"}
        return 200, {"access_token": self.make(self.seconds), "expires_in": self.seconds}


@contextlib.contextmanager
def openid_provider(make: Callable[[int], str], pair: Pair | None = None) -> Iterator[Provider]:
    """With `pair` it is reached by TLS only."""
    provider = Provider(make)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == f"/realm{METADATA}"
            self._answer(200 if found else 404, provider.metadata() if found else {})

        def do_POST(self) -> None:
            form = self.rfile.read(int(self.headers["Content-Length"])).decode()
            authorization = self.headers.get("Authorization") or ""
            self._answer(*provider.login(authorization, dict(parse_qsl(form))))

        def _answer(self, status: int, content: dict[str, object]) -> None:
            body = json.dumps(content).encode()
            self.send_response(provider.broken or status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if pair is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pair.certificate, pair.key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    scheme = "http" if pair is None else "https"
    provider.url = f"{scheme}://127.0.0.1:{server.server_address[1]}/realm"
    provider.token_url = f"{provider.url}/token"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield provider
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def identity_provider() -> Iterator[str]:
    """The URL of a token endpoint that gives alice's token, unsigned, to whoever knows the secret
    `right`.
    """
    with openid_provider(_unsigned) as provider:
        yield provider.token_url


def _unsigned(seconds: int) -> str:
    now = int(time.time())
    claims: dict[str, object] = {"sub": "alice", "iat": now, "exp": now + seconds}
    return f"{_part({'alg': 'none'})}.{_part(claims)}."


def _part(content: dict[str, object]) -> str:
    return base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip("=")
