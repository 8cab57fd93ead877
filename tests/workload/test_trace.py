import numpy as np
import pytest

from baton.workload import (
    Trace,
    TraceRequest,
    WorkloadError,
    at_rate,
    prompt_token_ids,
    retimed,
    sped_up,
    spread,
    with_session_starts,
)
from baton.workload.trace import NO_SESSION, trace_of


def request(
    arrival_s: float, hashes: list[int], *, tokens: int = 0, session: int = NO_SESSION, turn: int = 0
):
    return TraceRequest(
        0,
        arrival_s,
        tokens or 4 * len(hashes),
        5,
        np.array(hashes, np.int64),
        session,
        turn,
        2.0 if turn else 0.0,
    )


@pytest.fixture
def sessions() -> Trace:
    return trace_of(
        [
            request(0.0, [1, 2], session=7),
            request(1.0, [1, 3], session=8),
            request(4.0, [1, 2, 4], session=7, turn=1),
            request(6.0, [1, 3, 5], session=8, turn=1),
        ],
        name="two sessions",
        block_size_tokens=4,
    )


def test_requests_are_sorted_and_keep_their_fields():
    trace = trace_of([request(3.0, [2]), request(1.0, [1])], name="t", block_size_tokens=4)
    assert [(r.position, r.arrival_s, r.block_hashes.tolist(), r.session_id) for r in trace] == [
        (0, 1.0, [1], NO_SESSION),
        (1, 3.0, [2], NO_SESSION),
    ]


def test_previous_turn_is_found_within_the_session(sessions: Trace):
    assert sessions.previous_turn.tolist() == [-1, -1, 0, 1]


def test_a_partly_filled_block_is_no_hit():
    trace = trace_of(
        [request(0, [1, 2], tokens=6), request(1, [1, 2], tokens=6)], name="t", block_size_tokens=4
    )
    assert trace.num_full_blocks(0) == 1  # 6 tokens, blocks of 4
    assert trace.ideal_hit_share() == pytest.approx(4 / 12)  # the second request's first block


def test_a_hit_ends_at_the_first_unknown_block():
    trace = trace_of([request(0, [1, 2, 3]), request(1, [1, 9, 3])], name="t", block_size_tokens=4)
    assert trace.ideal_hit_share() == pytest.approx(4 / 24)


def test_slices_keep_columns_together(sessions: Trace):
    part = sessions.between(1.0, 5.0)
    assert part.arrival_s.tolist() == [0.0, 3.0]
    assert [hashes.tolist() for hashes in part.block_hashes] == [[1, 3], [1, 2, 4]]
    assert part.session_ids.tolist() == [8, 7]
    assert part.previous_turn.tolist() == [-1, -1]
    assert len(sessions.first(3)) == 3
    with pytest.raises(WorkloadError, match="nothing is left of the 4 requests of two sessions"):
        sessions.between(100, 200)


def test_long_requests_are_left_out(sessions: Trace):
    assert len(sessions.at_most(13)) == 2  # 8 + 5 fits, 12 + 5 does not
    with pytest.raises(WorkloadError, match="fits into 12 tokens, the shortest has 13"):
        sessions.at_most(12)


def test_speed_up_and_rate(sessions: Trace):
    assert sped_up(sessions, 2.0).arrival_s.tolist() == [0.0, 0.5, 2.0, 3.0]
    assert at_rate(sessions, 3.0).rate_per_s == pytest.approx(3.0)
    assert sped_up(sessions, 2.0).think_s.tolist() == sessions.think_s.tolist()


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 3.0])
def test_retimed_arrivals_have_the_rate_and_the_burstiness_asked_for(cv: float):
    trace = trace_of([request(0.0, [1])] * 40_000, name="t", block_size_tokens=4)
    moved = retimed(trace, 5.0, cv=cv, seed=3)
    assert moved.rate_per_s == pytest.approx(5.0, rel=0.05)
    assert moved.gap_cv == pytest.approx(cv, rel=0.05, abs=1e-9)
    assert moved.arrival_s.tolist() == retimed(trace, 5.0, cv=cv, seed=3).arrival_s.tolist()


def test_spreading_keeps_the_turns_of_a_session_in_order():
    trace = trace_of(
        [request(0.0, [1], session=number // 5, turn=number % 5) for number in range(100)],
        name="t",
        block_size_tokens=4,
    )
    moved = spread(trace, 3.0, seed=1)
    assert moved.arrival_s[0] >= 0 and moved.duration_s < 3.0
    for session in range(20):
        assert moved.turns[moved.session_ids == session].tolist() == [0, 1, 2, 3, 4]


def test_sessions_start_one_after_the_other(sessions: Trace):
    moved = with_session_starts(sessions, 0.1, seed=1)
    starts = {int(session): float(moved.arrival_s[moved.session_ids == session].min()) for session in (7, 8)}
    assert starts[7] < starts[8]
    for session, gap_s in ((7, 4.0), (8, 5.0)):
        times = moved.arrival_s[moved.session_ids == session]
        assert times[1] - times[0] == pytest.approx(gap_s)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda trace: sped_up(trace, 0.0), "speed-up of 0"),
        (lambda trace: retimed(trace, 0.0, seed=1), "arrival rate of 0 per second"),
        (lambda trace: retimed(trace, 1.0, cv=-1, seed=1), "burstiness"),
        (lambda trace: at_rate(trace.first(1), 1.0), "no arrival times"),
    ],
)
def test_impossible_changes_are_refused(sessions: Trace, change, says: str):
    with pytest.raises(WorkloadError, match=says):
        change(sessions)


def test_prompts_share_tokens_exactly_as_far_as_their_hashes():
    trace = trace_of(
        [request(0, [1, 2], tokens=10), request(1, [1, 3], tokens=10)], name="t", block_size_tokens=4
    )
    first, second = (prompt_token_ids(trace, index, vocabulary_size=512).tolist() for index in (0, 1))
    assert len(first) == len(second) == 10 and max(first + second) < 512
    assert first[:4] == second[:4]
    # 6 more tokens agree by chance with probability 512 ** -6.
    assert first[4:8] != second[4:8] and first[8:] != second[8:]
    assert first == prompt_token_ids(trace, 0, vocabulary_size=512).tolist()
    assert first != prompt_token_ids(trace, 0, vocabulary_size=512, salt=1).tolist()
    assert min(prompt_token_ids(trace, 0, vocabulary_size=101, first_token_id=100)) == 100
