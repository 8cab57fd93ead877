"""Tokenizer and chat template against transformers, which defines what is right."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from typing import Any

import pytest

from baton.contract.errors import InvalidRequest, PromptTooLong, QueueFull, ServingError, UnsupportedFeature
from baton.contract.tokens import pack_token_ids, unpack_token_ids
from coordinator import tokenizer as tokenizer_module
from coordinator.chat_template import ChatTemplate, shape_message
from coordinator.tokenizer import FleetTokenizer, Tokenizer, TokenizerMissing, id_above
from tests.coordinator.http.conftest import write_model

TEXTS = ["the quick brown fox", "", "  leading", "é😀\x00\n", "<|user|>hi<|end|>", "a" * 500]

LOOPING = (
    "{%- for message in messages -%}[{{ message['role'] }}]"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for part in message['content'] -%}({{ part['text'] }}){%- endfor -%}{%- endif -%}"
    "{%- endfor -%}"
)
STRIPPING = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</{{ m.role }}>{% endfor %}"

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi  "},
    {"role": "assistant", "content": "Hello é"},
]


async def until(condition):
    """Bounded by the test's own time limit."""
    for _ in range(100_000):
        if condition():
            return
        await asyncio.sleep(0.0005)
    raise AssertionError("it never happened")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def reference(model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="module")
def ours(model):
    return Tokenizer.load(model)


@pytest.mark.parametrize("text", TEXTS, ids=[repr(text)[:20] for text in TEXTS])
@pytest.mark.parametrize("adds", [True, False], ids=["special", "plain"])
def test_encoding_equals_transformers(ours, reference, text, adds):
    assert unpack_token_ids(ours.encode(text, add_special_tokens=adds)) == reference.encode(
        text, add_special_tokens=adds
    )


def test_decoding_equals_transformers(ours, reference):
    ids = reference.encode("the quick é😀 fox")
    assert ours.decode(ids) == reference.decode(ids)
    assert ours.decode(ids, skip_special_tokens=True) == reference.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("source", [None, STRIPPING], ids=["model's", "given"])
@pytest.mark.parametrize("adds", [True, False], ids=["generation prompt", "none"])
def test_rendering_equals_transformers(ours, reference, source, adds):
    expected = reference.apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=adds, chat_template=source
    )
    assert ours.chat_template.render(CHAT, add_generation_prompt=adds, source=source) == expected


@pytest.mark.parametrize("source", [None, STRIPPING], ids=["keeps blanks", "strips"])
@pytest.mark.parametrize("last", ["Hello", "Hello "], ids=["no blank", "blank"])
def test_continuing_the_last_message_equals_transformers(ours, reference, source, last):
    chat = [*CHAT[:2], {"role": "assistant", "content": last}]
    expected = reference.apply_chat_template(
        chat, tokenize=False, continue_final_message=True, chat_template=source
    )
    rendered = ours.chat_template.render(
        chat, add_generation_prompt=False, continue_final_message=True, source=source
    )
    assert rendered == expected


def test_tools_reach_the_template_as_json(ours, reference):
    tools = [{"type": "function", "function": {"name": "f", "description": "é", "parameters": {}}}]
    expected = reference.apply_chat_template(CHAT, tokenize=False, tools=tools, add_generation_prompt=True)
    assert ours.chat_template.render(CHAT, tools=tools) == expected


def test_templates_that_loop_over_content_get_parts_and_others_a_string():
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    template = ChatTemplate({"default": STRIPPING}, {})
    assert template.render(parts) == "<user>a\nb</user>"
    assert template.render(parts, source=LOOPING) == "[user](a)(b)"


