"""What can be made to go wrong with a simulated engine: the grammar, and what each rule does."""

from __future__ import annotations

import asyncio

import pytest

from baton.contract.errors import ERROR_TYPES
from baton.engine.simulated.faults import ACTIONS, Faults, parse_fault
from baton.step_time import LinearStepTime
from tests.engine.simulated import decode, generated, in_loop, prefill, running

# ── the grammar ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("accept:ignore", {"point": "accept", "action": "ignore"}),
        ("prefill:stall:every=16", {"every": 16, "after": 0}),
        ("prefill:kill:after=512,nth=2", {"action": "kill", "nth": 2, "after": 512}),
        ("token:error:first=3,code=draining", {"first": 3, "code": "draining", "after": 1}),
        ("transfer:slow:s=0.5,peer=prefill-2", {"s": 0.5, "peer": "prefill-2"}),
        ("transfer:fail:peer=127.0.0.1:4000", {"peer": "127.0.0.1:4000"}),
    ],
)
def test_reads(text, wanted):
    fault = parse_fault(text)
    assert {name: getattr(fault, name) for name in wanted} == wanted
    assert fault.text == text


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("decode:stall", "'decode:stall': no point is called 'decode'; there are accept, queue, prefill, "),
        ("transfer:error", "'transfer:error': at transfer there are stall, fail, slow, reset"),
        ("accept", "'accept': at accept there are ignore, error, die, kill"),
        ("accept:die:soon", "'accept:die:soon': accept:die takes every, first, nth, not 'soon'"),
        ("accept:die:peer=d", "accept:die takes every, first, nth, not 'peer'"),
        ("token:stall:nth=0", "'token:stall:nth=0': nth is '0', expected a whole number of at least 1"),
        ("token:stall:after=x", "after is 'x', expected a whole number of at least 0"),
        ("token:stall:nth=1,every=2", "'token:stall:nth=1,every=2': one of nth, every, first says how often"),
        ("transfer:slow", "'transfer:slow': s is '', expected seconds"),
        ("transfer:slow:s=-1", "s is '-1', expected seconds"),
        ("transfer:fail:peer=", "peer names nobody"),
        ("accept:error:code=oops", "no error has the code 'oops'; there are internal_error, aborted, "),
    ],
)
def test_refuses_with_a_sentence(text, sentence):
    with pytest.raises(ValueError) as refusal:
        parse_fault(text)
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    ("often", "struck"),
    [("", "123456789"), (":nth=3", "3"), (":every=4", "48"), (":first=2", "12")],
    ids=["always", "nth", "every", "first"],
)
def test_counts_from_one(often, struck):
    faults = Faults(f"accept:die{often}")
    assert "".join(str(n) for n in range(1, 10) if faults.at("accept")) == struck


def test_each_rule_counts_alone_what_it_is_about_and_the_first_that_is_due_acts():
    faults = Faults("transfer:fail:peer=d2,nth=2", "transfer:stall:nth=3")
    peers = ["d1", "d2", "d1", "d2"]
    struck = [faults.at("transfer", (peer,)) for peer in peers]
    assert [fault.action if fault else None for fault in struck] == [None, None, "stall", "fail"]
    assert faults.at("accept") is None
    assert faults.num_struck == 2


# ── what rules do ────────────────────────────────────────────────────────────────────────────────

PROMPT = [1, 2, 3] * 10
STEP = LinearStepTime(base_s=0.001)

STALLS = ["queue:stall", "prefill:stall", "prefill:stall:after=16", "first:stall", "token:stall:after=3"]


def num_used(engine):
    return engine.settings.num_blocks - engine.load().num_free_blocks


@pytest.mark.parametrize("fault", STALLS)
@pytest.mark.parametrize("role", ["prefill", "decode"])
@in_loop
async def test_a_leg_that_stalls_holds_what_it_has_until_it_is_aborted(fault, role):
    """Its engine goes on with others meanwhile. A prefill leg gives one token, so no fault is after three."""
    if (fault, role) == ("token:stall:after=3", "prefill"):
        return
    start, message = {"prefill": ("start_prefill", prefill), "decode": ("start_decode", decode)}[role]
    async with running(max_num_batched_tokens=16, step_time=STEP) as (engine, heard):
        engine.faults.set(f"{fault}{',' if 'after' in fault else ':'}nth=1")
        getattr(engine, start)(message("stuck", PROMPT))
        getattr(engine, start)(message("other", [3] * 40))
        await heard.ended("other")
        assert heard.order == ["other"]
        assert heard.tokens.get("stuck", []) == (generated(PROMPT)[0][:3] if "token" in fault else [])
        engine.abort("other")
        assert (num_used(engine) > 0) == (fault != "queue:stall")
        engine.abort("stuck")
        assert heard.failures["stuck"].code == "aborted"
        assert num_used(engine) == 0
        assert engine.load().num_waiting == 0


@in_loop
async def test_an_ignored_leg_is_never_heard_of_again():
    async with running(faults=Faults("accept:ignore:nth=1")) as (engine, heard):
        engine.start_prefill(prefill("deaf", PROMPT))
        engine.start_prefill(prefill("other", PROMPT))
        await heard.ended("other")
        engine.abort("deaf")
        await asyncio.sleep(0.01)
        assert heard.order == ["other"]


