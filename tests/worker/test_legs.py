"""The table of legs: what a worker does with a message, without any I/O."""

import pytest

from baton.contract.errors import InvalidRequest, PromptTooLong
from baton.contract.lifecycle import WorkerRole
from baton.contract.messages import KvSource, SequenceDelta, StartDecode, StartPrefill
from baton.contract.sampling import SamplingSpec
from baton.contract.tokens import pack_token_ids
from baton.worker.legs import NUM_REMEMBERED, Drop, LegTable, Refuse, Start


def prefill(handoff_id="h1", prompt=(1, 2, 3), max_tokens=8):
    return StartPrefill(
        handoff_id=handoff_id,
        request_id="r1",
        prompt_token_ids=prompt if isinstance(prompt, bytes) else pack_token_ids(prompt),
        sampling=SamplingSpec(max_tokens=max_tokens),
        keep_kv=True,
    )


def decode(handoff_id="h1", prompt=(1, 2, 3), num_held=None):
    source = None
    if num_held is not None:
        source = KvSource(lease_s=30.0, num_tokens=num_held, num_bytes=1, transfer_params={})
    return StartDecode(
        handoff_id=handoff_id,
        request_id="r1",
        prompt_token_ids=pack_token_ids(prompt),
        sampling=SamplingSpec(max_tokens=8),
        kv_source=source,
    )


def table(role=WorkerRole.PREFILL):
    return LegTable(role, max_model_len=16)


def test_a_worker_for_both_phases_takes_both_kinds_of_legs():
    legs = table(WorkerRole.BOTH)
    assert isinstance(legs.on_start(prefill("h1"), 0.0), Start)
    assert isinstance(legs.on_start(decode("h2"), 0.0), Start)
    assert len(legs) == 2


def test_a_leg_starts_once_and_ends_once():
    """
    1. a start message: the engine gets it
    2. the same again, while it runs and after it ended: dropped, with different reasons
    3. its end is known once
    """
    legs = table()
    assert isinstance(action := legs.on_start(prefill(), now_s=1.0), Start)
    assert (action.leg.num_prompt_tokens, action.leg.started_s) == (3, 1.0)
    assert legs.on_start(prefill(), now_s=2.0) == Drop("this leg is running: duplicate start")
    assert len(legs) == 1
    assert legs.end("h1") is action.leg
    assert legs.end("h1") is None
    assert legs.on_start(prefill(), now_s=3.0) == Drop("this leg is over: late start")
    assert len(legs) == 0


@pytest.mark.parametrize(
    ("role", "message", "error", "words"),
    [
        pytest.param(WorkerRole.PREFILL, prefill(prompt=()), InvalidRequest, "empty", id="empty prompt"),
        pytest.param(WorkerRole.PREFILL, prefill(prompt=b"abcde"), InvalidRequest, "5 bytes", id="ragged"),
        pytest.param(WorkerRole.PREFILL, prefill(prompt=[1] * 16), PromptTooLong, "16 tokens", id="too long"),
        pytest.param(WorkerRole.PREFILL, prefill(max_tokens=0), InvalidRequest, "is 0", id="no output"),
        pytest.param(WorkerRole.PREFILL, decode(), InvalidRequest, "StartDecode", id="wrong role"),
        pytest.param(WorkerRole.DECODE, prefill(), InvalidRequest, "StartPrefill", id="other wrong role"),
        pytest.param(WorkerRole.DECODE, decode(num_held=4), InvalidRequest, "4 tokens", id="source too long"),
        pytest.param(WorkerRole.DECODE, decode(num_held=0), InvalidRequest, "0 tokens", id="empty source"),
    ],
)
def test_what_the_engine_must_not_see_is_refused_with_the_numbers(role, message, error, words):
    legs = table(role)
    action = legs.on_start(message, now_s=0.0)
    assert isinstance(action, Refuse)
    assert type(action.error) is error
    assert words in action.error.message
    assert len(legs) == 0


def test_the_longest_prompt_leaves_room_for_one_token():
    assert isinstance(table().on_start(prefill(prompt=[1] * 15), now_s=0.0), Start)  # 15 + 1 = 16


def test_a_step_reports_known_legs_and_ends_finished_ones():
    legs = table(WorkerRole.DECODE)
    legs.on_start(decode("h1"), now_s=0.0)
    legs.on_start(decode("h2"), now_s=0.0)
    going_on = SequenceDelta("h1", [7], "a")
    finished = SequenceDelta("h2", [8], "b", "stop")
    unknown = SequenceDelta("h3", [9], "c")
    known, ended = legs.on_step([going_on, finished, unknown])
    assert known == [going_on, finished]
    assert [(leg.handoff_id, reason) for leg, reason in ended] == [("h2", "stop")]
    assert legs.on_step([finished]) == ([], [])


def test_abandoned_legs_are_forgotten_and_cannot_come_back():
    legs = table(WorkerRole.DECODE)
    legs.on_start(decode("h1"), now_s=0.0)
    legs.on_start(decode("h2"), now_s=0.0)
    assert [leg.handoff_id for leg in legs.abandon_all()] == ["h1", "h2"]
    assert len(legs) == 0
    assert legs.on_step([SequenceDelta("h1", [7], "a", "length")]) == ([], [])
    assert isinstance(legs.on_start(decode("h1"), now_s=0.0), Drop)


def test_memory_of_ended_legs_is_bounded():
    legs = table()
    for number in range(NUM_REMEMBERED + 1):
        legs.on_start(prefill(f"h{number}"), now_s=0.0)
        legs.end(f"h{number}")
    assert isinstance(legs.on_start(prefill("h0"), now_s=0.0), Start)
    assert isinstance(legs.on_start(prefill("h1"), now_s=0.0), Drop)