def test_tool_calls_of_the_history_are_shown_as_objects():
    call: dict[str, Any] = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    shaped = shape_message({"role": "assistant", "content": None, "tool_calls": [call]}, wants_parts=False)
    assert shaped["content"] == ""
    assert shaped["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    call["function"]["arguments"] = "not json"
    shaped = shape_message({"role": "assistant", "tool_calls": [call]}, wants_parts=False)
    assert shaped["tool_calls"][0]["function"]["arguments"] == {}


def test_templates_run_in_a_sandbox():
    template = ChatTemplate({}, {})
    for source in ("{{ messages.append(1) }}", "{{ ().__class__.__bases__[0].__subclasses__() }}"):
        with pytest.raises(InvalidRequest):
            template.render(CHAT, source=source)


def test_a_template_file_wins_over_the_configuration(model, tmp_path):
    folder = tmp_path / "copy"
    write_model(folder)
    (folder / "chat_template.jinja").write_text("file")
    template = Tokenizer.load(str(folder)).chat_template
    assert template is not None
    assert template.render(CHAT) == "file"


def test_named_templates_choose_the_one_for_tools():
    template = ChatTemplate({"default": "plain", "tool_use": "tools"}, {})
    assert (template.render(CHAT), template.render(CHAT, tools=[{}])) == ("plain", "tools")
    with pytest.raises(InvalidRequest, match="it has: other"):
        ChatTemplate({"other": "x"}, {}).render(CHAT)


@pytest.mark.parametrize("break_it", ["absent", "no file", "broken", "broken config"])
def test_a_model_without_usable_tokenizer_says_why(tmp_path, break_it):
    folder = tmp_path / "m"
    if break_it != "absent":
        folder.mkdir()
    if break_it == "broken":
        (folder / "tokenizer.json").write_text("{")
    if break_it == "broken config":
        write_model(folder)
        (folder / "tokenizer_config.json").write_text("[")
    with pytest.raises(TokenizerMissing, match=r"tokenizer|folder"):
        Tokenizer.load(str(folder))


def test_text_that_cannot_fit_is_refused_before_it_is_encoded(ours):
    with pytest.raises(PromptTooLong, match="1000000 characters; 100 tokens"):
        ours.check_length("x" * 1_000_000, 100)


@pytest.mark.parametrize("limit", [0, 255, 256, 399, 31_999, 65_535, 65_536, 151_935, 2**24, 2**31])
def test_id_above_agrees_with_looking_at_each_id(limit):
    dice = random.Random(limit)
    around = [max(0, limit + step) for step in (-257, -256, -1, 0)]
    for _ in range(300):
        ids = [dice.choice([*around, dice.randrange(limit + 1)]) for _ in range(dice.randrange(20))]
        assert id_above(pack_token_ids(ids), limit) is None
        bad = limit + dice.choice([1, 2, 255, 256, 65_536])
        assert id_above(pack_token_ids([*ids, bad]), limit) == bad


def test_requests_before_and_during_loading_wait_for_it(model):
    async def main():
        fleet = FleetTokenizer()
        results: list[bytes | ServingError] = []
        fleet.start_loading(model)
        fleet.run(lambda t: t.encode("the fox", add_special_tokens=False), 7, results.append)
        assert results == []
        assert await fleet.loaded()
        await until(lambda: len(results) == 1)
        inline: list[bytes | ServingError] = []
        fleet.run(lambda t: t.encode("the fox", add_special_tokens=False), 7, inline.append)
        assert inline == results
        fleet.close()

    asyncio.run(main())


def test_without_tokenizer_each_request_hears_why(tmp_path):
    async def main():
        fleet = FleetTokenizer()
        results: list[str | ServingError] = []
        fleet.run(lambda t: "never", 7, results.append)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert isinstance(results[0], UnsupportedFeature)
        fleet.start_loading(str(tmp_path))
        assert not await fleet.loaded()
        with pytest.raises(UnsupportedFeature, match=r"no tokenizer\.json"):
            fleet.run(lambda t: "never", 7, results.append)
        fleet.close()

    asyncio.run(main())


def test_waiting_texts_are_bounded(model, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "MAX_WAITING_JOBS", 2)

    async def main():
        fleet = FleetTokenizer()
        fleet.start_loading(model)
        results: list[str | ServingError] = []
        for _ in range(2):
            fleet.run(lambda t: "x", 10_000, results.append)
        with pytest.raises(QueueFull, match="2 texts wait"):
            fleet.run(lambda t: "x", 10_000, results.append)
        await until(lambda: len(results) == 2)
        fleet.run(lambda t: "x", 10_000, results.append)
        await until(lambda: len(results) == 3)
        fleet.close()

    asyncio.run(main())


def test_files_that_break_the_loader_are_as_good_as_none(tmp_path):
    """Who asked meanwhile must hear it too: nothing else would ever end their requests."""
    model = write_model(tmp_path / "m")
    (tmp_path / "m" / "tokenizer_config.json").write_text('{"chat_template": [{"nom": "x"}]}')

    async def main():
        fleet = FleetTokenizer()
        results: list[bytes | ServingError] = []
        fleet.start_loading(model)
        fleet.run(lambda t: b"never", 7, results.append)
        assert not await fleet.loaded()
        await until(lambda: results)
        assert isinstance(results[0], UnsupportedFeature)
        fleet.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    "template",
    ["{{ 'a' * 1000000000000000 }}", "{% for x in 'a' %}" * 30 + "{% endfor %}" * 30],
    ids=["a petabyte", "loops"],
)
def test_a_client_s_template_that_breaks_python_ends_its_request(model, template):
    """In a thread, where an exception would reach nobody: MemoryError, SyntaxError."""

    async def main():
        fleet = FleetTokenizer()
        fleet.start_loading(model)
        assert await fleet.loaded()
        results: list[str | ServingError] = []
        fleet.run(lambda t: ChatTemplate({}, {}).render(CHAT, source=template), 10_000, results.append)
        await until(lambda: results)
        assert isinstance(results[0], ServingError)
        fleet.close()

    asyncio.run(main())


def test_loading_pulls_in_neither_torch_nor_transformers():
    code = (
        "import sys, coordinator.http\n"
        "print([name for name in ('torch', 'vllm', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
