"""Whether the coordinator knows this worker, and when to ask it again. No I/O.

    UNREGISTERED ──accepted──> REGISTERED      asks every REGISTER_INTERVAL_S until answered
         ^                         │
         └── register again, lost ─┘           by itself, with the same boot id
    UNREGISTERED ──refused───> REFUSED         final; "id taken" only after TAKEN_ID_PATIENCE_S

A worker that crashed and came back under its old id finds the id taken until the coordinator has
noticed the crash, so that one refusal is waited out.
"""

from __future__ import annotations

from enum import Enum

from baton.contract.errors import ErrorReport, WorkerIdTaken

REGISTER_INTERVAL_S = 1.0

TAKEN_ID_PATIENCE_S = 20.0
"""Twice the silence after which a coordinator gives a worker up."""


class RegistrationState(Enum):
    UNREGISTERED = "unregistered"
    REGISTERED = "registered"
    REFUSED = "refused"


class Registration:
    def __init__(self) -> None:
        self.state = RegistrationState.UNREGISTERED
        self.refusal: ErrorReport | None = None
        self.num_attempts = 0
        """Since the worker was last registered."""
        self._next_attempt_s: float | None = None
        self._first_taken_s: float | None = None

    @property
    def is_registered(self) -> bool:
        return self.state is RegistrationState.REGISTERED

    def seconds_to_attempt(self, now_s: float) -> float:
        """0: ask now."""
        assert self.state is RegistrationState.UNREGISTERED
        return 0.0 if self._next_attempt_s is None else max(0.0, self._next_attempt_s - now_s)

    def attempted(self, now_s: float) -> None:
        self.num_attempts += 1
        self._next_attempt_s = now_s + REGISTER_INTERVAL_S

    def accepted(self) -> None:
        self.state = RegistrationState.REGISTERED
        self.num_attempts = 0
        self._first_taken_s = None

    def refused(self, error: ErrorReport, now_s: float) -> None:
        if self._first_taken_s is None:
            self._first_taken_s = now_s
        is_patient = now_s - self._first_taken_s < TAKEN_ID_PATIENCE_S
        if error.code != WorkerIdTaken.code or not is_patient:
            self.state = RegistrationState.REFUSED
            self.refusal = error

    def lost(self) -> bool:
        """The coordinator has forgotten us, or cannot be reached. False: we knew that already."""
        if self.state is not RegistrationState.REGISTERED:
            return False
        self.state = RegistrationState.UNREGISTERED
        self._next_attempt_s = None
        return True