@pytest.mark.parametrize("code", ["engine_failed", "draining", "invalid_request"])
@pytest.mark.parametrize("point", ["accept", "prefill", "prefill:after=16", "first", "token:after=3"])
@in_loop
async def test_a_leg_fails_where_it_is_told_to_with_the_code_it_is_told(point, code):
    """Retryable or not follows from the code."""
    assert {ERROR_TYPES[code].retryable for code in ("engine_failed", "draining")} == {True}
    assert not ERROR_TYPES["invalid_request"].retryable
    name, _, after = point.partition(":")
    fault = f"{name}:error:first=2,code={code}" + (f",{after}" if after else "")
    async with running(faults=Faults(fault), max_num_batched_tokens=16) as (engine, heard):
        for number in range(3):
            engine.start_decode(decode(f"h{number}", PROMPT))
        await heard.ended("h0", "h1", "h2")
        assert sorted(heard.failures) == ["h0", "h1"]
        assert heard.failures["h0"].code == code
        assert heard.failures["h0"].message == f"fault {fault}"
        assert len(heard.tokens.get("h0", [])) == (3 if after == "after=3" else 0)
        assert heard.tokens["h2"] == generated(PROMPT)[0]
        assert num_used(engine) == 0


@in_loop
async def test_a_failed_prefill_holds_nothing():
    async with running(faults=Faults("first:error")) as (engine, heard):
        engine.start_prefill(prefill("h1", PROMPT))
        await heard.ended("h1")
        assert heard.failures["h1"].code == "engine_failed"
        assert num_used(engine) == 0


@pytest.mark.parametrize("point", [point for point in ACTIONS if "die" in ACTIONS[point]])
@in_loop
async def test_death_fails_what_runs_before_it_is_told(point):
    async with running(faults=Faults(f"{point}:die:nth=3"), step_time=STEP) as (engine, heard):
        for number in range(3):
            engine.start_decode(decode(f"h{number}", PROMPT, max_tokens=400))
        await heard.until(lambda: heard.death)
        assert [heard.failures[f"h{number}"].code for number in range(3)] == ["engine_failed"] * 3
        assert heard.death == f"fault {point}:die:nth=3"


@pytest.mark.parametrize("point", [point for point in ACTIONS if "kill" in ACTIONS[point]])
@in_loop
async def test_a_killed_process_says_nothing(point):
    killed = asyncio.Event()
    async with running(faults=Faults(f"{point}:kill:nth=2"), step_time=STEP) as (engine, heard):
        engine.faults.kill = killed.set
        for number in range(2):
            engine.start_decode(decode(f"h{number}", PROMPT))
        await killed.wait()
        assert "h1" not in heard.order and heard.death is None


# ── transfers ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("policy", ["recompute", "fail"])
@pytest.mark.parametrize("action", ["fail", "slow:s=5"])
@in_loop
async def test_kv_that_does_not_come_is_recomputed_or_an_error(action, policy):
    """One transfer of two, and only with the peer that is named: the other source's KV comes."""
    fault = f"transfer:{action}{',' if '=' in action else ':'}peer=bad"
    lease_s = 0.2 if action == "slow:s=5" else 30.0
    async with (
        running(name="bad", kv_lease_s=lease_s) as (bad_engine, bad),
        running(name="good") as (good_engine, good),
        running(faults=Faults(fault), kv_load_failure_policy=policy) as (engine, heard),
    ):
        for name, source_engine, source in (("h1", bad_engine, bad), ("h2", good_engine, good)):
            source_engine.start_prefill(prefill(name, PROMPT))
            await source.ended(name)
            engine.start_decode(decode(name, PROMPT, source.prefills[name].kv_source))
        await heard.ended("h1", "h2")
        assert heard.tokens["h2"] == generated(PROMPT)[0]
        assert engine.load().num_kv_transfers == engine.load().num_kv_transfer_failures == 1
        if policy == "fail":
            assert heard.failures["h1"].code == "kv_transfer_failed"
        else:
            assert heard.tokens["h1"] == generated(PROMPT)[0]
        assert num_used(engine) == 0


@in_loop
async def test_a_slow_transfer_is_late_and_right():
    async with (
        running() as (source_engine, source),
        running(faults=Faults("transfer:slow:s=0.2")) as (engine, heard),
    ):
        source_engine.start_prefill(prefill("h1", PROMPT))
        await source.ended("h1")
        started_s = asyncio.get_running_loop().time()
        engine.start_decode(decode("h1", PROMPT, source.prefills["h1"].kv_source))
        await heard.ended("h1")
        assert asyncio.get_running_loop().time() - started_s >= 0.2
        assert heard.tokens["h1"] == generated(PROMPT)[0]
        assert engine.load().num_kv_transfers == 1


@in_loop
async def test_a_transfer_that_is_pending_for_ever_outlives_its_lease_and_obeys_an_abort():
    async with (
        running(kv_lease_s=0.05) as (source_engine, source),
        running(faults=Faults("transfer:stall")) as (engine, heard),
    ):
        source_engine.start_prefill(prefill("h1", PROMPT))
        await source.ended("h1")
        engine.start_decode(decode("h1", PROMPT, source.prefills["h1"].kv_source))
        engine.start_decode(decode("other", [3]))
        await heard.ended("other")
        await asyncio.sleep(0.1)
        assert heard.order == ["other"] and num_used(engine) > 0
        engine.abort("h1")
        assert heard.failures["h1"].code == "aborted"
        assert num_used(engine) == num_used(source_engine) == 0
