"""The prefill worker's half, scenario by scenario."""

from __future__ import annotations

from typing import Any

import pytest

from baton.handoff.moves import HOLD_MOVES, HoldState, IllegalMove, moved
from baton.handoff.source import (
    AcknowledgeCancel,
    BlocksComputed,
    CancelReceived,
    DestinationLost,
    DestinationRegistered,
    Fail,
    GiveFirstToken,
    PrefillEnded,
    PrefillPreempted,
    Reassure,
    Release,
    ReleaseWanted,
    SourceTable,
    StreamKey,
    Write,
    WriteEnded,
)

KEY = StreamKey("h1", "d0", 1)


def table(**options: Any) -> SourceTable:
    given = {
        "num_layers": 2,
        "bytes_per_block_layer": 10,
        "max_outstanding_bytes": 10_000,
        "reassure_every_s": 5.0,
    }
    return SourceTable(**(given | options))


def computed(num_ready: int, num_total: int = 4, layer: int | None = None) -> BlocksComputed:
    return BlocksComputed(
        handoff_id="h1",
        block_ids=[10, 11, 12, 13][: num_ready + 1],
        num_ready=num_ready,
        num_total=num_total,
        layer=layer,
    )


def registered(
    key: StreamKey = KEY,
    *,
    num_skipped: int = 0,
    num_destinations: int = 1,
    wants_first_token: bool = False,
) -> DestinationRegistered:
    return DestinationRegistered(
        key=key,
        num_destinations=num_destinations,
        block_ids=[20, 21, 22, 23][num_skipped:],
        num_skipped=num_skipped,
        ttl_s=30.0,
        wants_first_token=wants_first_token,
    )


def writes(actions: list[Any]) -> list[tuple[int, int, list[int], list[int]]]:
    return [
        (a.seq, a.total, list(a.source_blocks), list(a.destination_blocks))
        for a in actions
        if isinstance(a, Write)
    ]


def test_each_chunk_is_written_when_it_is_computed_and_the_last_write_carries_the_number_of_all():
    source = table()
    assert source.on_event(registered(), 0.0) == [Reassure(KEY)]
    assert writes(source.on_event(computed(2), 1.0)) == [(0, 0, [10, 11], [20, 21])]
    assert writes(source.on_event(computed(4), 2.0)) == [(1, 2, [12, 13], [22, 23])]
    assert source.on_event(PrefillEnded(handoff_id="h1", lease_s=30.0), 2.1) == []
    assert source.on_event(WriteEnded(KEY, 1, True), 2.2) == []
    assert source.on_event(WriteEnded(KEY, 0, True), 2.3) == [Release("h1")]
    assert source.is_idle


def test_a_destination_that_registers_late_gets_everything_at_once():
    source = table()
    assert source.on_event(computed(4), 1.0) == []
    source.on_event(PrefillEnded(handoff_id="h1", lease_s=30.0), 1.1)
    assert source.held_bytes() == 80  # 4 blocks x 2 layers x 10
    assert writes(source.on_event(registered(), 9.0)) == [(0, 1, [10, 11, 12, 13], [20, 21, 22, 23])]
    assert source.on_event(WriteEnded(KEY, 0, True), 9.1) == [Release("h1")]


def test_what_the_destination_has_is_not_written():
    source = table()
    source.on_event(registered(num_skipped=3), 0.0)
    assert writes(source.on_event(computed(2), 1.0)) == []
    assert writes(source.on_event(computed(4), 2.0)) == [(0, 1, [13], [23])]


def test_a_destination_that_has_everything_is_served_without_a_write():
    source = table()
    source.on_event(registered(num_skipped=4), 0.0)
    assert source.on_event(computed(4), 1.0) == []
    assert source.on_event(PrefillEnded(handoff_id="h1", lease_s=30.0), 1.1) == [Release("h1")]


def test_layer_by_layer():
    source = table()
    source.on_event(registered(), 0.0)
    [first] = source.on_event(computed(4, layer=0), 1.0)
    [second] = source.on_event(computed(4, layer=1), 1.5)
    assert isinstance(first, Write) and isinstance(second, Write)
    assert (first.layers, first.total) == (range(1), 0)
    assert (second.layers, second.total) == (range(1, 2), 2)


def test_what_exceeds_the_bound_follows_when_something_has_landed():
    source = table(max_outstanding_bytes=40)  # 2 blocks of 2 layers
    source.on_event(registered(), 0.0)
    assert writes(source.on_event(computed(4), 1.0)) == [(0, 0, [10, 11], [20, 21])]
    assert writes(source.on_event(WriteEnded(KEY, 0, True), 1.1)) == [(1, 2, [12, 13], [22, 23])]


