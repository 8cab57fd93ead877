"""The fleet's pace from what workers report."""

from __future__ import annotations

import random

import pytest

from baton.contract.messages import WorkerCapacity, WorkerLoad
from baton.policy.fleet_pace import MIN_MEASURED, STEPS_PER_MEASUREMENT, FleetPace, StepClock
from baton.policy.ledger import Ledger
from baton.settings import SettingsError
from baton.step_time.base import StepWork, prefill_pairs
from baton.step_time.profile import LinkFit, save_profile
from coordinator.given_pace import given_pace
from coordinator.settings import CoordinatorSettings
from tests.step_time.test_profile import DECODE, PREFILL, profile


def learn(pace: FleetPace, rng: random.Random, *, lengths=(100, 2000), num: int = 200) -> None:
    for _ in range(num):
        tokens, hits = rng.randint(*lengths), rng.choice([0, 256])
        pace.prefilled(tokens, hits, 0.01 + 1e-4 * tokens + 1e-8 * prefill_pairs(tokens, hits))
        num_bytes = rng.randint(10**6, 10**8)
        pace.handed_over(num_bytes, 0.004 + num_bytes * 1e-9)
        for _ in range(STEPS_PER_MEASUREMENT):
            batch = rng.randint(1, 32)
            context = batch * rng.randint(100, 2000)
            pace.stepped(batch, context, 0.005 + 1e-4 * batch + 1e-8 * context)


def test_nothing_is_known_before_everything_was_measured():
    pace = FleetPace()
    assert pace.pace() is None
    learn(pace, random.Random(1), num=MIN_MEASURED - 1)
    assert pace.pace() is None


def test_equal_prompts_tell_nothing_about_shorter_ones():
    pace = FleetPace()
    rng = random.Random(1)
    for _ in range(100):
        pace.prefilled(500, 0, 0.06)
        pace.handed_over(1e6, 0.01)
        for _ in range(STEPS_PER_MEASUREMENT):
            pace.stepped(rng.randint(1, 8), 1000, 0.005)
    assert pace.pace() is None


def test_the_least_a_request_takes_is_what_is_known_of_it():
    """Decode steps were measured, prompts were all equal: those take no time that anybody could promise."""
    pace = FleetPace()
    assert pace.least().decode.step_s(StepWork(num_decodes=4)) == 0.0
    for number in range(100 * STEPS_PER_MEASUREMENT):
        pace.stepped(4 + number % 4, 1000, 0.005)
        pace.prefilled(500, 0, 0.06)
    assert pace.pace() is None
    assert pace.least().decode.step_s(StepWork(num_decodes=4)) == pytest.approx(0.005, rel=1e-3)
    assert pace.least().prefill.step_s(StepWork(num_prefill_tokens=500)) == 0.0


def test_what_was_measured_is_predicted():
    pace = FleetPace()
    learn(pace, random.Random(2))
    known = pace.pace()
    assert known is not None
    work = StepWork(num_prefill_tokens=300, num_prefill_pairs=prefill_pairs(300, 256))
    assert known.prefill.step_s(work) == pytest.approx(0.01 + 0.03 + 1e-8 * prefill_pairs(300, 256), rel=1e-3)
    mixed = work._replace(num_decodes=4, num_context_tokens=4000)
    prompt_s = 0.03 + 1e-8 * prefill_pairs(300, 256)
    assert known.decode.step_s(mixed) == pytest.approx(0.005 + 4e-4 + 4e-5 + prompt_s, rel=1e-3)
    assert known.handoff_s == pytest.approx(0.004, rel=1e-3)
    assert known.handoff_per_byte_s == pytest.approx(1e-9, rel=1e-3)


