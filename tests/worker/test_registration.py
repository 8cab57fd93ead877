"""When a worker asks to be registered, and when it gives up. Pure."""

from baton.contract.errors import ProtocolMismatch, WorkerIdTaken
from baton.worker.registration import (
    REGISTER_INTERVAL_S,
    TAKEN_ID_PATIENCE_S,
    Registration,
    RegistrationState,
)

TAKEN = WorkerIdTaken("worker id w1 is in use").report()
MISMATCH = ProtocolMismatch("worker speaks 2, this coordinator speaks 1").report()


def test_asks_at_once_and_then_every_interval():
    registration = Registration()
    assert registration.seconds_to_attempt(now_s=5.0) == 0
    registration.attempted(now_s=5.0)
    assert registration.seconds_to_attempt(now_s=5.25) == REGISTER_INTERVAL_S - 0.25
    assert registration.seconds_to_attempt(now_s=9.0) == 0


def test_a_forgetful_coordinator_is_asked_again_at_once():
    registration = Registration()
    registration.attempted(now_s=0.0)
    registration.accepted()
    assert registration.is_registered
    assert registration.lost()
    assert not registration.lost()  # the second RegisterAgain of a burst changes nothing
    assert registration.seconds_to_attempt(now_s=0.1) == 0


def test_a_mismatch_is_final():
    registration = Registration()
    registration.refused(MISMATCH, now_s=0.0)
    assert registration.state is RegistrationState.REFUSED
    assert registration.refusal == MISMATCH


def test_a_taken_id_is_waited_out_for_a_while():
    """The predecessor crashed and the coordinator has not noticed yet."""
    registration = Registration()
    registration.refused(TAKEN, now_s=100.0)
    registration.refused(TAKEN, now_s=100.0 + TAKEN_ID_PATIENCE_S - 1)
    assert registration.refusal is None
    registration.refused(TAKEN, now_s=100.0 + TAKEN_ID_PATIENCE_S)
    assert registration.state is RegistrationState.REFUSED


def test_patience_starts_anew_after_success():
    registration = Registration()
    registration.refused(TAKEN, now_s=0.0)
    registration.accepted()
    registration.lost()
    registration.refused(TAKEN, now_s=1_000.0)
    assert registration.state is RegistrationState.UNREGISTERED
