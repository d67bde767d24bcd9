"""What a Milvus answer means as one of our errors: gRPC codes, `merr` codes, the older ErrorCode.

Laws: a write that may have been executed is UnknownOutcomeError; only what the server refuses
before it looks at the rows, or what never left this process, is said not to have happened. What is
known to need a person is UserError; everything else is worth another try, visibly: a hiccup must
not fail a task, and the server's own text says what it is about.

Codes are those of milvus `pkg/util/merr/errors.go`, 2.3 to 2.5. 2.3 answers many cases with 65535
and a text, which is then looked at (seen on 2.3.5); 2.2 knows only `error_code`
(`common.ErrorCode`).
"""

from __future__ import annotations

import re
from typing import Any

import grpc

from milvus_cdc.errors import CdcError, RetryableError, UnknownOutcomeError, UserError

COLLECTION_NOT_FOUND = 100
PARTITION_NOT_FOUND = 200
INDEX_NOT_FOUND = 700
DATABASE_NOT_FOUND = 800
UNEXPECTED = 65535

_NOT_READY = frozenset({1, 2})
_QUOTA = frozenset({3, 7, 9, 11})
"""Memory and disk limit, writing denied by quota, ticks too late: refused at the door."""
_RATE = frozenset({4, 8})
_UNIMPLEMENTED = 10
_LIMITS = frozenset({102, 250, 801})
_NOT_LOADED = frozenset({101, 103, 201, 202})
_STANDBY = frozenset({108, 1303, 1900})
_MALFORMED = frozenset({105, 107, 109, 701, 702, 802, 1100, 1101, 1102, 1700, 1701, 1804})
_NOT_AUTHENTICATED = frozenset({1400, 1800})
_NOT_PERMITTED = 1401
_NO_DATABASE = re.compile(r"\bdatabase(?:[:\s]\s*\S+)? (?:not found|does not exist)", re.IGNORECASE)
_CODE_MASK = 0xFFFF
"""Early 2.3 set flags above it."""

_OLD_CODES = {
    3: _NOT_PERMITTED,
    4: COLLECTION_NOT_FOUND,
    5: 1100,
    25: INDEX_NOT_FOUND,
    28: COLLECTION_NOT_FOUND,
    48: 9,
    49: 8,
    53: 3,
    54: 7,
    55: 11,
    56: 1,
    57: 1,
}


class Refusal(Exception):
    """A status that is not success, before anybody has said what it means for them."""

    def __init__(self, method: str, code: int, text: str, *, retriable: bool = False) -> None:
        super().__init__(f"{method}: {text} (code {code})")
        self.method = method
        self.code = code
        self.text = text
        self.retriable = retriable

    def says(self, *texts: str) -> bool:
        lower = self.text.lower()
        return any(text in lower for text in texts)

    @property
    def not_found(self) -> bool:
        """The collection does not exist, or its database."""
        return self.code in (COLLECTION_NOT_FOUND, DATABASE_NOT_FOUND) or (
            self.code == UNEXPECTED
            and self.says("can't find collection", "collection not found", "database not found")
        )

    @property
    def no_database(self) -> bool:
        """2.2 and early 2.3 say 65535 "database:NAME not found" (2.2 in the words of the call it
        failed in), later versions 800, milvus-lite 3.2 1 or 6 "database 'NAME' does not exist".
        """
        return self.code == DATABASE_NOT_FOUND or bool(_NO_DATABASE.search(self.text))


class MilvusStatusError(UserError):
    """Milvus refused for a reason that only a person can mend; `code` is merr's."""

    def __init__(self, reason: str, message: str, code: int) -> None:
        super().__init__(reason, message)
        self.code = code


def check(method: str, status: Any) -> None:
    """Raises Refusal unless the status is success."""
    if status.code or status.error_code:
        code = status.code & _CODE_MASK or _OLD_CODES.get(status.error_code, UNEXPECTED)
        text = status.reason or f"error_code {status.error_code}"
        raise Refusal(method, code, text, retriable=status.retriable)


