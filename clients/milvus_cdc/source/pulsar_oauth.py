"""A token for Pulsar from an identity provider, by OAuth 2.0 client credentials.

Pulsar's own client could fetch one: it looks for authorities only where some systems keep them,
tells a refusal as a refusal by the broker, and keeps the token from the REST API.

Laws: one token serves all connections until shortly before it ends; a provider's answer, also a
refusal, stands for a while, for Pulsar's client asks at each of its attempts; a secret is never
sent in the clear where the provider's address has TLS.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote_plus

import httpx
from milvuscdc.v1 import task_pb2

from milvus_cdc.errors import CdcError, RetryableError, UserError
from milvus_cdc.secrets import SecretResolver, resolve
from milvus_cdc.source.pulsar_tls import plain_context, tls_trouble
from milvus_cdc.tls import Fields, TlsFiles

FIELD = "source.pulsar.oauth"
REQUEST_SECONDS = 5.0
STANDS_SECONDS = 10.0
"""How long a refusal is believed, and a token of which a broker says that it is none."""
UNTOLD_SECONDS = 60.0
"""How long a token is used of which the provider does not say how long it holds."""
MARGIN_SECONDS = 30.0
_METADATA = ".well-known/openid-configuration"
_TEXT_MAX = 300
_TO_BLAME = {
    "invalid_client": "client_secret",
    "invalid_scope": "scope",
    "invalid_target": "audience",
    "access_denied": "audience",
}
"""Errors of RFC 6749 and 8707, and what is said of audiences by those who follow neither."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """By `time.monotonic`, as all times here."""

    digest: bytes
    """Of the secret that it was given for."""
    came_at: float
    ask_at: float
    token: str = ""
    ends_at: float = 0.0
    refusal: CdcError | None = None


class OauthTokens:
    """Called for the token that counts now; blocks while it is fetched. From any thread.

    Raises UserError QUEUE_ACCESS_DENIED, naming the field, when the provider refuses the client or
    is none; QUEUE_TLS_FAILED, TLS_FILE_UNUSABLE and those of secrets; RetryableError
    QUEUE_UNREACHABLE when it does not answer and no token is left.
    """

    def __init__(
        self,
        oauth: task_pb2.PulsarOauth,
        secrets: SecretResolver,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._oauth = oauth
        self._secrets = secrets
        self._now = now
        self._where = f"the identity provider {oauth.issuer_url}"
        self._answer: _Answer | None = None
        self._lock = threading.Lock()

    def __call__(self) -> str:
        with self._lock:
            return self._token()

    def renew(self) -> bool:
        """For whom a broker refused the token: whether there is one now that was not refused."""
        with self._lock:
            answer = self._answer
            if answer is None or self._now() < answer.came_at + STANDS_SECONDS:
                return False
            self._answer = None
            return self._token() != answer.token

    def _token(self) -> str:
        secret = resolve(self._secrets, self._oauth.client_secret, f"{FIELD}.client_secret") or ""
        digest = hashlib.sha256(secret.encode()).digest()
        answer, now = self._answer, self._now()
        if answer is None or answer.digest != digest or now >= answer.ask_at:
            answer = self._answer = self._ask_again(answer, secret, digest, now)
        if answer.refusal is not None:
            error = answer.refusal
            # Another one each time: a raised error keeps where it came by.
            raise type(error)(error.reason, error.message, field=error.field)
        return answer.token

    def _ask_again(self, before: _Answer | None, secret: str, digest: bytes, now: float) -> _Answer:
        try:
            token, seconds = self._fetch(secret)
        except CdcError as error:
            later = self._now() + STANDS_SECONDS
            if before is not None and before.digest == digest and later < before.ends_at:
                # The old one still holds: until it does not, nobody need know.
                return _Answer(digest, before.came_at, later, before.token, before.ends_at)
            return _Answer(digest, now, later, refusal=error)
        margin = min(MARGIN_SECONDS, seconds / 5)
        return _Answer(digest, now, now + seconds - margin, token, now + seconds)

    def _fetch(self, secret: str) -> tuple[str, float]:
        """The token, and for how many seconds it holds."""
        oauth = self._oauth
        context = plain_context(TlsFiles(oauth.ca_file, fields=Fields(FIELD)))
        try:
            with httpx.Client(verify=context, timeout=REQUEST_SECONDS, trust_env=False) as client:
                told = client.get(f"{oauth.issuer_url.rstrip('/')}/{_METADATA}")
                metadata = self._content(told, "issuer_url")
                answer = self._login(client, metadata, secret)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._trouble(error) from error
        content = self._content(answer, "")
        token, seconds = content.get("access_token"), content.get("expires_in", UNTOLD_SECONDS)
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise self._denied("gives no token that could be sent")
        try:
            held = float(seconds)
        except (TypeError, ValueError):
            held = 0.0
        if not 0 < held < math.inf:
            raise self._denied(f"gives a token that holds {seconds!r} seconds")
        return token, held

    def _login(self, client: httpx.Client, metadata: dict[str, Any], secret: str) -> httpx.Response:
        oauth = self._oauth
        endpoint = metadata.get("token_endpoint")
        if not isinstance(endpoint, str):
            raise self._denied("names no token_endpoint", "issuer_url")
        if oauth.issuer_url.startswith("https:") and not endpoint.startswith("https:"):
            raise self._denied(
                f"sends on to {endpoint}, where the secret would travel in the clear", "issuer_url"
            )
        form = {"grant_type": "client_credentials", "audience": oauth.audience}
        form = {name: value for name, value in (form | {"scope": oauth.scope}).items() if value}
        if "client_secret_post" in (metadata.get("token_endpoint_auth_methods_supported") or ()):
            form |= {"client_id": oauth.client_id, "client_secret": secret}
            return client.post(endpoint, data=form)
        login = (quote_plus(oauth.client_id), quote_plus(secret))
        return client.post(endpoint, data=form, auth=login)

    def _content(self, answer: httpx.Response, blamed: str) -> dict[str, Any]:
        status = answer.status_code
        try:
            content = answer.json()
        except ValueError:
            content = None
        told: dict[str, Any] = content if isinstance(content, dict) else {}
        if status == 200 and told:
            return told
        error = str(told.get("error", ""))
        said = f"{error} {told.get('error_description', '')}".strip()[:_TEXT_MAX]
        text = f"answers {status} {said or answer.reason_phrase}".strip()
        if status >= 500 or status in (408, 429):
            raise RetryableError("QUEUE_UNREACHABLE", f"{self._where} {text}")
        if not blamed:
            blamed = _TO_BLAME.get(error, "client_secret" if status == 401 else "")
        elif status == 200:
            text = "is none: what it answers is no OpenID metadata"
        raise self._denied(text, blamed)

    def _denied(self, text: str, blamed: str = "") -> UserError:
        field = f"{FIELD}.{blamed}" if blamed else FIELD
        return UserError("QUEUE_ACCESS_DENIED", f"{self._where} {text}; check {field}", field=field)

    def _trouble(self, error: Exception) -> CdcError:
        said = f"{self._where}: {str(error) or type(error).__name__}"
        if isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol):
            return self._denied(f"cannot be asked: {error}", "issuer_url")
        if tls_trouble(error):
            field = f"{FIELD}.ca_file"
            return UserError("QUEUE_TLS_FAILED", f"{said}; check {field}", field=field)
        return RetryableError("QUEUE_UNREACHABLE", said)


def renewed(token: Callable[[], str] | None) -> bool:
    """Whether a refused token has been replaced, so that asking once more makes sense. Raises as
    `OauthTokens`.
    """
    return isinstance(token, OauthTokens) and token.renew()
