"""/v1/completions as clients see it."""

from __future__ import annotations

from baton.contract.tokens import unpack_token_ids
from tests.coordinator.http.conftest import request_bytes
from tests.coordinator.http.fake_intake import Script


def test_a_whole_answer(at_site):
    async def scenario(site):
        answer = await site.complete(max_tokens=3)
        assert answer.status == 200
        body = answer.json
        assert body["object"] == "text_completion"
        assert body["model"] == "/models/demo"
        assert body["id"] == f"cmpl-{answer.headers['x-request-id']}"
        assert body["choices"] == [
            {
                "index": 0,
                "text": " t0 t1 t2",
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ]
        assert body["usage"] == {
            "prompt_tokens": 3, "total_tokens": 6, "completion_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 2},
        }  # fmt: skip
        assert answer.headers["x-baton-prefill-worker"] == "prefill-0"
        assert answer.headers["x-baton-decode-worker"] == "decode-0"
        assert answer.headers["x-baton-first-token"] == "prefill; plain sampling"
        assert answer.headers["x-baton-handoff-ms"] == "3.0"
        assert answer.headers["x-baton-attempts"] == "1"
        assert answer.headers["x-baton-way"] == "disaggregated; two workers"
        assert answer.headers["x-baton-transfer"] == "pull; no streams"
        assert answer.headers["x-baton-hit-tokens-predicted"] == "2"
        assert answer.headers["x-baton-hit-tokens"] == "2"
        assert answer.headers["x-baton-kv-bytes"] == "1024"
        assert unpack_token_ids(site.intake.submissions[0].prompt_token_ids) == [1, 2, 3]

    at_site(scenario)


def test_a_stream_begins_with_its_first_token_and_ends_with_usage_and_done(at_site):
    async def scenario(site):
        answer = await site.complete(max_tokens=2, stream=True, stream_options={"include_usage": True})
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-baton-first-token"] == "prefill; plain sampling"
        first, last, usage, done = answer.events
        assert first["choices"] == [{"index": 0, "text": " t0", "logprobs": None, "finish_reason": None}]
        assert last["choices"][0]["text"] == " t1"
        assert last["choices"][0]["finish_reason"] == "length"
        assert "usage" not in first
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] == 2
        assert usage["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
        assert usage["baton"] == {
            "prefill_worker": "prefill-0", "decode_worker": "decode-0", "way": "disaggregated; two workers",
            "transfer": "pull; no streams", "first_token": "prefill; plain sampling",
            "hit_tokens_predicted": 2, "hit_tokens": 2, "queue_ms": 1.0, "prefill_ms": 2.0,
            "handoff_ms": 3.0, "decode_ms": 4.0, "attempts": 1, "resumes": 0, "kv_bytes": 1024,
        }  # fmt: skip
        assert {event["object"] for event in (first, last, usage)} == {"text_completion"}
        assert done == "[DONE]"

    at_site(scenario)


def test_a_client_that_reads_trailers_hears_the_phase_times_of_a_stream(at_site):
    async def scenario(site):
        body = {"prompt": [1, 2, 3], "max_tokens": 2, "stream": True}
        for headers, is_told in (({}, False), ({"te": "trailers, deflate"}, True)):
            headers = headers | {"connection": "close"}
            raw = await site.raw(request_bytes("POST", "/v1/completions", body, headers))
            head, _, rest = raw.partition(b"\r\n\r\n")
            assert b"x-baton-way: disaggregated; two workers" in head
            end = rest.rpartition(b"data: [DONE]\n\n\r\n0\r\n")[2]
            if is_told:
                lines = dict(line.split(b": ") for line in end.removesuffix(b"\r\n\r\n").split(b"\r\n"))
                assert lines[b"x-baton-handoff-ms"] == b"3.0" and lines[b"x-baton-hit-tokens"] == b"2"
            else:
                assert end == b"\r\n"

    at_site(scenario)


def test_continuous_usage_rides_on_each_event(at_site):
    async def scenario(site):
        options = {"include_usage": True, "continuous_usage_stats": True}
        answer = await site.complete(max_tokens=3, stream=True, stream_options=options)
        counts = [e["usage"]["completion_tokens"] for e in answer.events if e != "[DONE]"]
        assert counts == [1, 2, 3, 3]

    at_site(scenario)


def test_text_prompts_get_special_tokens_and_token_ids_do_not(at_site):
    async def scenario(site):
        assert (await site.complete(prompt="the fox", max_tokens=1)).status == 200
        assert (await site.complete(prompt="the fox", max_tokens=1, add_special_tokens=False)).status == 200
        with_bos, without = (unpack_token_ids(s.prompt_token_ids) for s in site.intake.submissions)
        assert with_bos == [0, *without]

    at_site(scenario)


def test_n_times_a_batch_is_joined_and_seeds_count_up(at_site):
    """
    1. two prompts, two choices each, seed 7: four submissions under one parent id
    2. choices are numbered prompt by prompt; each prompt is counted once in usage
    """

    async def scenario(site):
        answer = await site.post(
            "/v1/completions",
            {"prompt": [[1, 2], [3, 4, 5]], "n": 2, "seed": 7, "max_tokens": 2},
            {"x-request-id": "parent"},
        )
        assert [s.request_id for s in site.intake.submissions] == [f"parent-{i}" for i in range(4)]
        assert [s.sampling.seed for s in site.intake.submissions] == [7, 8, 7, 8]
        assert [c["index"] for c in answer.json["choices"]] == [0, 1, 2, 3]
        usage = answer.json["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (5, 8)

    at_site(scenario)


def test_streamed_choices_interleave_and_all_end(at_site):
    async def scenario(site):
        answer = await site.complete(n=3, max_tokens=4, stream=True, temperature=1.0)
        events = [e for e in answer.events if e != "[DONE]"]
        for index in range(3):
            mine = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
            assert "".join(choice["text"] for choice in mine) == " t0 t1 t2 t3"
            assert [choice["finish_reason"] for choice in mine] == [None, None, None, "length"]

    at_site(scenario)


def test_one_failing_choice_aborts_the_rest(at_site):
    async def scenario(site):
        site.intake.script = lambda s: (
            Script(fails_after=0) if s.request_id.endswith("-1") else Script(is_held=True)
        )
        answer = await site.complete(n=3, max_tokens=4)
        assert answer.status == 502
        assert answer.error["code"] == "worker_lost"
        await site.until(lambda: not site.intake.in_flight)
        assert len(site.intake.aborted) == 2

    at_site(scenario)


def test_failure_in_a_stream_is_an_event_then_done(at_site):
    async def scenario(site):
        site.intake.script = lambda s: Script(fails_after=2)
        answer = await site.complete(max_tokens=5, stream=True)
        assert answer.status == 200
        *_, error, done = answer.events
        assert error["error"]["code"] == "worker_lost"
        assert error["error"]["phase"] == "decode"
        assert done == "[DONE]"

    at_site(scenario)


def test_failure_before_the_first_byte_has_its_own_status(at_site):
    async def scenario(site):
        site.intake.script = lambda s: Script(fails_after=0)
        answer = await site.complete(max_tokens=5, stream=True)
        assert answer.status == 502
        assert answer.error["message"] == "decode-0 left"
        assert answer.headers["x-baton-decode-worker"] == "decode-0"

    at_site(scenario)


def test_stop_reason_and_stop_strings(at_site):
    async def scenario(site):
        site.intake.script = lambda s: Script(texts=["a", "b"], finish_reason="stop", stop_reason="END")
        answer = await site.complete(max_tokens=9, stop="END")
        assert site.intake.submissions[0].sampling.stop == ["END"]
        choice = answer.json["choices"][0]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "END")

    at_site(scenario)


def test_logprobs_list_the_chosen_token_and_alternatives(at_site):
    async def scenario(site):
        whole = (await site.complete(max_tokens=2, logprobs=2)).json["choices"][0]["logprobs"]
        assert whole == {
            "text_offset": [0, 3],
            "token_logprobs": [-0.5, -0.5],
            "tokens": [" t0", " t1"],
            "top_logprobs": [{" t0": -0.5, "alt0": -1.0}, {" t1": -0.5, "alt0": -1.0}],
        }
        streamed = await site.complete(max_tokens=2, logprobs=0, stream=True)
        parts = [e["choices"][0]["logprobs"] for e in streamed.events if e != "[DONE]"]
        assert [part["text_offset"] for part in parts] == [[0], [3]]
        assert parts[1]["top_logprobs"] == [{" t1": -0.5}]

    at_site(scenario)


def test_echo_gives_prompt_text_and_its_logprobs(at_site):
    """max_tokens=0 with echo scores a prompt: evaluation harnesses do this."""

    async def scenario(site):
        answer = await site.complete(prompt="the fox", echo=True, max_tokens=0, logprobs=1)
        choice = answer.json["choices"][0]
        assert choice["text"] == "the fox"
        assert site.intake.submissions[0].sampling.prompt_logprobs == 1
        assert site.intake.submissions[0].sampling.max_tokens == 1
        assert choice["logprobs"]["tokens"][0] == "<s>"
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert choice["logprobs"]["token_logprobs"][1] == -0.5
        assert answer.json["usage"]["completion_tokens"] == 0
        echoed = await site.complete(prompt="the fox", echo=True, max_tokens=2, stream=True)
        assert "".join(e["choices"][0]["text"] for e in echoed.events[:-1]) == "the fox t0 t1"

    at_site(scenario)


def test_prompt_logprobs_by_token_id(at_site):
    async def scenario(site):
        answer = await site.complete(max_tokens=1, prompt_logprobs=1)
        first, second, _ = answer.json["choices"][0]["prompt_logprobs"]
        assert first is None
        assert second == {"1": {"logprob": -0.5, "rank": 1, "decoded_token": "p1"}}

    at_site(scenario)


def test_token_ids_are_shown_when_asked(at_site):
    async def scenario(site):
        choice = (await site.complete(max_tokens=2, return_token_ids=True)).json["choices"][0]
        assert (choice["token_ids"], choice["prompt_token_ids"]) == ([1, 2], [1, 2, 3])
        streamed = await site.complete(max_tokens=2, return_token_ids=True, stream=True)
        first, second = (e["choices"][0] for e in streamed.events[:2])
        assert (first["token_ids"], first["prompt_token_ids"]) == ([1], [1, 2, 3])
        assert second["token_ids"] == [2]
        assert "prompt_token_ids" not in second

    at_site(scenario)


def test_completion_defaults_are_openais(at_site):
    async def scenario(site):
        await site.complete()
        sampling = site.intake.submissions[0].sampling
        assert sampling.max_tokens == 16
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)

    at_site(scenario)


