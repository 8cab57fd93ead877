"""Every way a request or a peer can fail, as one tree.

    ServingError
      Aborted              the client left, or somebody stopped the request for it
      RequestError         the caller should change something
        InvalidRequest         malformed or contradictory fields
        PromptTooLong          the fleet cannot hold prompt + output
        UnknownModel           no such model here
        UnsupportedFeature     understood, but not served
        DuplicateRequest       this request id is in flight
      CapacityError        try again later
        QueueFull              the coordinator's queue is at its bound
        NoWorkers              no prefill/decode pair is ready
        DeadlineUnreachable    the request's own deadline cannot be met, said before anything is computed
        DeadlineExceeded       its deadline passed while it waited for a worker
        Draining               this process takes no new work
      PeerError            another process misbehaved or left
        ProtocolMismatch       versions or layouts differ, or the frame is not ours
        RegistrationRefused    the worker may not join this fleet
        WorkerIdTaken          another live worker has this id; try again once it is gone
        WorkerLost             a worker died or stopped answering
        CannotResume           so did this one, and its request cannot go on elsewhere
        CoordinatorLost        the coordinator did; told by its ZeroMQ clients to their callers
        TransferFailed         KV did not arrive, or arrived too late to be trusted
        EngineFailed           the engine reported an error for this request
        PhaseTimeout           a phase made no progress before its deadline

The class answers two questions: whose fault (the branches) and is a retry sensible
(`retryable`). `code` is the stable string that clients and metrics see.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec


class ErrorReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An error as it crosses a process: enough to rebuild the exception and the HTTP answer."""

    code: str
    message: str
    param: str | None = None
    phase: str | None = None
    worker_id: str | None = None
    retry_after_s: float | None = None


class ServingError(Exception):
    """Base of all errors that reach a client. `str(error)` is a sentence with the numbers."""

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    usual_retry_after_s: ClassVar[float | None] = None
    """Where nothing better is known about when to come back."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        phase: str | None = None,
        worker_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.phase = phase
        self.worker_id = worker_id
        self.retry_after_s = self.usual_retry_after_s if retry_after_s is None else retry_after_s

    def report(self) -> ErrorReport:
        return ErrorReport(
            code=self.code,
            message=self.message,
            param=self.param,
            phase=self.phase,
            worker_id=self.worker_id,
            retry_after_s=self.retry_after_s,
        )


class Aborted(ServingError):
    code = "aborted"
    http_status = 499


class RequestError(ServingError):
    code = "bad_request"
    http_status = 400


class InvalidRequest(RequestError):
    code = "invalid_request"


class PromptTooLong(RequestError):
    code = "context_length_exceeded"


class UnknownModel(RequestError):
    code = "model_not_found"
    http_status = 404


class UnsupportedFeature(RequestError):
    code = "unsupported_feature"


class DuplicateRequest(RequestError):
    code = "duplicate_request_id"
    http_status = 409


class CapacityError(ServingError):
    code = "overloaded"
    http_status = 503
    retryable = True


class QueueFull(CapacityError):
    code = "queue_full"
    http_status = 429


class NoWorkers(CapacityError):
    code = "no_workers"
    usual_retry_after_s = 1.0
    """A worker that lost its coordinator is back within a second or two."""


class DeadlineUnreachable(CapacityError):
    code = "deadline_unreachable"
    http_status = 429


class DeadlineExceeded(CapacityError):
    code = "deadline_exceeded"
    http_status = 504
    retryable = False


class Draining(CapacityError):
    code = "draining"
    usual_retry_after_s = 5.0
    """Somebody else has to answer by then: this process will not."""


class PeerError(ServingError):
    code = "peer_error"
    http_status = 502
    retryable = True


class ProtocolMismatch(PeerError):
    code = "protocol_mismatch"
    retryable = False


class RegistrationRefused(PeerError):
    code = "registration_refused"
    retryable = False


class WorkerIdTaken(PeerError):
    code = "worker_id_taken"
    http_status = 409


class WorkerLost(PeerError):
    code = "worker_lost"


class CannotResume(PeerError):
    code = "cannot_resume"


class CoordinatorLost(PeerError):
    code = "coordinator_lost"


class TransferFailed(PeerError):
    code = "kv_transfer_failed"


class EngineFailed(PeerError):
    code = "engine_failed"
    http_status = 500


class PhaseTimeout(PeerError):
    code = "phase_timeout"
    http_status = 504


def _leaves(cls: type[ServingError]) -> list[type[ServingError]]:
    return [cls, *(leaf for sub in cls.__subclasses__() for leaf in _leaves(sub))]


ERROR_TYPES: dict[str, type[ServingError]] = {cls.code: cls for cls in _leaves(ServingError)}


def error_from_report(report: ErrorReport) -> ServingError:
    """The exception a report describes; an unknown code (a newer peer's) becomes ServingError."""
    cls = ERROR_TYPES.get(report.code, ServingError)
    return cls(
        report.message,
        param=report.param,
        phase=report.phase,
        worker_id=report.worker_id,
        retry_after_s=report.retry_after_s,
    )