def test_a_row_of_steps_teaches_what_its_steps_teach():
    """Random rows, some after a pause, some beside a waiting prompt, some with which the worker is done."""
    draw = random.Random(4)
    ledger = Ledger()
    capacity = WorkerCapacity(num_blocks=10_000, max_batch_size=64, max_model_len=9999, kv_bytes_per_block=1)
    one, many = (ledger.open(name, capacity, 16) for name in "ab")
    in_steps, in_rows = FleetPace(), FleetPace()
    clocks = StepClock(), StepClock()
    for account in (one, many):
        account.commit("leg", num_queued_tokens=0, num_blocks=10, num_kv_tokens=50)
    now_s = 0.0
    for _ in range(200):
        num_steps, num_decodes = draw.randint(1, 30), draw.randint(0, 5)
        ends_s = [now_s + (n + 1) * 0.01 + n * n * 1e-5 for n in range(num_steps)]
        now_s = ends_s[-1] + draw.choice([0.0, 0.5])
        is_waiting, last = draw.random() < 0.2, WorkerLoad(num_running=draw.choice([0, 3]))
        for account in (one, many):
            account.observe(WorkerLoad(num_running=3))
            if is_waiting:
                account.commit("prompt", num_queued_tokens=5, num_blocks=1)
        for n, end_s in enumerate(ends_s):
            if n == num_steps - 1:
                one.observe(last)
            in_steps.heard_step(clocks[0], one, num_decodes, end_s)
            one.grow("leg", num_decodes)
        many.observe(last)
        in_rows.heard_row(clocks[1], many, num_decodes, num_steps, [0.0, *ends_s].__getitem__)
        many.grow("leg", num_decodes * num_steps)
        for account in (one, many):
            account.release("prompt")
        assert clocks[0].last_s == clocks[1].last_s
    assert in_steps._decode._products == in_rows._decode._products
    assert in_steps._decode._targets == in_rows._decode._targets
    assert in_steps.num_measured["decode"] > 100


def test_a_given_pace_is_known_at_once():
    given = given_pace("H100:Llama-3.1-8B")
    assert FleetPace(given).pace() is given
    prompt = StepWork(num_prefill_tokens=2048, num_prefill_pairs=prefill_pairs(2048))
    assert 0.02 < given.prefill.step_s(prompt) < 0.2  # 2 x 8e9 x 2048 operations at 0.2 to 1 peta per second
    assert 0.001 < given.handoff_s < 0.05
    assert given_pace("H100:Llama-3.1-8B:2").prefill.step_s(prompt) < given.prefill.step_s(prompt)


def test_a_measured_profile_is_a_pace(tmp_path):
    path = tmp_path / "profile.json"
    save_profile(profile(link=LinkFit(bytes_per_s=1e9, latency_s=0.003)), path)
    given = given_pace(str(path))
    prompt = StepWork(num_prefill_tokens=512, num_prefill_pairs=prefill_pairs(512))
    assert given.prefill.step_s(prompt) == pytest.approx(PREFILL.step_s(prompt))
    one = StepWork(num_decodes=1, num_context_tokens=1)
    assert given.handoff_s == pytest.approx(0.003 + DECODE.step_s(one))
    assert given.handoff_per_byte_s == pytest.approx(1e-9)
    save_profile(profile(), path)
    with pytest.raises(ValueError, match="holds no hand-offs"):
        given_pace(str(path))


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("H100", "is neither PROFILE.json nor GPU:MODEL"),
        ("H100:", "is neither PROFILE.json nor GPU:MODEL"),
        ("nowhere.json", "cannot read the profile nowhere.json"),
        ("T1000:Llama-3.1-8B", "T1000"),
        ("H100:nobody/knows", "nobody/knows"),
        ("H100:Llama-3.1-8B:two", "'two' is no tensor-parallel size"),
        ("H100:Llama-3.1-8B:3", "TP 3"),
    ],
)
def test_a_pace_that_cannot_be_given_is_a_sentence(spec, sentence):
    with pytest.raises(ValueError, match=sentence):
        given_pace(spec)
    with pytest.raises(SettingsError, match=f"step_time: .*{sentence}"):
        CoordinatorSettings(step_time=spec)


def test_a_fleet_that_changes_is_learnt_again():
    pace = FleetPace()
    learn(pace, random.Random(3))
    assert pace.pace() is not None
    for _ in range(24_000):
        pace.handed_over(1e6, 0.5)
        known = pace.pace()
    assert known is not None
    assert known.handoff_s + 1e6 * known.handoff_per_byte_s == pytest.approx(0.5, rel=0.1)
