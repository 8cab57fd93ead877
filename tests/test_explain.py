"""`baton explain`: one decision shown, all decisions made again, and what was tampered with is caught."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from baton import explain
from baton.contract.lifecycle import Outcome
from baton.contract.messages import PhaseTimes, Placement, RequestReport, WorkerCapacity
from baton.policy import registry
from baton.policy.base import Candidates, Choice, RequestFacts, choose
from baton.policy.decision import Decision, StayOrGo
from baton.policy.explain import read_all, record_decision
from baton.policy.ledger import Ledger
from baton.policy.router import PrefillChoice
from baton.policy.stay_or_go import Pace, Question, Rest, costs
from baton.step_time.linear import LinearStepTime
from coordinator.decision_log import DecisionLog

NAMES = ("p0", "p1", "p2", "d0", "d1")
STEP = LinearStepTime(base_s=0.01, per_prefill_token_s=1e-4, per_decode_s=1e-5)
PACE = Pace(prefill=STEP, decode=STEP, handoff_s=0.01, handoff_per_byte_s=1e-9)
REPORT = RequestReport(
    outcome=Outcome.COMPLETED,
    num_prompt_tokens=1000,
    num_output_tokens=8,
    kv_bytes=4096,
    placement=Placement(prefill_worker="p0", decode_worker="d1", predicted_hit_tokens=64, hit_tokens=64),
    phases=PhaseTimes(queue_s=0.1, prefill_s=0.2, handoff_s=0.3, decode_s=0.4),
)


def worker_id(slot: int) -> str:
    return NAMES[slot]


def chosen(policy: str, slots: list[int], rng: random.Random) -> Choice:
    ledger = Ledger()
    capacity = WorkerCapacity(num_blocks=999, max_batch_size=64, max_model_len=9999, kv_bytes_per_block=1)
    for name in NAMES:
        account = ledger.open(name, capacity, 16)
        for leg in range(rng.randint(0, 5)):
            account.commit(
                f"{name}-{leg}", num_queued_tokens=rng.randint(0, 500), num_blocks=1, num_kv_tokens=9
            )
    facts = RequestFacts(num_prompt_tokens=1000, num_expected_output_tokens=64)
    hits = np.array([rng.choice([0, 64, 512, 992]) for _ in slots])
    candidates = Candidates(
        facts, ledger, np.array(slots), hit_tokens=hits, draw=rng.getrandbits(48), now_s=rng.random()
    )
    read_all(candidates)
    choice = choose(registry.by_name(policy), candidates)
    assert choice is not None
    return choice


def decision(seed: int, *, is_diverted: bool = False) -> Decision:
    rng = random.Random(seed)
    unguarded = chosen("lmetric", [0, 1, 2], rng)
    choice = chosen("lmetric", [1, 2], rng) if is_diverted else unguarded
    question = Question(
        num_prompt_tokens=1000,
        there=Rest(num_hit_tokens=rng.choice([0, 992]), num_queued_tokens=0, num_waiting=0),
        num_decodes=3, num_context_tokens=3000,
        prefill=Rest(num_hit_tokens=64, num_queued_tokens=rng.randint(0, 9000), num_waiting=1),
        num_bytes_to_move=10**7,
    )  # fmt: skip
    return Decision(
        handoff_id=f"h{seed}",
        prefill=PrefillChoice(registry.by_name("lmetric"), choice, unguarded),
        decode=chosen("smallest-batch", [3, 4], rng),
        stay_or_go=StayOrGo(question=question, pace=PACE, costs=costs(question, PACE)),
        left_out={"p9": "600 tokens queued, window 512"},
    )


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "decisions.jsonl"
    writer = DecisionLog(path)
    for seed in range(20):
        records = [record_decision(decision(seed, is_diverted=seed % 5 == 0), worker_id)]
        writer.write(f"r{seed}", records, REPORT)
    choice = chosen("lmetric", [3, 4], random.Random(5))
    colocated = Decision(
        handoff_id="hb", colocated=PrefillChoice(registry.by_name("lmetric"), choice, choice)
    )
    again = Decision(handoff_id="hd", decode=chosen("smallest-batch", [3, 4], random.Random(6)))
    records = [record_decision(made, worker_id) for made in (colocated, again)]
    writer.write("zmq3-mine", records, REPORT)
    writer.close()
    return path


def test_every_decision_is_made_again_the_same(log: Path, capsys):
    assert explain.main(["--replay", str(log)]) == 0
    assert "22 decisions of 21 requests decided again, 0 of them differently" in capsys.readouterr().out


def test_one_decision_with_all_terms_of_all_workers(log: Path, capsys):
    assert explain.main(["r3", "--log", str(log)]) == 0
    shown = capsys.readouterr().out
    for part in (
        "request r3: completed", "prefill, among workers with room", "decode, among workers with room",
        "hit_tokens", "num_queued_tokens", "key1", "stay or go, in request-seconds", "harm",
        "left out: p9, 600 tokens queued, window 512", "64 predicted, 64 found",
        "1.0000 s = queue 0.1000 + prefill 0.2000 + handoff 0.3000 + decode 0.4000",
    ):  # fmt: skip
        assert part in shown, part
    for name in NAMES:
        assert f" {name} " in shown


def test_the_last_one_and_ids_as_clients_know_them(log: Path, capsys):
    assert explain.main(["--last", "--log", str(log)]) == 0
    last = capsys.readouterr().out
    assert "request zmq3-mine" in last
    assert "colocated: both phases fell to one worker" in last
    assert "recomputed: the KV computed before was lost" in last
    assert explain.main(["mine", "--log", str(log)]) == 0
    assert capsys.readouterr().out == last


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("prefill.chosen", lambda _: "p7"),
        ("prefill.position", lambda old: (old + 1) % 3),
        ("prefill.facts.hit_tokens.0", lambda old: old + 16),
        ("prefill.terms.0.1", lambda old: old + 1),
        ("prefill.policy", lambda _: "round-robin"),
        ("decode.facts.num_legs.1", lambda old: old + 3),
        ("decode.chosen", lambda old: "d1" if old == "d0" else "d0"),
        ("way", lambda _: "colocated"),
        ("reason", lambda _: "because"),
        ("serves.decode", lambda _: "d7"),
        ("stay_or_go.costs.go_queue_s", lambda old: old + 1e-9),
        ("stay_or_go.question.num_decodes", lambda old: old + 1),
        ("stay_or_go.pace.handoff_s", lambda old: old * 2),
        ("decode.slots", lambda _: []),
        ("prefill.policy", lambda _: "nonsense"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_tampered_record_is_caught(log: Path, capsys, path: str, change):
    lines = log.read_text().splitlines()
    document = json.loads(lines[3])
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place = document["decisions"][0]
    for key in parents:
        place = place[key]
    place[last] = change(place[last])
    lines[3] = json.dumps(document)
    log.write_text("\n".join(lines) + "\n")
    assert explain.main(["--replay", str(log)]) == 1
    captured = capsys.readouterr()
    assert "1 of them differently" in captured.out
    assert f"{log}:4 r3: " in captured.err


def test_a_missing_field_is_a_difference(log: Path, capsys):
    lines = log.read_text().splitlines()
    document = json.loads(lines[0])
    del document["decisions"][0]["prefill"]["draw"]
    log.write_text(json.dumps(document) + "\n")
    assert explain.main(["--replay", str(log)]) == 1
    assert "cannot be decided again: KeyError: 'draw'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ([], 2, "give one of REQUEST_ID, --last and --replay FILE"),
        (["r1", "--last"], 2, "give one of"),
        (["--replay", "/nowhere/x"], 1, "No such file"),
        (["r99", "--log", "LOG"], 1, "holds no request r99"),
        (["--replay", "BROKEN"], 1, ":1 is no line of a decision log"),
        (["--last", "--log", "EMPTY"], 1, "holds no request yet"),
        (["--replay", "EMPTY"], 1, ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_mistakes_are_one_sentence(log: Path, tmp_path: Path, capsys, arguments, code, sentence):
    (tmp_path / "broken").write_text('{"decisions": 3}\n')
    (tmp_path / "empty").write_text("")
    files = {"LOG": str(log), "BROKEN": str(tmp_path / "broken"), "EMPTY": str(tmp_path / "empty")}
    assert explain.main([files.get(argument, argument) for argument in arguments]) == code
    assert sentence in capsys.readouterr().err


def test_the_log_is_bounded(tmp_path: Path):
    path = tmp_path / "log"
    writer = DecisionLog(path, max_bytes=2000)
    for number in range(50):
        writer.write(f"r{number}", [], REPORT)
    writer.close()
    assert {file.name for file in tmp_path.iterdir()} == {"log", "log.1"}
    assert path.stat().st_size <= 2000 and (tmp_path / "log.1").stat().st_size <= 2000
    assert '"r49"' in path.read_text().splitlines()[-1]


def test_a_log_that_cannot_be_written_costs_one_warning(tmp_path: Path, caplog):
    writer = DecisionLog(Path("/dev/full"))
    for _ in range(3):
        writer.write("r", [], REPORT)
    assert sum("decision log failed" in line.message for line in caplog.records) == 1
    with pytest.raises(OSError):
        DecisionLog(tmp_path / "no" / "such" / "folder")
