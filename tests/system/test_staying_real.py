"""Stay or go on real engines: a conversation whose turns are computed where the last one was decoded."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from baton import explain
from tests.system.fleet import Answer, Fleet

NUM_TURNS, NUM_NEW, NUM_OUTPUT = 4, 20, 64


def converse(fleet: Fleet) -> tuple[list[Answer], list[int]]:
    """Each turn is all before it, the answer included, and some new tokens."""
    rng = random.Random(7)
    history = [rng.randrange(256, 2000) for _ in range(300)]
    answers, tokens = [], []
    for _ in range(NUM_TURNS):
        answer = fleet.complete(
            history, max_tokens=NUM_OUTPUT, temperature=0, ignore_eos=True, return_token_ids=True
        )
        assert answer.status == 200, answer.body
        output: list[int] = answer.json["choices"][0]["token_ids"]
        answers.append(answer)
        tokens += output
        history = history + output + [rng.randrange(256, 2000) for _ in range(NUM_NEW)]
    return answers, tokens


def test_later_turns_stay_and_say_the_same(start_real_fleet: Any, tmp_path: Path):
    """
    1. a fleet that does not know its pace hands every turn over
    2. one that takes itself for an H100 (a hand-off of milliseconds, no sequence to harm) computes later
       turns where the turn before was decoded, with the hits it predicted, and answers the same tokens
    3. the log says why, and decides again the same
    """
    gone, wanted = converse(start_real_fleet())
    assert {answer.headers["x-baton-way"].partition(";")[0] for answer in gone} == {"disaggregated"}
    log = tmp_path / "decisions.jsonl"
    flags = ("--step-time", "H100:Llama-3.1-8B", "--decision-log", str(log))
    fleet = start_real_fleet(coordinator=flags)
    (first, *later), tokens = converse(fleet)
    assert tokens == wanted
    assert first.headers["x-baton-way"] == "disaggregated; the decode worker holds no more of the prompt"
    for answer in later:
        headers = answer.headers
        assert headers["x-baton-way"] == "stayed; computing the rest there costs less than a hand-off"
        assert headers["x-baton-prefill-worker"] == headers["x-baton-decode-worker"] == "decode-1"
        assert headers["x-baton-hit-tokens"] == headers["x-baton-hit-tokens-predicted"] != "0"
        assert headers["x-baton-kv-bytes"] == "0"
    fleet.wait_until_idle(40.0)
    assert explain.main(["--replay", str(log)]) == 0
    assert explain.main(["--last", "--log", str(log)]) == 0
