"""What a Milvus answer means as one of our errors: gRPC codes, `merr` codes, the older ErrorCode.

Laws: a write that may have been executed is UnknownOutcomeError, and only what the server refuses
before it looks at the rows (or what never left this process) is said not to have happened. Codes
are those of milvus `pkg/util/merr/errors.go`; 2.3 still answers many cases with 65535 and a text,
which is then looked at; 2.2 knows only `error_code`.
"""

from __future__ import annotations

from typing import Any

import grpc

from milvus_cdc.errors import CdcError, RetryableError, UnknownOutcomeError, UserError

COLLECTION_NOT_FOUND = 100
COLLECTION_LIMIT = 102
NOT_LOADED = (101, 103, 201, 202)
PARTITION_NOT_FOUND = 200
INDEX_NOT_FOUND = 700
DATABASE_NOT_FOUND = 800
DATABASE_LIMIT = 801
UNEXPECTED = 65535

_NOT_READY = (1, 2)
_QUOTA = (3, 7, 9)
_RATE = (4, 8)
_MALFORMED = (105, 802, 1100, 1101, 1700, 1701)
_NOT_AUTHENTICATED = 1400
_NOT_PERMITTED = 1401
_DENIED_BY_MIRRORING = (1303, 1900)

# common.ErrorCode of Milvus 2.2, where `code` is always 0.
_OLD_CODES = {
    1: UNEXPECTED,
    3: _NOT_PERMITTED,
    4: COLLECTION_NOT_FOUND,
    5: 1100,
    25: INDEX_NOT_FOUND,
    26: COLLECTION_NOT_FOUND,
    45: 2,
    47: _QUOTA[2],
    48: _QUOTA[2],
    49: _RATE[1],
    53: _QUOTA[0],
    54: _QUOTA[1],
    55: _RATE[1],
    56: _NOT_READY[0],
    57: _NOT_READY[0],
}


class MilvusStatusError(Exception):
    """A status that is not success, before anybody has said what it means for them."""

    def __init__(self, method: str, code: int, reason: str) -> None:
        super().__init__(f"{method}: {reason} (code {code})")
        self.method = method
        self.code = code
        self.reason = reason

    def says(self, *texts: str) -> bool:
        lower = self.reason.lower()
        return any(text in lower for text in texts)

    @property
    def not_found(self) -> bool:
        """The collection does not exist, or its database."""
        return self.code in (COLLECTION_NOT_FOUND, DATABASE_NOT_FOUND) or (
            self.says("can't find collection", "collection not found")
        )


def check(method: str, status: Any) -> None:
    """Raises MilvusStatusError unless the status is success."""
    if status.code or status.error_code:
        code = status.code or _OLD_CODES.get(status.error_code, UNEXPECTED)
        raise MilvusStatusError(method, code, status.reason or str(status.error_code))


def too_large(error: grpc.aio.AioRpcError) -> bool:
    """The server refused the message for its size: nothing of it was executed."""
    return (
        error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        and "larger than max" in (error.details() or "").lower()
    )


def from_rpc(
    role: str, uri: str, method: str, error: grpc.aio.AioRpcError, *, writes: bool
) -> CdcError:
    """A failed call as an error; `role` (SINK, MILVUS) begins its reason."""
    details = error.details() or ""
    text = f"{uri}: {method}: {details}"
    match error.code():
        case grpc.StatusCode.UNAUTHENTICATED:
            return _unauthenticated(role, text)
        case grpc.StatusCode.PERMISSION_DENIED:
            return _denied(role, text)
        case grpc.StatusCode.UNIMPLEMENTED:
            return UserError(
                f"{role}_TOO_OLD", f"{text}; this Milvus does not know {method}: use 2.3 or later"
            )
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            if too_large(error):
                return UserError(
                    f"{role}_REFUSED",
                    f"{text}; a single row exceeds what the server takes: raise "
                    "proxy.grpc.serverMaxRecvSize there",
                )
            return RetryableError(f"{role}_RATE_LIMITED", text)
        case grpc.StatusCode.UNAVAILABLE:
            # Said by gRPC when no connection could be picked: the call never left this process.
            never_sent = details.startswith(
                ("failed to connect to all addresses", "DNS resolution failed")
            )
            kind = UnknownOutcomeError if writes and not never_sent else RetryableError
            return kind(f"{role}_UNAVAILABLE", f"{text}; is it running and reachable from here?")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            kind = UnknownOutcomeError if writes else RetryableError
            return kind(f"{role}_TIMEOUT", f"{text}; no answer in time")
        case code:
            kind = UnknownOutcomeError if writes else RetryableError
            return kind(f"{role}_ERROR", f"{text} ({code.name})")


def from_status(role: str, uri: str, error: MilvusStatusError, *, writes: bool) -> CdcError:
    """A status as an error; what is not known to be certain is worth another try."""
    text = f"{uri}: {error}"
    code = error.code
    if code == _NOT_AUTHENTICATED:
        return _unauthenticated(role, text)
    if code == _NOT_PERMITTED or error.says("permission denied", "permissiondenied"):
        return _denied(role, text)
    if code in _DENIED_BY_MIRRORING:
        return UserError(
            f"{role}_READ_ONLY",
            f"{text}; it takes replicated messages only (common.ttMsgEnabled is false)",
        )
    if error.not_found:
        return UserError(
            f"{role}_COLLECTION_MISSING", f"{text}; it was dropped or renamed there: resync"
        )
    if code == PARTITION_NOT_FOUND or error.says("partition not found"):
        return UserError(
            f"{role}_PARTITION_MISSING", f"{text}; it was dropped there by somebody else: resync"
        )
    if code in NOT_LOADED or error.says("not loaded"):
        return UserError(f"{role}_NOT_LOADED", f"{text}; load the collection there")
    if code in (COLLECTION_LIMIT, DATABASE_LIMIT) or error.says(
        "exceeded the limit number", "database number", "max collection number"
    ):
        return UserError(
            f"{role}_LIMIT", f"{text}; drop what is not needed there or raise the limit, then retry"
        )
    if code in _QUOTA or error.says("quota exceeded", "quota exhausted"):
        return RetryableError(
            f"{role}_QUOTA", f"{text}; writes go on when the quota allows them again"
        )
    if code in _RATE or error.says("rate limit", "ratelimiter", "rejected by grpc"):
        return RetryableError(f"{role}_RATE_LIMITED", text)
    if code in _NOT_READY or error.says("service not ready"):
        return RetryableError(f"{role}_UNAVAILABLE", text)
    if code in _MALFORMED:
        return UserError(f"{role}_REFUSED", text)
    return (UnknownOutcomeError if writes else RetryableError)(f"{role}_ERROR", text)


def _unauthenticated(role: str, text: str) -> UserError:
    return UserError(
        f"{role}_UNAUTHENTICATED",
        f"{text}; give a valid token (`user:password` or an API key) by reference",
    )


def _denied(role: str, text: str) -> UserError:
    return UserError(
        f"{role}_PERMISSION_DENIED", f"{text}; grant the token's user this privilege, then retry"
    )
