"""Asks Pulsar's REST API what a topic holds: its ledgers, its last message, its retention.

Law: a redirect to the broker that owns a topic is followed with the same credentials, but never
from TLS to plaintext.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from urllib.parse import quote

import httpx

from milvus_cdc.errors import BugError, LogResetError, RetryableError, UserError
from milvus_cdc.source import PulsarConfig
from milvus_cdc.source.pulsar_oauth import renewed
from milvus_cdc.source.pulsar_positions import Place
from milvus_cdc.source.pulsar_tls import tls_context, tls_trouble

REQUEST_SECONDS = 5.0
REDIRECTS = 5


@dataclass(frozen=True, slots=True)
class Ledger:
    """`entries` messages (or batches) with the entry ids from 0; `size` in bytes as stored."""

    ledger_id: int
    entries: int
    size: int


@dataclass(frozen=True, slots=True)
class Topic:
    """What Pulsar says of a topic at one time."""

    ledgers: tuple[Ledger, ...]
    """Those still there, oldest first; the last one is written to."""
    incarnation: bytes
    """When it was made, in milliseconds: it stays through restarts and ends with a deletion."""

    @property
    def first(self) -> Place:
        """Of the oldest entry; where the next one will be when there is none."""
        held = next((ledger for ledger in self.ledgers if ledger.entries), self.ledgers[-1])
        return Place(held.ledger_id, 0)

    def find(self, ledger_id: int) -> Ledger | None:
        return next((each for each in self.ledgers if each.ledger_id == ledger_id), None)

    def between(self, earlier: int, later: int) -> int:
        """Entries in the ledgers after one and before another."""
        return sum(each.entries for each in self.ledgers if earlier < each.ledger_id < later)


class PulsarAdmin:
    """Blocking; RetryableError QUEUE_UNREACHABLE, UserError QUEUE_ACCESS_DENIED."""

    def __init__(self, config: PulsarConfig) -> None:
        self._config = config
        self._url = config.admin_url.rstrip("/")
        self._where = f"Pulsar's REST API at {self._url}"
        self._client: httpx.Client | None = None

    def topic(self, pchannel: str) -> Topic:
        """Raises LogResetError when there is no such topic."""
        path = self._path(pchannel)
        stats = self._get(f"{path}/internalStats", pchannel)
        info = self._get(f"{path}/internal-info", pchannel)
        try:
            made = datetime.fromisoformat(info["creationDate"])
            ledgers = [Ledger(x["ledgerId"], x["entries"], x["size"]) for x in stats["ledgers"]]
            # Of the ledger being written the list does not tell yet.
            ledgers[-1] = Ledger(
                ledgers[-1].ledger_id,
                max(stats["currentLedgerEntries"], ledgers[-1].entries),
                max(stats["currentLedgerSize"], ledgers[-1].size),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise BugError(
                "QUEUE_PROTOCOL", f"{self._where} describes {pchannel} unlike Pulsar: {error!r}"
            ) from error
        return Topic(tuple(ledgers), str(round(made.timestamp() * 1000)).encode())

    def last(self, pchannel: str) -> Place | None:
        """The last message; None when there never was one, or its ledger was left for a new one
        and is gone.
        """
        last = self._get(f"{self._path(pchannel)}/lastMessageId", pchannel)
        if last["entryId"] < 0:
            return None
        return Place(last["ledgerId"], last["entryId"], max(last.get("batchIndex", -1), 0))

    def retention(self, pchannel: str) -> tuple[int, int]:
        """Minutes and megabytes for which acknowledged entries are kept; -1 = without end."""
        try:
            found = self._get(f"{self._path(pchannel)}/retention?applied=true", pchannel)
        except RetryableError:
            # Brokers that know no policies of topics answer 405 or 412.
            found = self._get(
                f"namespaces/{self._config.tenant}/{self._config.namespace}/retention"
            )
        found = found or {}
        return found.get("retentionTimeInMinutes", 0), found.get("retentionSizeInMB", 0)

    def topics(self) -> list[str]:
        """Names without tenant and namespace, of those that are no partitions' sums."""
        path = f"persistent/{self._config.tenant}/{self._config.namespace}"
        return [name.rpartition("/")[2] for name in self._get(path)]

    def subscriptions(self, pchannel: str) -> list[str]:
        """Raises LogResetError when there is no such topic."""
        return list(self._get(f"{self._path(pchannel)}/subscriptions", pchannel))

    def backlogs(self, pchannel: str) -> dict[str, dict[str, Any]]:
        """What Pulsar says of each subscription, among it `msgBacklog` and `backlogSize`."""
        asked = "getPreciseBacklog=true&subscriptionBacklogSize=true"
        told = self._get(f"{self._path(pchannel)}/stats?{asked}", pchannel)
        return dict(told.get("subscriptions", {}))

    def policy(self, name: str, pchannel: str = "") -> Any:
        """A policy as it applies to a topic, or that of the namespace; None = there is none."""
        if pchannel:
            with contextlib.suppress(RetryableError):
                return self._get(f"{self._path(pchannel)}/{name}?applied=true")
            # Brokers that know no policies of topics answer 405 or 412.
        return self._get(f"namespaces/{self._config.tenant}/{self._config.namespace}/{name}")

    def probe(self) -> None:
        """Whether it answers and knows the namespace."""
        self._get(f"persistent/{self._config.tenant}/{self._config.namespace}?mode=PERSISTENT")

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _path(self, pchannel: str) -> str:
        config = self._config
        return f"persistent/{config.tenant}/{config.namespace}/{quote(pchannel, safe='')}"

    def _get(self, path: str, pchannel: str = "") -> Any:
        url = httpx.URL(f"{self._url}/admin/v2/{path}")
        for _ in range(REDIRECTS + 1):
            answer = self._ask(url)
            if answer.status_code == 401 and renewed(self._config.token):
                answer = self._ask(url)
            if not answer.has_redirect_location:
                return self._content(answer, pchannel)
            target = url.join(answer.headers["Location"])
            if url.scheme == "https" and target.scheme != "https":
                raise UserError(
                    "QUEUE_REDIRECT_REFUSED",
                    f"{self._where} redirects to {target.scheme}://{target.host}, where the token "
                    "would travel in the clear; give the brokers an https address "
                    "(webServicePortTls)",
                    field="source.pulsar.admin_url",
                )
            url = target
        raise RetryableError("QUEUE_UNREACHABLE", f"{self._where} redirects without end")

    def _ask(self, url: httpx.URL) -> httpx.Response:
        headers = {"Accept": "application/json"}
        if self._config.token is not None:
            headers["Authorization"] = f"Bearer {self._config.token()}"
        try:
            if self._client is None:
                # Redirects are followed above: the client would drop the token.
                self._client = httpx.Client(
                    verify=tls_context(self._config),
                    timeout=REQUEST_SECONDS,
                    follow_redirects=False,
                    trust_env=False,
                )
            return self._client.get(url, headers=headers)
        except httpx.HTTPError as error:
            if tls_trouble(error):
                raise UserError(
                    "QUEUE_TLS_FAILED",
                    f"{self._where}: {error}; check the files of authorities and certificate",
                    field="source.pulsar.tls",
                ) from error
            said = str(error) or type(error).__name__
            raise RetryableError("QUEUE_UNREACHABLE", f"{self._where}: {said}") from error

    def _content(self, answer: httpx.Response, pchannel: str) -> Any:
        match answer.status_code:
            case 200:
                return answer.json() if answer.content else None
            case 204:
                return None
            case 401 | 403:
                raise UserError(
                    "QUEUE_ACCESS_DENIED",
                    f"{self._where} refuses {_reason(answer)}; a role that may consume in "
                    f"{self._config.tenant}/{self._config.namespace} is needed",
                    field=self._config.login_field or "source.pulsar.token",
                )
            case 404 if pchannel:
                raise missing(pchannel, f"Pulsar at {self._config.service_url}")
            case 404:
                raise UserError(
                    "QUEUE_NAMESPACE_MISSING",
                    f"{self._where} knows no namespace "
                    f"{self._config.tenant}/{self._config.namespace}: {_reason(answer)}",
                    field="source.pulsar.namespace",
                )
            case status:
                raise RetryableError(
                    "QUEUE_UNREACHABLE", f"{self._where} answers {status}: {_reason(answer)}"
                )


def missing(pchannel: str, where: str) -> LogResetError:
    return LogResetError(
        f"topic {pchannel} does not exist at {where}: it was deleted, or the task names "
        "another queue than the source writes to"
    )


def _reason(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["reason"])
    except (ValueError, KeyError, TypeError):
        return f"{answer.status_code} {answer.reason_phrase}"