def test_a_cancel_is_acknowledged_only_when_nothing_is_in_flight():
    source = table()
    source.on_event(registered(), 0.0)
    source.on_event(computed(2), 1.0)
    assert source.on_event(CancelReceived(KEY), 1.1) == []
    assert source.on_event(computed(4), 1.2) == []  # nothing more is written
    assert source.on_event(WriteEnded(KEY, 0, True), 1.3) == [AcknowledgeCancel(KEY)]
    assert source.on_event(CancelReceived(KEY), 1.4) == [AcknowledgeCancel(KEY)]  # said again: same answer


def test_a_registration_that_comes_after_its_cancel_starts_nothing():
    source = table()
    assert source.on_event(CancelReceived(KEY), 0.0) == [AcknowledgeCancel(KEY)]
    [answer] = source.on_event(registered(), 0.1)
    assert isinstance(answer, Fail)
    assert source.on_event(computed(4), 1.0) == []


def test_an_aborted_prefill_releases_after_its_writes_and_tells_the_destination():
    source = table()
    source.on_event(registered(), 0.0)
    source.on_event(computed(2), 1.0)
    assert source.on_event(PrefillEnded(handoff_id="h1", lease_s=None), 1.1) == []
    assert source.on_event(WriteEnded(KEY, 0, True), 1.2) == [
        Fail(KEY, "the prefill was aborted"),
        Release("h1"),
    ]


def test_a_prefill_whose_answer_is_over_still_completes_what_is_on_its_way():
    source = table()
    source.on_event(registered(), 0.0)
    source.on_event(computed(4), 1.0)
    assert source.on_event(PrefillEnded(handoff_id="h1", lease_s=None), 1.1) == []
    assert source.on_event(WriteEnded(KEY, 0, True), 1.2) == [Release("h1")]


def test_a_failed_write_fails_the_stream_and_keeps_the_hold_for_another_destination():
    source = table()
    source.on_event(registered(), 0.0)
    source.on_event(computed(4), 1.0)
    source.on_event(PrefillEnded(handoff_id="h1", lease_s=30.0), 1.1)
    assert source.on_event(WriteEnded(KEY, 0, False), 1.2) == [Fail(KEY, "a write failed")]
    other = StreamKey("h1", "d7", 1)
    assert writes(source.on_event(registered(other), 2.0)) == [(0, 1, [10, 11, 12, 13], [20, 21, 22, 23])]


def test_a_lost_destination_is_not_spoken_to():
    source = table()
    source.on_event(registered(), 0.0)
    source.on_event(computed(2), 1.0)
    assert source.on_event(DestinationLost("d0"), 1.1) == []
    assert source.on_event(WriteEnded(KEY, 0, False), 1.2) == []
    assert source.num_in_flight("h1") == 0


def test_the_lease_counts_from_the_last_progress_and_waits_for_writes():
    source = table(max_outstanding_bytes=40)
    source.on_event(computed(4), 0.0)
    source.on_event(PrefillEnded(handoff_id="h1", lease_s=10.0), 0.0)
    source.on_event(registered(), 9.0)
    assert source.on_event(WriteEnded(KEY, 0, True), 9.5) != []  # the second write starts; lease to 19.5
    assert [a for a in source.on_time(19.0) if not isinstance(a, Reassure)] == []
    assert [a for a in source.on_time(19.5) if isinstance(a, Release)] == []  # one is in flight
    assert source.on_event(WriteEnded(KEY, 1, True), 19.6) == [Release("h1")]


def test_a_hold_nobody_comes_for_ends_with_its_lease():
    source = table()
    source.on_event(computed(4), 0.0)
    source.on_event(PrefillEnded(handoff_id="h1", lease_s=10.0), 0.0)
    assert source.on_time(9.9) == []
    assert source.on_time(10.0) == [Release("h1")]


def test_a_registration_nobody_computes_for_ends_too():
    source = table()
    source.on_event(registered(), 0.0)
    assert Fail(KEY, "no prefill came for this registration") in source.on_time(30.0)


def test_preempted_blocks_are_not_written_and_the_cursor_goes_on_with_the_new_ones():
    source = table()
    source.on_event(registered(), 0.0)
    source.on_event(computed(2), 1.0)
    source.on_event(PrefillPreempted(handoff_id="h1"), 1.1)
    assert source.num_in_flight("h1") == 1  # the shell waits for it before the blocks are used again
    source.on_event(WriteEnded(KEY, 0, True), 1.2)
    again = BlocksComputed(handoff_id="h1", block_ids=[90, 91, 92, 93], num_ready=4, num_total=4)
    assert writes(source.on_event(again, 2.0)) == [(1, 2, [92, 93], [22, 23])]


