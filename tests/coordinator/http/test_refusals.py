"""Everything wrong with a request is said before the core hears of it."""

from __future__ import annotations

import pytest

from baton.contract.errors import DeadlineUnreachable, Draining, NoWorkers, QueueFull
from coordinator.intake import FleetFacts

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"max_tokens": 0}, "max_tokens", ["max_tokens is 0"]),
        ({"max_tokens": 510}, "max_tokens", ["3 tokens", "510", "513", "512"]),
        ({"max_tokens": 10**30}, "max_tokens", ["512"]),
        ({"max_tokens": "many"}, "max_tokens", ["expected `int"]),
        ({"prompt": [1] * 600}, "prompt", ["600 tokens", "512"]),
        ({"prompt": [1] * 512}, "prompt", ["512 tokens"]),
        ({"prompt": []}, "prompt", ["empty"]),
        ({"prompt": ""}, "prompt", ["empty"]),
        ({"prompt": None}, "prompt", ["missing"]),
        ({"prompt": [[]]}, "prompt", ["prompt 0 is empty"]),
        ({"prompt": [-1]}, "prompt", ["-1"]),
        ({"prompt": [2**40]}, "prompt", [str(2**40)]),
        ({"prompt": [100_000]}, "prompt", ["100000", "the last is"]),
        ({"prompt": [1, "a"]}, "prompt", ["a"]),
        ({"prompt": ["a", 1]}, "prompt", ["prompt 1"]),
        ({"prompt": {"a": 1}}, "prompt", ["got `object`"]),
        ({"prompt": [1.5]}, "prompt[0]", ["float"]),
        ({"prompt": "x" * 20_000}, "prompt", ["20000 characters", "512"]),
        ({"temperature": -0.1}, "temperature", ["-0.1", "0 to 2"]),
        ({"temperature": 2.5}, "temperature", ["2.5"]),
        ({"top_p": 0}, "top_p", ["0"]),
        ({"top_p": 1.5}, "top_p", ["1.5"]),
        ({"top_k": -2}, "top_k", ["-2"]),
        ({"top_k": 2**40}, "top_k", [str(2**40)]),
        ({"min_p": 2}, "min_p", ["2"]),
        ({"presence_penalty": 3}, "presence_penalty", ["3", "-2 to 2"]),
        ({"frequency_penalty": -3}, "frequency_penalty", ["-3"]),
        ({"repetition_penalty": 0}, "repetition_penalty", ["0"]),
        ({"seed": 2**64}, "seed", [str(2**64), str(2**63 - 1)]),
        ({"n": 0}, "n", ["0"]),
        ({"n": 300}, "n", ["300", "256"]),
        ({"stop": [str(i) for i in range(17)]}, "stop", ["17", "16"]),
        ({"stop": ""}, "stop", ["empty"]),
        ({"stop": ["a", ""]}, "stop", ["empty"]),
        ({"stop_token_ids": [-1]}, "stop_token_ids", ["-1"]),
        ({"logprobs": 21}, "logprobs", ["21", "20"]),
        ({"logprobs": -1}, "logprobs", ["-1"]),
        ({"min_tokens": 20}, "min_tokens", ["20", "max_tokens (16)"]),
        ({"logit_bias": {"x": 1}}, "logit_bias", ["'x'"]),
        ({"logit_bias": {"99999": 1}}, "logit_bias", ["99999"]),
        ({"allowed_token_ids": []}, "allowed_token_ids", ["empty"]),
        ({"bad_words": [""]}, "bad_words", ["empty"]),
        ({"service": {"deadline_s": -1}}, "deadline_s", ["-1"]),
        ({"service": {"key": "k" * 200}}, "service", ["200", "128"]),
        ({"best_of": 3}, "best_of", ["3"]),
        ({"suffix": "x"}, "suffix", ["suffix"]),
        ({"use_beam_search": True}, "use_beam_search", ["use_beam_search"]),
        ({"cache_salt": "x"}, "cache_salt", ["cache_salt"]),
        ({"stream_options": {"include_usage": True}}, "stream_options", ["stream=true"]),
        ({"stream": True, "echo": True, "logprobs": 1}, "echo", ["echo"]),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", ["stream"]),
        ({"structured_outputs": {}}, "structured_outputs", ["no constraint"]),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", ["choice, regex"]),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs", ["not JSON"]),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", ["empty"]),
        ({"response_format": {"type": "json_schema"}}, "response_format", ["schema"]),
        ({"response_format": {"type": "xml"}}, "response_format.type", ["xml"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_completions(at_site, body, param, words):
    async def scenario(site):
        answer = await site.complete(**body)
        assert answer.status == 400, answer.body
        error = answer.error
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
        assert all(word in error["message"] for word in words), error["message"]
        assert site.intake.submissions == []

    at_site(scenario)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": 1}]}]}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"tools": []}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "a"}}],
                "tool_choice": {"type": "function", "function": {"name": "b"}},
            },
            "tool_choice",
        ),
        ({"chat_template": "{{ 1 / 0 }}"}, "messages"),
        ({"chat_template": "{% for %}"}, "messages"),
        ({"chat_template": "{{ raise_exception('no') }}"}, "messages"),
        ({"chat_template": "{{ ''.__class__.__mro__ }}"}, "messages"),
        ({"chat_template": ""}, "messages"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"echo": True}, "echo"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_chat(at_site, body, param):
    async def scenario(site):
        answer = await site.chat(**body)
        assert answer.status == 400, answer.body
        assert answer.error["param"] == param
        assert site.intake.submissions == []

    at_site(scenario)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"),
        (b"{", "not JSON"),
        (b"[]", "wrong shape"),
        (b'{"prompt": NaN}', "not JSON"),
        (b'{"model": "\xff"}', "UTF-8"),
        (b'{"prompt": "\\ud800"}', "not JSON"),
        (b'{"temperature": 1e999}', "out of range"),
        (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
        (b'{"structured_outputs": {"json": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}}", "nested"),
        (b"x" * 10_000_000, "10000000 bytes"),
        (b"\x80\x04\x95pickle", "not JSON"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_broken_bodies(at_site, body, words):
    async def scenario(site):
        for path in (COMPLETIONS, CHAT):
            answer = await site.post(path, body)
            assert answer.status == 400
            assert words in answer.error["message"]
            assert answer.error["code"] == "invalid_request"

    at_site(scenario)


def test_unknown_model_is_404_and_names_what_is_served(at_site):
    async def scenario(site):
        answer = await site.complete(model="gpt-9")
        assert (answer.status, answer.error["code"]) == (404, "model_not_found")
        assert "served: /models/demo, demo" in answer.error["message"]
        assert (await site.complete(model="demo", max_tokens=1)).json["model"] == "demo"

    at_site(scenario)


def test_served_names_replace_the_path(at_site):
    async def scenario(site):
        assert (await site.complete(model="demo")).status == 404
        assert (await site.complete(model="a", max_tokens=1)).status == 200
        assert [card["id"] for card in (await site.ask("GET", "/v1/models")).json["data"]] == ["a", "b"]

    at_site(scenario, served_model_names=("a", "b"))


@pytest.mark.parametrize(
    ("refusal", "status", "code", "retry_after"),
    [
        (QueueFull("4096 requests wait", retry_after_s=2.3), 429, "queue_full", "3"),
        (NoWorkers("no pair"), 503, "no_workers", "1"),
        (Draining("leaving"), 503, "draining", "5"),
        (DeadlineUnreachable("20 s of 5", retry_after_s=15.0), 429, "deadline_unreachable", "15"),
        (DeadlineUnreachable("even an idle fleet needs 6 s of 5"), 429, "deadline_unreachable", None),
    ],
    ids=["queue full", "no workers", "draining", "late in line", "late anyhow"],
)
def test_what_the_core_refuses(at_site, refusal, status, code, retry_after):
    async def scenario(site):
        site.intake.refusal = refusal
        answer = await site.complete(max_tokens=1, stream=True)
        assert (answer.status, answer.error["code"]) == (status, code)
        assert answer.headers.get("retry-after") == retry_after
        assert "x-request-id" in answer.headers

    at_site(scenario)


def test_a_batch_refused_half_way_leaves_nothing_behind(at_site):
    async def scenario(site):
        site.intake.refusal, site.intake.refuse_after = QueueFull("full"), 2
        answer = await site.complete(n=4)
        assert answer.status == 429
        assert len(site.intake.aborted) == 2
        assert not site.intake.in_flight

    at_site(scenario)


def test_before_any_worker_registered(at_site):
    async def scenario(site):
        site.intake.current = FleetFacts(is_ready=False, model=None, max_model_len=None)
        answer = await site.complete()
        assert (answer.status, answer.error["code"]) == (503, "no_workers")
        assert (await site.ask("GET", "/ready")).status == 503
        assert (await site.ask("GET", "/v1/models")).json["data"] == []

    at_site(scenario)


def test_without_tokenizer_token_ids_work_and_text_is_told_why_not(at_site):
    async def scenario(site):
        assert (await site.complete(max_tokens=1)).status == 200
        for answer in (await site.complete(prompt="hi"), await site.chat()):
            assert (answer.status, answer.error["code"]) == (400, "unsupported_feature")
            assert "Send token ids" in answer.error["message"]

    at_site(scenario, with_tokenizer=False)


def test_api_key(at_site):
    async def scenario(site):
        answer = await site.complete()
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
        body = {"prompt": [1], "max_tokens": 1}
        assert (await site.post(COMPLETIONS, body, {"authorization": "Bearer wrong"})).status == 401
        assert (await site.post(COMPLETIONS, body, {"authorization": "Bearer sésame"})).status == 401
        assert (await site.post(COMPLETIONS, body, {"authorization": "Bearer sesame"})).status == 200
        assert (await site.ask("GET", "/health")).status == 200

    at_site(scenario, api_key="sesame")
