import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from baton.contract.messages import RequestDelta
from baton.launch.fleet_file import FleetFile, NodeFleet, write_fleet_file
from placement import live, validate_command
from placement import validate as validate_module
from placement.live import Observed
from placement.requests import make_requests
from placement.running import NotPredictable, predicted_fleet
from placement.simulator import UNLIMITED, ColocatedFleet, SplitFleet, Timings, simulate
from placement.slo import Slo
from placement.validate import (
    as_json,
    highest_rate,
    is_at_knee,
    shifted,
    table,
    validate,
    with_slower_links,
)

SIMULATED = {
    "engine": "simulated",
    "simulated_step_time": "linear:base_s=0.01,per_prefill_token_s=1e-4,per_decode_s=1e-3",
    "simulated_transfer_s": 0.004,
    "max_num_batched_tokens": 1_024,
    "num_blocks": 500,
}
SLO = Slo(ttft_s=0.3, tpot_s=0.05)


def fleet_file(num_prefill: int = 1, num_decode: int = 1, **settings: object) -> FleetFile:
    node = {"prefill": NodeFleet(num_workers=num_prefill), "decode": NodeFleet(num_workers=num_decode)}
    role = SIMULATED | settings
    return FleetFile(nodes=[node], settings={"prefill": role, "decode": role})


def requests(count: int = 2_000, seed: int = 0):
    rng = np.random.default_rng(seed)
    return make_requests(
        rng.integers(100, 900, count), np.full(count, 20), gaps=rng.exponential(1.0, count), seed=seed
    )


def test_a_fleet_file_of_simulated_workers_is_predicted_from_its_own_settings():
    fleet = predicted_fleet(fleet_file(2, 3), None, longest_prompt=900)
    assert isinstance(fleet, SplitFleet)
    assert (fleet.num_prefill, fleet.num_decode) == (2, 3)
    assert (fleet.batch_tokens, fleet.window_tokens) == (1_024, UNLIMITED)
    assert fleet.prefill_kv_tokens == 500 * 32
    assert fleet.links.base_s[0] == 0.004
    assert fleet.decode.alpha[5] == pytest.approx(0.01 + 5e-3)


def test_workers_for_both_phases_share_their_steps():
    file = FleetFile(nodes=[{"both": NodeFleet(num_workers=2)}], settings={"both": SIMULATED})
    fleet = predicted_fleet(file, None, longest_prompt=900)
    assert isinstance(fleet, ColocatedFleet)
    assert fleet.num_workers == 2
    assert fleet.mixed is not None


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        (fleet_file(engine="vllm"), "the fleet runs vllm: its step times come from a profile"),
        (fleet_file(simulated_step_time=None), "take no time at all"),
        (fleet_file(simulated_step_time="linear:speed=1"), "'speed' is no part of a linear step time"),
        (
            FleetFile(
                nodes=[{"both": NodeFleet(num_workers=1), "prefill": NodeFleet(num_workers=1)}], settings={}
            ),
            "mixed fleets are not simulated",
        ),
    ],
    ids=["vllm", "instant", "unknown-term", "mixed"],
)
def test_what_cannot_be_predicted_is_a_sentence(file: FleetFile, sentence: str):
    with pytest.raises(NotPredictable, match=sentence):
        predicted_fleet(file, None, longest_prompt=100)


def test_the_highest_rate_keeps_the_slo_and_five_percent_more_does_not():
    fleet, sample = predicted_fleet(fleet_file(), None, longest_prompt=900), requests()
    rate = highest_rate(fleet, sample, SLO, overhead_s=0.0)
    assert is_at_knee(fleet, sample, SLO, rate, 0.0)
    assert not is_at_knee(fleet, sample, SLO, rate / 3, 0.0)
    slower = highest_rate(fleet, sample, SLO, overhead_s=0.1)
    assert 0 < slower < rate
    assert highest_rate(fleet, sample, SLO, overhead_s=1.0) == 0.0  # no request alone keeps 0.3 s


def live_fleet(monkeypatch: pytest.MonkeyPatch, *, slower: float = 1.0, handoff_s: float = 0.0) -> None:
    """Answers as the simulator says, only `slower`, 5 ms after it in every TTFT, and with hand-offs that take
    `handoff_s` longer."""
    truth = with_slower_links(predicted_fleet(fleet_file(), None, longest_prompt=900), handoff_s)

    async def play(address, sample, rate):
        done = simulate(truth, sample, rate)
        timings = Timings(done.ttft_s * slower + 0.005, done.tpot_s * slower)
        return Observed(timings, 0, None, 0.001)

    async def solo(address, num_tokens, **_options):
        return [(0.01 + num_tokens * 1e-4 + 0.005, 0.004 + 0.011 + handoff_s)]

    monkeypatch.setattr(validate_module, "play", play)
    monkeypatch.setattr(validate_module, "solo_times_s", solo)


