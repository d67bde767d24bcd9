"""Asks a replicator by a job: for one answer, or for one event after the other.

Law: a job ends with the call it was begun for, whichever way that one ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from milvus_cdc_controller.api_errors import ApiError
from milvus_cdc_controller.core import jobs

if TYPE_CHECKING:
    from milvus_cdc_controller.loop import ControlLoop


async def outcome(
    loop: ControlLoop,
    payload: jobs.JobPayload,
    labels: tuple[tuple[str, str], ...],
    *,
    seconds: float | None = None,
    late: jobs.JobFailed | None = None,
) -> jobs.JobResult:
    """The answer, a failure as well; `late` when there is none within `seconds`."""
    job_id = await loop.begin_job(payload, labels)
    try:
        async with asyncio.timeout(seconds):
            result, _ = await loop.next_of_job(job_id)
    except TimeoutError:
        assert late is not None
        return late
    finally:
        await asyncio.shield(loop.end_job(job_id))
    return result


async def single(
    loop: ControlLoop, payload: jobs.JobPayload, labels: tuple[tuple[str, str], ...]
) -> jobs.JobResult:
    """The answer. Raises ApiError when the job fails."""
    result = await outcome(loop, payload, labels)
    if isinstance(result, jobs.JobFailed):
        raise _failed(result)
    return result


async def events(
    loop: ControlLoop,
    payload: jobs.JobPayload,
    labels: tuple[tuple[str, str], ...],
    kind: type[jobs.VerifyEvent] | type[jobs.DiffEvent],
) -> AsyncGenerator[bytes, None]:
    """Bodies of its events, each of this kind. Close it to have the job stopped. Raises ApiError
    when the job fails.
    """
    job_id = await loop.begin_job(payload, labels)
    try:
        last = False
        while not last:
            result, last = await loop.next_of_job(job_id)
            if isinstance(result, jobs.JobFailed):
                raise _failed(result)
            if not isinstance(result, kind):
                raise ApiError("INTERNAL", "BAD_JOB_RESULT", "A job answered with something else.")
            yield result.body
    finally:
        await asyncio.shield(loop.end_job(job_id))


def _failed(result: jobs.JobFailed) -> ApiError:
    """What a caller is told of a job that failed."""
    kind = "UNAVAILABLE" if result.transient else "FAILED_PRECONDITION"
    return ApiError(kind, result.reason, result.message, field=result.field)
