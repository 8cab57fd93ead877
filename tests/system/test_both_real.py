"""Workers for both phases on real engines: the same answers as from prefill and decode workers."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from baton import explain
from tests.system.cases import Case, all_cases
from tests.system.fleet import Answer, Fleet
from tests.system.reference import Expected
from tests.system.test_differential import CONCURRENCY, LOGPROB_TOLERANCE, ask_fleet

CASES = [case for case in all_cases() if case.derive is None][::2]
"""Of those whose parameters need no reference run, every other one: three fleets answer them."""


def answers(fleet: Fleet) -> list[Expected]:
    def ask(case: Case) -> Expected:
        nothing = Expected(params=case.params, prompt_token_ids=[], choices=[], prompt_logprobs=None)
        return ask_fleet(fleet, case, nothing)

    with ThreadPoolExecutor(CONCURRENCY) as threads:
        return list(threads.map(ask, CASES))


def is_close(left: list, right: list) -> bool:
    return len(left) == len(right) and all(
        (a is None) == (b is None)
        and all(abs(value - b[token]) < LOGPROB_TOLERANCE for token, value in (a or {}).items() if token in b)
        for a, b in zip(left, right, strict=True)
    )


def assert_equal(found: list[Expected], wanted: list[Expected]) -> None:
    for case, ours, theirs in zip(CASES, found, wanted, strict=True):
        for mine, other in zip(ours.choices, theirs.choices, strict=True):
            assert mine.token_ids == other.token_ids, case.name
            assert (mine.text, mine.finish_reason) == (other.text, other.finish_reason), case.name
            assert is_close(mine.logprobs or [], other.logprobs or []), case.name
        assert is_close(ours.prompt_logprobs or [], theirs.prompt_logprobs or []), case.name


def ways(path: Path) -> Counter[str]:
    return Counter(decision["way"] for _, line in explain.read_log(path) for decision in line["decisions"])


def test_answers_are_those_of_a_disaggregated_fleet(start_real_fleet, tmp_path: Path):
    """
    1. one prefill and one decode worker answer every case
    2. two workers for both phases answer the same, and hand nothing over
    3. so does a mixed fleet, whose worker for both phases gives, takes and keeps KV
    4. every decision of the two fleets is made again the same
    """
    wanted = answers(start_real_fleet())
    logs = [tmp_path / "both.jsonl", tmp_path / "mixed.jsonl"]
    both = start_real_fleet(coordinator=("--decision-log", str(logs[0])), roles=("both", "both"))
    assert_equal(answers(both), wanted)
    answer: Answer = both.complete([5, 6, 7], max_tokens=4)
    assert answer.headers["x-baton-way"] == "colocated; both phases fell to one worker"
    assert answer.headers["x-baton-kv-bytes"] == "0"
    assert set(ways(logs[0])) <= {"colocated", "prefill only"}
    both.wait_until_idle(40.0)
    mixed = start_real_fleet(
        coordinator=("--decision-log", str(logs[1])), roles=("prefill", "decode", "both")
    )
    assert_equal(answers(mixed), wanted)
    seen = ways(logs[1])
    assert seen["disaggregated"] > 0 and seen["colocated"] > 0, seen
    given = {decision["serves"]["prefill"] for decision in disaggregated(logs[1])}
    taken = {decision["serves"]["decode"] for decision in disaggregated(logs[1])}
    assert "both-1" in given and "both-1" in taken
    mixed.wait_until_idle(40.0)
    for log in logs:
        assert explain.main(["--replay", str(log)]) == 0


def disaggregated(path: Path) -> list[dict]:
    lines = [line for _, line in explain.read_log(path)]
    return [d for line in lines for d in line["decisions"] if d["way"] == "disaggregated"]
