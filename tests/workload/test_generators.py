import numpy as np
import pytest

from baton.workload import (
    HotspotWorkload,
    SessionWorkload,
    SingleTurnWorkload,
    WorkloadError,
    parse_lengths,
)
from baton.workload.single_turn import resampled


@pytest.mark.parametrize(
    ("text", "mean", "tolerance"),
    [
        ("512", 512, 0),
        ("fixed:512", 512, 0),
        ("uniform:10,30", 20, 0.2),
        ("exponential:300", 300, 5),
        ("lognormal:800,1.5", 800, 25),
        ("pareto:200,3", 300, 5),  # smallest * a / (a - 1)
        ("bimodal:100,5000,0.1", 0.9 * 100 * 1.0202 + 0.1 * 5000 * 1.0202, 25),  # exp(0.2 ** 2 / 2)
    ],
)
def test_lengths_have_their_mean(text: str, mean: float, tolerance: float):
    drawn = parse_lengths(text).sample(np.random.default_rng(1), 100_000)
    assert drawn.min() >= 1
    assert drawn.mean() == pytest.approx(mean, abs=tolerance)


def test_lengths_are_cut_at_their_maximum():
    drawn = parse_lengths("pareto:200,1.1,max=4096").sample(np.random.default_rng(1), 10_000)
    assert drawn.max() == 4096


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("normal:3,4", "unknown form 'normal', expected one of fixed, uniform"),
        ("lognormal:3", r"expected lognormal:mean,cv\[,max=N\]"),
        ("fixed:0", "expected more than 0"),
        ("fixed:many", "'many' is not a number"),
        ("uniform:9,3", "low is above high"),
        ("bimodal:1,2,3", "a share of 3, expected 0 to 1"),
        ("fixed:9,max=x", "'x' is not a number"),
    ],
)
def test_unreadable_lengths_are_refused(text: str, says: str):
    with pytest.raises(WorkloadError, match=says):
        parse_lengths(text)


def test_sessions_repeat_exactly_for_a_seed():
    workload = SessionWorkload(num_sessions=50, session_rate_per_s=2.0)
    one, same, other = (workload.generate(seed=seed) for seed in (1, 1, 2))
    assert one.arrival_s.tolist() == same.arrival_s.tolist()
    assert [hashes.tolist() for hashes in one.block_hashes] == [
        hashes.tolist() for hashes in same.block_hashes
    ]
    assert one.arrival_s.tolist() != other.arrival_s.tolist()


def test_a_turns_prompt_continues_the_turn_before():
    """The prompt of a turn is the prompt before, its answer, and a question: every block of the turn
    before is there again, and no other session has the blocks after the system prompt."""
    trace = SessionWorkload(num_sessions=200, session_rate_per_s=5.0, num_apps=3).generate(seed=1)
    owner: dict[int, int] = {}
    num_later_turns = 0
    for request, previous in zip(trace, trace.previous_turn.tolist(), strict=True):
        assert len(request.block_hashes) == request.num_prompt_tokens // trace.block_size_tokens
        assert (request.turn == 0) == (previous < 0)
        if previous >= 0:
            num_later_turns += 1
            before = trace[previous]
            assert request.turn == before.turn + 1 and request.arrival_s > before.arrival_s
            assert request.num_prompt_tokens > before.num_prompt_tokens + before.num_output_tokens
            shared = len(before.block_hashes)
            assert request.block_hashes[:shared].tolist() == before.block_hashes.tolist()
        for block in request.block_hashes.tolist():
            owner.setdefault(block, request.session_id)
    assert num_later_turns > 300  # 200 sessions of 4 turns in the mean
    strangers = {
        block
        for request in trace
        for block in request.block_hashes.tolist()
        if owner[block] != request.session_id
    }
    # Only the blocks of the three applications' system prompts are shared between sessions.
    assert 0 < len(strangers) <= 3 * 8192 // trace.block_size_tokens
    assert trace.ideal_hit_share() > 0.6


def test_popular_applications_get_more_sessions():
    trace = SessionWorkload(
        num_sessions=2000, session_rate_per_s=5.0, num_apps=10, app_zipf=1.0, mean_turns=1.0
    ).generate(seed=1)
    firsts = [int(hashes[0]) for hashes in trace.block_hashes if len(hashes)]
    _, counts = np.unique(firsts, return_counts=True)
    # 1 / (1 + 1/2 + … + 1/10) = 0.341
    assert counts.max() / len(trace) == pytest.approx(0.341, abs=0.04)


def test_no_prompt_outgrows_the_model():
    trace = SessionWorkload(
        num_sessions=300, session_rate_per_s=5.0, mean_turns=20, max_model_len=6000
    ).generate(1)
    assert int((trace.num_prompt_tokens + trace.num_output_tokens).max()) <= 6000
    with pytest.raises(WorkloadError, match="no session fits into max_model_len 10"):
        SessionWorkload(num_sessions=3, session_rate_per_s=5.0, max_model_len=10).generate(1)


def test_single_turn_requests_are_the_same_at_every_rate():
    slow, fast = (
        SingleTurnWorkload(
            num_requests=1000,
            rate_per_s=rate,
            prompt=parse_lengths("lognormal:500,1"),
            output=parse_lengths("bimodal:50,800,0.2"),
            gap_cv=2.0,
        ).generate(seed=4)
        for rate in (1.0, 8.0)
    )
    assert slow.num_prompt_tokens.tolist() == fast.num_prompt_tokens.tolist()
    assert slow.arrival_s == pytest.approx(fast.arrival_s * 8)


def test_resampling_keeps_pairs_of_lengths_together():
    source = SingleTurnWorkload(
        num_requests=50,
        rate_per_s=1.0,
        prompt=parse_lengths("uniform:1,999"),
        output=parse_lengths("uniform:1,999"),
    ).generate(seed=1)
    drawn = resampled(source, 2000, 3.0, seed=2)
    pairs = set(zip(source.num_prompt_tokens.tolist(), source.num_output_tokens.tolist(), strict=True))
    assert set(zip(drawn.num_prompt_tokens.tolist(), drawn.num_output_tokens.tolist(), strict=True)) <= pairs
    assert drawn.rate_per_s == pytest.approx(3.0, rel=0.1)


def test_the_hot_class_has_its_share_and_its_hits_during_the_burst_only():
    workload = HotspotWorkload(
        rate_per_s=100.0,
        duration_s=60.0,
        prompt=parse_lengths("fixed:6400"),
        output=parse_lengths("fixed:10"),
        hot_share=0.6,
        hot_hit=0.95,
        burst_start_s=20.0,
        burst_s=20.0,
        background_hit=0.0,
    )
    trace = workload.generate(seed=1)
    during = trace.between(20.0, 40.0)
    firsts = [int(hashes[0]) for hashes in during.block_hashes]
    hot = max(set(firsts), key=firsts.count)
    assert firsts.count(hot) / len(during) == pytest.approx(0.6, abs=0.03)
    two = [hashes for hashes in during.block_hashes if hashes[0] == hot][:2]
    assert sum(two[0] == two[1]) == 95  # of 100 blocks
    outside = {
        int(h[0]) for r, h in zip(trace, trace.block_hashes, strict=True) if not 20 <= r.arrival_s < 40
    }
    assert hot not in outside
