"""The model that is made on the spot. That its output depends on every block: see the engine tests."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from baton.demo_model import build_demo_model, is_complete, main


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_two_builds_are_equal_to_the_byte(tmp_path: Path) -> None:
    first, second = build_demo_model(tmp_path / "a"), build_demo_model(tmp_path / "b")
    assert digests(first) == digests(second)
    assert set(digests(first)) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_a_folder_without_its_config_is_incomplete(tmp_path: Path) -> None:
    assert not is_complete(tmp_path / "none")
    folder = build_demo_model(tmp_path / "model")
    assert is_complete(folder)
    (folder / "config.json").unlink()
    assert not is_complete(folder)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "model")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "model")
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "Hello world",
        "  two  spaces\n\tand a tab",
        "naïve café — 日本語 🙂",
        "12345 + 67.8",
        "<|im_start|>user",
        "",
    ],
)
def test_text_survives_the_tokenizer(demo_model: Path, text: str) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(demo_model / "tokenizer.json"))
    token_ids = tokenizer.encode(text).ids
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == text
    vocab_size = json.loads((demo_model / "config.json").read_text())["vocab_size"]
    assert all(0 <= token_id < vocab_size for token_id in token_ids)


def test_common_words_are_short_and_special_tokens_are_one(demo_model: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(demo_model / "tokenizer.json"))
    assert len(tokenizer.encode(" the people who live there").ids) <= 5  # one for each word
    assert tokenizer.encode("<|im_end|>").ids == [tokenizer.token_to_id("<|im_end|>")]


def test_chat_template(demo_model: Path) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = json.loads((demo_model / "tokenizer_config.json").read_text())["chat_template"]
    rendered = (
        ImmutableSandboxedEnvironment()
        .from_string(template)
        .render(messages=[{"role": "user", "content": "hi"}], add_generation_prompt=True)
    )
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
