"""The decode worker's half, scenario by scenario."""

from __future__ import annotations

from baton.handoff.credits import CreditLine
from baton.handoff.destination import (
    Activate,
    Cancel,
    CancelAcknowledged,
    DestinationTable,
    FirstTokenArrived,
    Free,
    GiveUp,
    OwnerAborted,
    Probe,
    Register,
    Reserve,
    SourceFailed,
    SourceLost,
    SourceReassured,
    WriteArrived,
)
from baton.handoff.moves import ReservationState


def table() -> DestinationTable:
    return DestinationTable(silence_s=10.0, resend_s=1.0)


def reserve(*sources: str, epoch: int = 1) -> Reserve:
    return Reserve(handoff_id="h1", epoch=epoch, sources=sources or ("p0",), lease_s=60.0)


def arrived(seq: int, total: int = 0, source: str = "p0", epoch: int = 1) -> WriteArrived:
    return WriteArrived(handoff_id="h1", epoch=epoch, source=source, seq=seq, total=total)


def test_all_numbers_up_to_the_total_are_needed_whatever_their_order():
    destination = table()
    assert destination.on_event(reserve(), 0.0) == [Register("h1", 1, "p0")]
    assert destination.on_event(arrived(2, total=3), 1.0) == []
    assert destination.on_event(arrived(0), 1.1) == []
    assert destination.on_event(arrived(0), 1.2) == []  # repeated
    assert destination.state("h1") is ReservationState.ARRIVING
    assert destination.on_event(arrived(1), 1.3) == [Activate("h1")]
    assert destination.is_idle


def test_every_source_rank_has_to_finish():
    destination = table()
    destination.on_event(reserve("p0", "p1"), 0.0)
    assert destination.on_event(arrived(0, total=1), 1.0) == []
    assert destination.on_event(arrived(0, total=1, source="p1"), 1.1) == [Activate("h1")]


def test_an_abort_frees_only_after_the_source_has_agreed():
    destination = table()
    destination.on_event(reserve(), 0.0)
    assert destination.on_event(OwnerAborted("h1"), 1.0) == [Cancel("h1", 1, "p0")]
    assert destination.state("h1") is ReservationState.QUARANTINED
    assert destination.on_time(2.0) == [Cancel("h1", 1, "p0")]  # said again
    acknowledged = CancelAcknowledged(handoff_id="h1", epoch=1, source="p0")
    assert destination.on_event(acknowledged, 2.1) == [Free("h1")]
    assert destination.on_event(acknowledged, 2.2) == []
    assert destination.num_dropped == 1


def test_an_abort_that_crosses_the_last_write_frees_too():
    destination = table()
    destination.on_event(reserve(), 0.0)
    destination.on_event(OwnerAborted("h1"), 1.0)
    assert destination.on_event(arrived(0, total=1), 1.1) == [Free("h1")]


def test_a_failed_source_is_terminal_for_it_but_not_for_the_other_rank():
    destination = table()
    destination.on_event(reserve("p0", "p1"), 0.0)
    failed = SourceFailed(handoff_id="h1", epoch=1, source="p0", reason="a write failed")
    assert destination.on_event(failed, 1.0) == [
        GiveUp("h1", "a write failed"),
        Cancel("h1", 1, "p0"),
        Cancel("h1", 1, "p1"),
    ]
    assert destination.on_event(CancelAcknowledged(handoff_id="h1", epoch=1, source="p1"), 1.1) == [
        Free("h1")
    ]


def test_silence_gives_up_but_never_frees():
    destination = table()
    destination.on_event(reserve(), 0.0)
    destination.on_event(SourceReassured(handoff_id="h1", epoch=1, source="p0"), 1.0)
    assert destination.on_time(10.9) == []
    assert destination.on_time(11.0) == [GiveUp("h1", "p0 fell silent"), Cancel("h1", 1, "p0"), Probe("p0")]
    assert not any(isinstance(action, Free) for action in destination.on_time(1e6))
    assert destination.on_event(SourceLost("p0"), 1e6) == [Free("h1")]


def test_a_source_that_goes_on_reassuring_is_bounded_by_the_lease():
    destination = table()
    destination.on_event(reserve(), 0.0)
    for second in range(1, 60):
        destination.on_event(SourceReassured(handoff_id="h1", epoch=1, source="p0"), float(second))
        assert destination.on_time(float(second)) == []
    [given_up, _] = destination.on_time(60.0)
    assert given_up == GiveUp("h1", "the reservation's lease ended")


def test_messages_of_another_epoch_are_dropped():
    destination = table()
    destination.on_event(reserve(epoch=2), 0.0)
    assert destination.on_event(arrived(0, total=1, epoch=1), 1.0) == []
    assert destination.state("h1") is ReservationState.RESERVED


def test_a_registration_that_got_no_answer_is_said_again():
    destination = table()
    destination.on_event(reserve(), 0.0)
    assert destination.on_time(1.0) == [Register("h1", 1, "p0")]
    destination.on_event(SourceReassured(handoff_id="h1", epoch=1, source="p0"), 1.1)
    assert destination.on_time(5.0) == []


def test_credits_are_given_in_the_order_of_asking():
    line = CreditLine(max_reserved_blocks=10)
    assert line.ask("a", 8)
    assert not line.ask("b", 8)
    assert not line.ask("c", 2), "would fit, but b was first"
    line.give_back("a")
    assert not line.ask("c", 2)
    assert line.ask("b", 8)
    assert line.ask("c", 2)
    assert line.num_reserved_blocks == 10


def test_one_that_is_larger_than_the_limit_is_granted_alone():
    line = CreditLine(max_reserved_blocks=4)
    assert line.ask("small", 1)
    assert not line.ask("large", 9)
    line.give_back("small")
    assert line.ask("large", 9)


def test_one_that_leaves_the_line_does_not_block_it():
    line = CreditLine(max_reserved_blocks=4)
    assert line.ask("a", 4)
    assert not line.ask("b", 4)
    assert not line.ask("c", 1)
    line.give_back("b")
    line.give_back("a")
    assert line.ask("c", 1)


def test_where_the_first_token_is_wanted_the_kv_alone_is_not_enough():
    """In either order; and what is given up owes no token any more, only its writes."""
    token = FirstTokenArrived(handoff_id="h1", epoch=1, source="p0", token_id=7)
    wanted = Reserve(handoff_id="h1", epoch=1, sources=("p0",), lease_s=60.0, wants_first_token=True)
    destination = table()
    destination.on_event(wanted, 0.0)
    assert destination.on_event(arrived(0, total=1), 1.0) == []
    assert destination.on_event(token, 1.1) == [Activate("h1", 7)]
    destination.on_event(wanted, 2.0)
    assert destination.on_event(token, 2.1) == []
    assert destination.on_event(arrived(0, total=1), 2.2) == [Activate("h1", 7)]
    destination.on_event(wanted, 3.0)
    destination.on_event(OwnerAborted("h1"), 3.1)
    assert destination.on_event(arrived(0, total=1), 3.2) == [Free("h1")]


def test_a_first_token_that_never_comes_ends_like_any_silence():
    destination = table()
    destination.on_event(
        Reserve(handoff_id="h1", epoch=1, sources=("p0",), lease_s=60.0, wants_first_token=True), 0.0
    )
    destination.on_event(arrived(0, total=1), 1.0)
    assert GiveUp("h1", "p0 fell silent") in destination.on_time(11.0)
