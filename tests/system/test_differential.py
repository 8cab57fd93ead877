"""What the fleet answers equals what stock vLLM answers alone: every token, every log probability.

The reference run (reference.py) takes the same cases (cases.py) through one engine without Baton.
Token ids are compared, not only text. The last tests show that the comparison would notice.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from baton.client import AsyncBatonClient
from baton.contract.sampling import SamplingSpec, StructuredOutput
from tests.system.cases import KINDS, Case, all_cases
from tests.system.fleet import Fleet
from tests.system.reference import Choice, Expected

CONCURRENCY = 8
LOGPROB_TOLERANCE = 1e-4
REFERENCE_TIMEOUT_S = 400

CASES = all_cases()

Pairs = list[tuple[Case, Expected]]


@pytest.fixture(scope="session")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Expected]:
    """One answer per case, from a process of its own that ends before this returns."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "cases").write_bytes(msgspec.msgpack.encode(CASES))
    command = [sys.executable, "-m", "tests.system.reference", str(model), *("cases", "answers")]
    with (folder / "log").open("wb") as log:
        ended = subprocess.run(
            command[:4] + [str(folder / name) for name in command[4:]],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, timeout=REFERENCE_TIMEOUT_S,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
    assert ended.returncode == 0, (folder / "log").read_text()[-4000:]
    return msgspec.msgpack.decode((folder / "answers").read_bytes(), type=list[Expected])


@pytest.fixture(scope="session")
def answered(expected: list[Expected], _one_fleet: Any) -> dict[str, Expected | Exception]:
    """The fleet's answer to each case by name, all cases sent at once, eight in flight."""
    fleet = _one_fleet.start()
    fleet.wait_until_idle()
    with ThreadPoolExecutor(CONCURRENCY) as threads:

        def ask(pair: tuple[Case, Expected]) -> Expected | Exception:
            try:
                return ask_fleet(fleet, *pair)
            except Exception as error:  # reported by the test of that case, with its name
                return error

        answers = list(threads.map(ask, zip(CASES, expected, strict=True)))
    return {case.name: answer for case, answer in zip(CASES, answers, strict=True)}


# ── asking ───────────────────────────────────────────────────────────────────────────────────


def ask_fleet(fleet: Fleet, case: Case, wanted: Expected) -> Expected:
    """The answer in the reference's shape."""
    if case.door == "zmq":
        return asyncio.run(_ask_zmq(fleet, case, wanted))
    body: dict[str, Any] = {
        **wanted.params, "return_token_ids": True, "return_tokens_as_token_ids": True, "echo": case.echo,
    }  # fmt: skip
    if case.door == "chat":
        return _ask_chat(fleet, case, body)
    body |= {"prompt": case.prompt}
    if case.door == "streamed":
        return _ask_streamed(fleet, body)
    if case.echo:
        del body["prompt_logprobs"]  # echo itself shows them
    answer = fleet.ask("POST", "/v1/completions", body)
    assert answer.status == 200, answer.body
    choices = answer.json["choices"]
    num_prompt = answer.json["usage"]["prompt_tokens"] if case.echo else 0
    return Expected(
        params=wanted.params,
        prompt_token_ids=choices[0]["prompt_token_ids"],
        choices=[
            _choice(choice, choice["token_ids"], _positions(choice["logprobs"], start=num_prompt))
            for choice in choices
        ],
        prompt_logprobs=_positions(choices[0]["logprobs"], end=num_prompt)
        if case.echo
        else _prompt_positions(choices[0].get("prompt_logprobs")),
    )


def _ask_streamed(fleet: Fleet, body: dict[str, Any]) -> Expected:
    merged: dict[int, dict[str, Any]] = {}
    prompt_token_ids: list[int] = []
    stream = fleet.stream("/v1/completions", body)
    try:
        for event in stream:
            assert "error" not in event, event
            (choice,) = event["choices"]
            prompt_token_ids = choice.get("prompt_token_ids") or prompt_token_ids
            whole = merged.setdefault(choice["index"], {"text": "", "token_ids": [], "logprobs": None})
            whole["text"] += choice["text"]
            whole["token_ids"] += choice["token_ids"]
            if choice["logprobs"] is not None:
                whole["logprobs"] = (whole["logprobs"] or []) + (_positions(choice["logprobs"]) or [])
            whole |= {name: choice[name] for name in ("finish_reason", "stop_reason") if name in choice}
        assert stream.is_done
    finally:
        stream.close()
    choices = [_choice(merged[i], merged[i]["token_ids"], merged[i]["logprobs"]) for i in sorted(merged)]
    return Expected(params=body, prompt_token_ids=prompt_token_ids, choices=choices, prompt_logprobs=None)


def _ask_chat(fleet: Fleet, case: Case, body: dict[str, Any]) -> Expected:
    body = {**body, "messages": [{"role": "user", "content": case.prompt}]}
    del body["echo"]
    if "logprobs" in body:
        body |= {"top_logprobs": body["logprobs"], "logprobs": True}
    answer = fleet.ask("POST", "/v1/chat/completions", body)
    assert answer.status == 200, answer.body
    choices = []
    for choice in answer.json["choices"]:
        logprobs = choice["logprobs"]
        positions = logprobs and [
            {_token_id(entry["token"]): entry["logprob"] for entry in [position, *position["top_logprobs"]]}
            for position in logprobs["content"]
        ]
        choice["text"] = choice["message"]["content"]
        choices.append(_choice(choice, choice["token_ids"], positions))
    return Expected(
        params=body, prompt_token_ids=answer.json["prompt_token_ids"], choices=choices, prompt_logprobs=None
    )


async def _ask_zmq(fleet: Fleet, case: Case, wanted: Expected) -> Expected:
    options = {**wanted.params}
    if structured := options.pop("structured_outputs", None):
        names = {"json": "json_schema"}
        fields = {names.get(name, name): value for name, value in structured.items()}
        options["structured_output"] = StructuredOutput(**fields)
    if bias := options.pop("logit_bias", None):
        options["logit_bias"] = {int(token): value for token, value in bias.items()}
    assert set(options) <= set(SamplingSpec.__struct_fields__)
    choice = Choice(token_ids=[], text="", finish_reason=None, stop_reason=None, logprobs=None)
    async with AsyncBatonClient(fleet.client_address) as client:
        stream = client.submit(case.prompt, **options)
        async for delta in stream:
            choice.token_ids += delta.token_ids
            choice.text += delta.text
            if delta.logprobs is not None:
                values = [
                    {entry.token_id: entry.logprob for entry in position} for position in delta.logprobs
                ]
                choice.logprobs = (choice.logprobs or []) + values
    report = stream.report
    assert report is not None
    choice.finish_reason, choice.stop_reason = report.finish_reason, report.stop_reason
    return Expected(
        params=options, prompt_token_ids=wanted.prompt_token_ids, choices=[choice], prompt_logprobs=None
    )


def _choice(
    choice: dict[str, Any], token_ids: list[int], logprobs: list[dict[int, float] | None] | None
) -> Choice:
    return Choice(
        token_ids=token_ids,
        text=choice["text"],
        finish_reason=choice["finish_reason"],
        stop_reason=choice["stop_reason"],
        logprobs=None if logprobs is None else [position or {} for position in logprobs],
    )


def _token_id(name: str) -> int:
    return int(name.removeprefix("token_id:"))


def _positions(
    logprobs: Any, *, start: int = 0, end: int | None = None
) -> list[dict[int, float] | None] | None:
    """OpenAI's completion log probabilities, token names being `token_id:N`."""
    if logprobs is None:
        return None
    return [
        None if top is None else {_token_id(token): value for token, value in top.items()}
        for top in logprobs["top_logprobs"][start:end]
    ]


def _prompt_positions(positions: Any) -> list[dict[int, float] | None] | None:
    if positions is None:
        return None
    return [p and {int(token): entry["logprob"] for token, entry in p.items()} for p in positions]


# ── comparing ────────────────────────────────────────────────────────────────────────────────


def differences(case: Case, wanted: Expected, got: Expected) -> list[str]:
    found = []
    if got.prompt_token_ids != wanted.prompt_token_ids:
        found.append(f"prompt {got.prompt_token_ids} instead of {wanted.prompt_token_ids}")
    if len(got.choices) != len(wanted.choices):
        found.append(f"{len(got.choices)} choices instead of {len(wanted.choices)}")
    for number, (ours, theirs) in enumerate(zip(got.choices, wanted.choices, strict=False)):
        text = ours.text
        if case.echo:
            assert text.endswith(theirs.text) or not found
            text = theirs.text if text.endswith(theirs.text) else text
        for name, mine, other in (
            ("tokens", ours.token_ids, theirs.token_ids),
            ("text", text, theirs.text),
            ("finish_reason", ours.finish_reason, theirs.finish_reason),
            ("stop_reason", ours.stop_reason, theirs.stop_reason),
        ):
            if mine != other:
                found.append(f"choice {number}: {name} {mine!r} instead of {other!r}")
        found += [f"choice {number}: {text}" for text in _far(ours.logprobs, theirs.logprobs)]
    if wanted.prompt_logprobs is not None:
        found += [f"prompt: {text}" for text in _far(got.prompt_logprobs, wanted.prompt_logprobs)]
    return found


def _far(ours: Any, theirs: Any) -> list[str]:
    """Where log probabilities are not the reference's."""
    if ours is None or theirs is None:
        return [] if ours is theirs else [f"logprobs {ours} instead of {theirs}"]
    if len(ours) != len(theirs):
        return [f"logprobs of {len(ours)} tokens instead of {len(theirs)}"]
    found = []
    for position, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if (mine or {}).keys() != (other or {}).keys():
            found.append(f"logprobs at {position} name {mine} instead of {other}")
            continue
        for token, value in (mine or {}).items():
            if abs(value - other[token]) > LOGPROB_TOLERANCE:
                found.append(f"logprob of {token} at {position} is {value} instead of {other[token]}")
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_answers_equal_the_colocated_ones(
    kind: str, expected: list[Expected], answered: dict[str, Expected | Exception]
) -> None:
    failures = []
    num_compared = 0
    for case, wanted in zip(CASES, expected, strict=True):
        if case.kind != kind:
            continue
        num_compared += 1
        got = answered[case.name]
        if isinstance(got, Exception):
            failures.append(f"{case.name}: {got!r}")
        else:
            failures += [f"{case.name}: {text}" for text in differences(case, wanted, got)]
    assert num_compared >= 7
    assert not failures, "\n".join(failures)


def test_the_fleet_really_was_one(answered: dict[str, Expected | Exception], real_fleet: Fleet) -> None:
    """KV moved for nearly every case; nothing was recomputed, preempted or left behind."""
    decode = real_fleet.workers()["decode-1"]["load"]
    num_moved = sum(case.params["max_tokens"] > 1 for case in CASES)
    assert decode["num_kv_transfers"] > 0.8 * num_moved
    assert decode["num_kv_transfer_failures"] == 0
    assert decode["num_preemptions"] == 0


def test_there_are_enough_cases_and_their_answers_differ(expected: list[Expected]) -> None:
    """Equality would prove nothing if all answers were alike."""
    assert len(CASES) >= 200
    assert {case.door for case in CASES} == {"completions", "streamed", "chat", "zmq"}
    free = [
        (case.name, tuple(answer.choices[0].token_ids))
        for case, answer in zip(CASES, expected, strict=True)
        if case.kind.startswith("greedy") and len(answer.choices[0].token_ids) >= 6
    ]
    repeated = sum(", time " in name and "time 1" not in name for name, _ in free)
    assert len({tokens for _, tokens in free}) >= 0.97 * (len(free) - repeated)


def _shift_logprob(answer: Expected) -> None:
    assert answer.choices[0].logprobs is not None
    position = answer.choices[0].logprobs[1]
    position[next(iter(position))] += 2 * LOGPROB_TOLERANCE


def _change_token(answer: Expected) -> None:
    answer.choices[0].token_ids[-1] ^= 1


def _drop_token(answer: Expected) -> None:
    answer.choices[0].token_ids.pop()


def _change_text(answer: Expected) -> None:
    answer.choices[0].text += " "


def _change_end(answer: Expected) -> None:
    answer.choices[0].finish_reason = "stop"


@pytest.mark.parametrize("spoil", [_shift_logprob, _change_token, _drop_token, _change_text, _change_end])
def test_the_comparison_notices(expected: list[Expected], spoil: Callable[[Expected], None]) -> None:
    """Negative control: one thing wrong in an answer is one difference."""
    case, wanted = next(
        pair for pair in zip(CASES, expected, strict=True) if pair[0].kind == "greedy logprobs"
    )
    got = msgspec.convert(msgspec.to_builtins(wanted, str_keys=False), Expected)
    assert differences(case, wanted, got) == []
    spoil(got)
    assert len(differences(case, wanted, got)) == 1