def test_what_schedulers_are_told_comes_with_the_body(at_site):
    async def scenario(site):
        service = {"priority": -2, "key": "tenant-a", "deadline_s": 1.5}
        assert (await site.complete(max_tokens=4, service=service)).status == 200
        wish = site.intake.submissions[0].sampling.service
        assert (wish.priority, wish.key, wish.deadline_s) == (-2, "tenant-a", 1.5)
        assert wish.expected_output_tokens is None

    at_site(scenario)


def test_unicode_text_survives_the_escape(at_site):
    texts = ['"', "\\", "\n\t\x00", "é", "😀", " \u2028"]

    async def scenario(site):
        site.intake.script = lambda s: Script(texts=texts)
        streamed = await site.complete(stream=True)
        assert [e["choices"][0]["text"] for e in streamed.events[:-1]] == texts

    at_site(scenario)


def test_an_id_in_flight_gets_a_suffix(at_site):
    async def scenario(site):
        site.intake.script = lambda s: Script(is_held=s.request_id == "twice")
        reader, writer = await site.connect()
        body = b'{"prompt": [1], "max_tokens": 1}'
        head = f"POST /v1/completions HTTP/1.1\r\nx-request-id: twice\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await site.until(lambda: site.intake.in_flight == {"twice"})
        answer = await site.post(
            "/v1/completions", {"prompt": [1], "max_tokens": 1}, {"x-request-id": "twice"}
        )
        assert answer.status == 200
        assert answer.headers["x-request-id"].startswith("twice~")
        site.intake.release()
        assert b"200 OK" in await reader.readline()

    at_site(scenario)
