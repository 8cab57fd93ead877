"""/v1/chat/completions as clients see it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from baton.contract.tokens import unpack_token_ids
from tests.coordinator.http.fake_intake import Script

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


def test_a_whole_answer(at_site):
    async def scenario(site):
        answer = await site.chat(max_completion_tokens=2)
        assert answer.json["object"] == "chat.completion"
        assert answer.json["id"].startswith("chatcmpl-")
        choice = answer.json["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": " t0 t1"}
        assert choice["finish_reason"] == "length"

    at_site(scenario)


def test_the_role_comes_with_the_first_token_and_not_before(at_site):
    """Benchmark clients take the first event with a choice as the first token."""

    async def scenario(site):
        answer = await site.chat(max_tokens=3, stream=True)
        deltas = [e["choices"][0]["delta"] for e in answer.events[:-1]]
        assert deltas == [{"role": "assistant", "content": " t0"}, {"content": " t1"}, {"content": " t2"}]
        assert {e["object"] for e in answer.events[:-1]} == {"chat.completion.chunk"}

    at_site(scenario)


def test_max_tokens_fills_the_context_by_default(at_site):
    async def scenario(site):
        site.intake.script = lambda s: Script(texts=["x"])
        await site.chat()
        submission = site.intake.submissions[0]
        num_prompt = len(unpack_token_ids(submission.prompt_token_ids))
        assert submission.sampling.max_tokens == 512 - num_prompt

    at_site(scenario)


def test_the_template_writes_special_tokens_once(at_site):
    async def scenario(site):
        await site.chat(max_tokens=1)
        ids = unpack_token_ids(site.intake.submissions[0].prompt_token_ids)
        assert ids.count(0) == 1  # <s> is id 0
        parts = [{"type": "text", "text": "hi"}]
        await site.chat(messages=[{"role": "user", "content": parts}], max_tokens=1)
        assert unpack_token_ids(site.intake.submissions[1].prompt_token_ids) == ids

    at_site(scenario)


def test_logprobs_in_chat_shape(at_site):
    async def scenario(site):
        answer = await site.chat(max_tokens=1, logprobs=True, top_logprobs=2)
        (entry,) = answer.json["choices"][0]["logprobs"]["content"]
        assert (entry["token"], entry["logprob"], entry["bytes"]) == (" t0", -0.5, [32, 116, 48])
        assert [top["token"] for top in entry["top_logprobs"]] == [" t0", "alt0"]
        streamed = await site.chat(max_tokens=2, logprobs=True, stream=True)
        assert streamed.events[0]["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []

    at_site(scenario)


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
def test_a_named_tool_takes_all_text_as_arguments(at_site, is_stream):
    async def scenario(site):
        site.intake.script = lambda s: Script(texts=['{"city"', ': "Bern"}'], finish_reason="stop")
        choice = {"type": "function", "function": {"name": "weather"}}
        answer = await site.chat(tools=[WEATHER, CLOCK], tool_choice=choice, stream=is_stream)
        schema = site.intake.submissions[0].sampling.structured_output.json_schema
        assert schema == WEATHER["function"]["parameters"]
        (call,), reason = calls_of(answer, is_stream)
        assert call["function"] == {"name": "weather", "arguments": '{"city": "Bern"}'}
        assert call["id"].startswith("call_")
        assert reason == "stop"

    at_site(scenario)


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
def test_required_reads_an_array_of_calls(at_site, is_stream):
    text = '[{"name": "weather", "parameters": {"city": "a}\\"{b"}}, {"name": "clock", "parameters": {}}]'

    async def scenario(site):
        site.intake.script = lambda s: Script(texts=list(text), finish_reason="stop")
        answer = await site.chat(tools=[WEATHER, CLOCK], tool_choice="required", stream=is_stream)
        schema = site.intake.submissions[0].sampling.structured_output.json_schema
        assert (schema["type"], schema["minItems"], len(schema["items"]["anyOf"])) == ("array", 1, 2)
        (first, second), reason = calls_of(answer, is_stream)
        assert json.loads(first["function"]["arguments"]) == {"city": 'a}"{b'}
        assert (second["function"]["name"], second["function"]["arguments"]) == ("clock", "{}")
        assert reason == "tool_calls"

    at_site(scenario)


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
def test_hermes_text_becomes_calls_and_stays_content_around_them(at_site, is_stream):
    text = 'Look: <tool_call>\n{"name": "clock", "arguments": {"a": 1}}\n</tool_call>'

    async def scenario(site):
        site.intake.script = lambda s: Script(texts=list(text), finish_reason="stop")
        answer = await site.chat(tools=[CLOCK], stream=is_stream)
        (call,), reason = calls_of(answer, is_stream)
        assert call["function"] == {"name": "clock", "arguments": '{"a": 1}'}
        assert reason == "tool_calls"
        assert content_of(answer, is_stream) == "Look: "

    at_site(scenario, tool_call_parser="hermes")


@pytest.mark.parametrize("text", ["a < b <tool", "<tool_call>not json</tool_call> x", "<tool_call>{"])
def test_hermes_leaves_what_is_no_call_alone(at_site, text):
    async def scenario(site):
        site.intake.script = lambda s: Script(texts=list(text), finish_reason="stop")
        for is_stream in (False, True):
            answer = await site.chat(tools=[CLOCK], stream=is_stream)
            calls, reason = calls_of(answer, is_stream)
            assert (calls, reason, content_of(answer, is_stream)) == ([], "stop", text)

    at_site(scenario, tool_call_parser="hermes")


def test_auto_without_parser_leaves_text_alone_and_shows_tools_to_the_template(at_site):
    async def scenario(site):
        site.intake.script = lambda s: Script(texts=["<tool_call>{}</tool_call>"], finish_reason="stop")
        answer = await site.chat(tools=[CLOCK])
        assert content_of(answer, False) == "<tool_call>{}</tool_call>"
        prompt = await site.post(
            "/detokenize", {"tokens": unpack_token_ids(site.intake.submissions[0].prompt_token_ids)}
        )
        assert '"name": "clock"' in prompt.json["prompt"]

    at_site(scenario)


@pytest.mark.parametrize(
    ("body", "field", "value"),
    [
        pytest.param({"response_format": {"type": "json_object"}}, "json_object", True, id="json_object"),
        pytest.param(
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "null"}},
                }
            },
            "json_schema",
            {"type": "null"},
            id="json_schema",
        ),
        pytest.param({"structured_outputs": {"regex": "a+"}}, "regex", "a+", id="regex"),
        pytest.param({"structured_outputs": {"choice": ["a", "b"]}}, "choice", ["a", "b"], id="choice"),
        pytest.param(
            {"structured_outputs": {"grammar": "root ::= x"}}, "grammar", "root ::= x", id="grammar"
        ),
        pytest.param({"structured_outputs": {"json": "{}"}}, "json_schema", "{}", id="json text"),
        pytest.param(
            {"response_format": {"type": "structural_tag", "structures": [], "triggers": ["<f"]}},
            "structural_tag",
            '{"type": "structural_tag", "structures": [], "triggers": ["<f"]}',
            id="structural tag",
        ),
    ],
)
def test_structured_output(at_site, body, field, value):
    async def scenario(site):
        assert (await site.chat(max_tokens=1, **body)).status == 200
        assert getattr(site.intake.submissions[0].sampling.structured_output, field) == value

    at_site(scenario)


def calls_of(answer, is_stream):
    """(tool calls, finish_reason), streamed pieces put together by index."""
    assert answer.status == 200, answer.body
    if not is_stream:
        choice = answer.json["choices"][0]
        return choice["message"].get("tool_calls", []), choice["finish_reason"]
    choices = [e["choices"][0] for e in answer.events[:-1]]
    calls: dict[int, Any] = {}
    for choice in choices:
        for part in choice["delta"].get("tool_calls", []):
            if part["index"] in calls:
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
            else:
                calls[part["index"]] = part
    roles = [choice["delta"]["role"] for choice in choices if "role" in choice["delta"]]
    assert roles == ["assistant"] and "role" in choices[0]["delta"]
    return list(calls.values()), choices[-1]["finish_reason"]


def content_of(answer, is_stream):
    if not is_stream:
        return answer.json["choices"][0]["message"]["content"]
    return "".join(e["choices"][0]["delta"].get("content", "") for e in answer.events[:-1])