def too_large(error: grpc.aio.AioRpcError) -> bool:
    """A message exceeded a size limit; of a write the server then executed nothing."""
    return (
        error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        and "larger than max" in (error.details() or "").lower()
    )


def from_rpc(
    who: str, uri: str, method: str, error: grpc.aio.AioRpcError, *, writes: bool
) -> CdcError:
    """A failed call as an error; `who` (SINK, SOURCE) begins its reason."""
    code, details = error.code(), error.details() or ""
    text = f"{method} at {uri}: {details} ({code.name})"
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return _unauthenticated(who, text)
    if code is grpc.StatusCode.PERMISSION_DENIED:
        return _denied(who, text)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return UserError(
            f"{who}_UNSUPPORTED",
            f"{text}; this Milvus does not know {method}: is it 2.3 or later?",
        )
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        if too_large(error):
            return UserError(f"{who}_MESSAGE_TOO_LARGE", text)
        return RetryableError(f"{who}_RATE_LIMITED", text)
    if code is grpc.StatusCode.UNAVAILABLE and _never_sent(details):
        return RetryableError(
            f"{who}_UNAVAILABLE", f"{text}; is it running and reachable from here?"
        )
    kind = UnknownOutcomeError if writes else RetryableError
    if code is grpc.StatusCode.UNAVAILABLE:
        return kind(f"{who}_UNAVAILABLE", f"{text}; the connection broke")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return kind(f"{who}_TIMEOUT", f"{text}; no answer in time")
    return kind(f"{who}_ERROR", text)


def from_refusal(who: str, uri: str, refusal: Refusal, *, writes: bool) -> CdcError:
    """A refusal as an error. Raises nothing."""
    code = refusal.code
    text = f"{uri}: {refusal}"

    def user(reason: str, what_to_do: str) -> UserError:
        return MilvusStatusError(f"{who}_{reason}", f"{text}; {what_to_do}", code)

    if code in _NOT_AUTHENTICATED or refusal.says("auth check failure"):
        return _unauthenticated(who, text)
    if code == _NOT_PERMITTED or refusal.says("permission deny", "permission denied"):
        return _denied(who, text)
    if code in _RATE or refusal.says("rate limit", "ratelimiter"):
        return RetryableError(f"{who}_RATE_LIMITED", text)
    if code in _QUOTA or refusal.says("quota exceeded", "quota exhausted"):
        return RetryableError(
            f"{who}_QUOTA", f"{text}; goes on by itself when the quota allows it again"
        )
    if code in _STANDBY:
        return user("READ_ONLY", "it takes replicated messages only (a standby of another cluster)")
    if refusal.not_found:
        return user("COLLECTION_MISSING", "it was dropped or renamed there")
    if code == PARTITION_NOT_FOUND:
        return user("PARTITION_MISSING", "it was dropped there; `milvus-cdc task resync` mends it")
    if code in _NOT_LOADED or refusal.says("not loaded"):
        return user("NOT_LOADED", "load the collection there")
    if code in _LIMITS or refusal.says("max collection number", "maximum partition"):
        return user("LIMIT", "drop what is not needed there or raise its limit")
    if code == _UNIMPLEMENTED:
        return user("UNSUPPORTED", "this Milvus cannot do it")
    if code in _MALFORMED or refusal.says("exceeds the limit size"):
        return user("REFUSED", "it will not accept the same again")
    kind = UnknownOutcomeError if writes else RetryableError
    if code in _NOT_READY or refusal.says("service not ready"):
        return kind(f"{who}_NOT_READY", text)
    return kind(f"{who}_ERROR", text)


def _never_sent(details: str) -> bool:
    """gRPC fails a call at once when it has no connection: the request cannot have arrived."""
    return details.lower().startswith(
        ("failed to connect to all addresses", "dns resolution failed", "empty address list")
    )


def _unauthenticated(who: str, text: str) -> UserError:
    return UserError(
        f"{who}_UNAUTHENTICATED",
        f"{text}; check the token (user:password or key)",
        field=f"{who.lower()}.milvus.token",
    )


def _denied(who: str, text: str) -> UserError:
    return UserError(f"{who}_PERMISSION_DENIED", f"{text}; grant the token's user this privilege")