def run_validation(monkeypatch: pytest.MonkeyPatch, slower: float = 1.0, handoff_s: float = 0.0):
    live_fleet(monkeypatch, slower=slower, handoff_s=handoff_s)
    fleet = predicted_fleet(fleet_file(), None, longest_prompt=900)
    return validate(
        "nowhere", fleet, requests(300), requests(seed=1), SLO, rates_per_s=None, say=lambda text: None
    )


def test_a_fleet_that_does_as_simulated_agrees_at_every_rate(monkeypatch: pytest.MonkeyPatch):
    found = run_validation(monkeypatch)
    assert found.overhead_s == pytest.approx(0.005, abs=1e-6)
    assert [row.difference for row in found.rows] == [0.0] * 6
    assert {row.agrees for row in found.rows} == {True, None}  # away from the knee, and at it
    assert "at the knee" in table(found, SLO)
    assert json.loads(json.dumps(as_json(found)))["rows"][0]["difference"] == 0.0


def test_what_a_handoff_alone_takes_beside_its_transfer_is_in_every_prediction(
    monkeypatch: pytest.MonkeyPatch,
):
    found = run_validation(monkeypatch, handoff_s=0.03)
    assert found.handoff_s == pytest.approx(0.03, abs=1e-6)
    assert [row.difference for row in found.rows] == [0.0] * 6
    assert found.rows[0].predicted_tpot_s == pytest.approx(found.rows[0].observed_tpot_s)
    assert "30.0 ms beside its transfer in each hand-off" in table(found, SLO)


def test_a_slower_fleet_is_seen_to_disagree(monkeypatch: pytest.MonkeyPatch):
    found = run_validation(monkeypatch, slower=3.0)
    assert False in {row.agrees for row in found.rows}
    assert " off" in table(found, SLO)


def test_the_overhead_shifts_the_first_token_only():
    done = shifted(Timings(np.array([1.0]), np.array([0.1])), 0.5)
    assert (done.ttft_s[0], done.tpot_s[0]) == (1.5, 0.1)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--workload", "fixed:10/fixed:2", "--ttft", "1"], "cannot read"),
        (["--ttft", "1"], "--workload is missing"),
        (["--workload", "fixed:10/fixed:2", "--rates", "fast"], "--rates is 'fast'"),
        (["--workload", "fixed:10/fixed:2", "--num-requests", "3"], "--num-requests is 3"),
        (["--workload", "fixed:10/fixed:2"], "neither --ttft nor --tpot is given"),
    ],
)
def test_bad_questions_end_with_a_sentence(tmp_path: Path, capsys, flags: list[str], sentence: str):
    argv = ["--validate", str(tmp_path / "none.yaml"), *flags]
    try:
        code = validate_command.main(argv)
    except SystemExit as exit_:
        code = exit_.code  # type: ignore[assignment]
    assert code == 2
    assert sentence in capsys.readouterr().err


def test_no_prompt_is_sent_twice(monkeypatch: pytest.MonkeyPatch):
    """A repeated prompt would be answered by the prefix cache, and the fleet would look faster than it is."""
    sent: list[tuple[int, ...]] = []

    class Client:
        def __init__(self, address: str, **_options: object) -> None: ...

        async def __aenter__(self) -> "Client":
            return self

        async def __aexit__(self, *_error: object) -> None: ...

        async def submit(self, prompt: list[int], **_options: object):
            sent.append(tuple(prompt))
            yield RequestDelta(request_id="r", token_ids=[1], text="")

    monkeypatch.setattr(live, "AsyncBatonClient", Client)
    sample = requests(20)
    for _ in range(2):
        observed = asyncio.run(live.play("nowhere", sample, 1_000.0))
        assert observed.num_failed == 0
        assert np.isfinite(observed.timings.ttft_s).all()
    assert len(sent) == len(set(sent)) == 40


def test_the_command_sends_as_many_requests_as_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys):
    live_fleet(monkeypatch)
    sent: list[int] = []
    play = vars(validate_module)["play"]

    async def counting(address, sample, rate):
        sent.append(len(sample))
        return await play(address, sample, rate)

    monkeypatch.setattr(validate_module, "play", counting)
    path = tmp_path / "fleet.yaml"
    write_fleet_file(fleet_file(), path, heading="test")
    flags = [
        "--workload",
        "uniform:100,900/fixed:20",
        "--ttft",
        "0.3",
        "--num-requests",
        "50",
        "--rates",
        "2,4",
    ]
    assert validate_command.main(["--validate", str(path), *flags]) == 0
    assert sent == [50, 50]
    assert "predicted" in capsys.readouterr().out
