"""Errors by what may be done about them; adapters raise these and nothing else across their seam.

Law 10: every error has a class. The class decides whether work is retried, a user is
asked, or a bug is reported; the reason is an upper-case identifier that programs match on, the
message tells a person what to do.
"""

from __future__ import annotations


class CdcError(Exception):
    """An error with a reason for programs and a message for people. Raise one of the subclasses."""

    error_class = ""
    """As metrics call it."""

    def __init__(self, reason: str, message: str, *, field: str = "") -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message
        self.field = field
        """Path of the task field to blame, for example `sink.milvus.uri`; empty when none is."""


class RetryableError(CdcError):
    """Transient: trying the same again later may succeed. Shown as RETRYING while it lasts."""

    error_class = "retryable"


class UnknownOutcomeError(RetryableError):
    """A write may or may not have happened (deadline, broken connection): repeat it as an
    upsert.
    """


class UserError(CdcError):
    """Only a person can mend it (credentials, schema, missing log): FAILED, no retry."""

    error_class = "user"


class RowRefusedError(UserError):
    """The sink will never take certain rows, and nothing else is wrong with it. Nothing of the
    batch has taken effect, unless it is harmless to repeat it.
    """

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        rows: tuple[tuple[int, int], ...] = (),
        key: int | str | None = None,
        field: str = "",
    ) -> None:
        super().__init__(reason, message, field=field)
        self.rows = rows
        """(index in `Batch.changes`, row in there), where the sink says which they are."""
        self.key = key
        """Or the newest row with this primary key."""


class BugError(CdcError):
    """An assumption of ours does not hold (undecodable message, broken invariant): FAILED,
    loudly.
    """

    error_class = "bug"


class LogTruncatedError(UserError):
    """The log no longer holds the position asked for."""

    def __init__(self, message: str) -> None:
        super().__init__("LOG_TRUNCATED", message)


class LogResetError(UserError):
    """The topic is not the one the position was taken from (deleted and made again, or shorter)."""

    def __init__(self, message: str) -> None:
        super().__init__("LOG_RESET", message)