def test_two_destination_ranks_of_one_source_rank():
    source = table()
    other = StreamKey("h1", "d1", 1)
    source.on_event(registered(num_destinations=2), 0.0)
    source.on_event(registered(other, num_destinations=2), 0.0)
    source.on_event(computed(4), 1.0)
    source.on_event(PrefillEnded(handoff_id="h1", lease_s=10.0), 1.1)
    assert source.on_event(WriteEnded(KEY, 0, True), 1.2) == []
    assert source.on_event(WriteEnded(other, 0, True), 1.3) == [Release("h1")]


@pytest.mark.parametrize("is_first_before_the_prefill", [True, False])
def test_a_rank_that_registers_after_the_other_was_served_is_served_too(is_first_before_the_prefill: bool):
    """The blocks are kept for as many ranks as the first one said there are, also where it said so early."""
    source = table()
    other = StreamKey("h1", "d1", 1)
    if is_first_before_the_prefill:
        source.on_event(registered(num_destinations=2), 0.0)
    source.on_event(computed(4), 1.0)
    if not is_first_before_the_prefill:
        source.on_event(registered(num_destinations=2), 1.1)
    source.on_event(PrefillEnded(handoff_id="h1", lease_s=30.0), 1.2)
    assert source.on_event(WriteEnded(KEY, 0, True), 1.3) == []
    late = source.on_event(registered(other, num_destinations=2), 1.4)
    assert writes(late) == [(0, 1, [10, 11, 12, 13], [20, 21, 22, 23])]
    assert source.on_event(WriteEnded(other, 0, True), 1.5) == [Release("h1")]


def test_a_later_registration_replaces_an_earlier_one_of_the_same_rank():
    source = table()
    source.on_event(computed(2), 0.0)
    source.on_event(registered(), 1.0)
    later = StreamKey("h1", "d0", 2)
    assert writes(source.on_event(registered(later), 2.0)) == [(0, 0, [10, 11], [20, 21])]
    [failed] = source.on_event(WriteEnded(KEY, 0, True), 2.1)
    assert failed == Fail(KEY, "a later registration replaced this one")


def test_letting_go_early():
    source = table()
    source.on_event(computed(4), 0.0)
    source.on_event(PrefillEnded(handoff_id="h1", lease_s=10.0), 0.0)
    assert source.on_event(ReleaseWanted(handoff_id="h1"), 1.0) == [Release("h1")]
    assert source.on_event(ReleaseWanted(handoff_id="h1"), 1.1) == []
    assert source.num_dropped == 1


def test_an_illegal_move_raises():
    with pytest.raises(IllegalMove, match="held to filling"):
        moved(HOLD_MOVES, HoldState.HELD, HoldState.FILLING)


def test_a_registration_after_the_release_is_refused_at_once():
    source = table()
    source.on_event(computed(4), 0.0)
    source.on_event(PrefillEnded(handoff_id="h1", lease_s=10.0), 0.0)
    source.on_time(10.0)
    assert source.on_event(registered(), 10.1) == [Fail(KEY, "the source has released these blocks")]
    assert source.is_idle


def test_a_stream_that_owes_the_first_token_outlives_its_last_write():
    """
    1. all is written and landed before the prompt's last position is sampled: nothing is released yet
    2. the prefill ends with a token: it is given, and now the destination is served
    """
    source = table()
    source.on_event(registered(wants_first_token=True), 0.0)
    source.on_event(computed(4), 1.0)
    assert source.on_event(WriteEnded(KEY, 0, True), 1.1) == []
    ended = PrefillEnded(handoff_id="h1", lease_s=30.0, first_token=7)
    assert source.on_event(ended, 1.2) == [GiveFirstToken(KEY, 7), Release("h1")]
    assert source.is_idle


def test_a_late_destination_gets_the_first_token_with_the_blocks():
    source = table()
    source.on_event(computed(4), 1.0)
    source.on_event(PrefillEnded(handoff_id="h1", lease_s=30.0, first_token=7), 1.2)
    actions = source.on_event(registered(wants_first_token=True), 2.0)
    assert writes(actions) == [(0, 1, [10, 11, 12, 13], [20, 21, 22, 23])]
    assert actions[-1] == GiveFirstToken(KEY, 7)
    assert source.on_event(WriteEnded(KEY, 0, True), 2.1) == [Release("h1")]


@pytest.mark.parametrize(
    ("lease_s", "reason"),
    [(None, "the prefill was aborted"), (30.0, "the prefill ended without a token")],
    ids=["aborted", "no-token"],
)
def test_a_token_that_will_not_come_fails_the_stream_whose_blocks_are_all_there(lease_s, reason):
    """Nobody waits for it."""
    source = table()
    source.on_event(registered(wants_first_token=True), 0.0)
    source.on_event(computed(4), 1.0)
    source.on_event(WriteEnded(KEY, 0, True), 1.1)
    actions = source.on_event(PrefillEnded(handoff_id="h1", lease_s=lease_s), 1.2)
    assert Fail(KEY, reason) in actions
