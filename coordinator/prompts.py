"""The ZeroMQ door's view of the fleet's tokenizer: text and chats to packed ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from baton.contract.errors import InvalidRequest, ServingError, UnsupportedFeature
from baton.contract.sampling import SamplingSpec
from coordinator.intake import Intake
from coordinator.tokenizer import FleetTokenizer, Tokenizer, id_above
from coordinator.zmq_door import OnEncoded


class FleetPrompts:
    """Implements `PromptEncoder`. A chat template prints the special tokens itself."""

    def __init__(self, tokenizer: FleetTokenizer, intake: Intake) -> None:
        self._tokenizer = tokenizer
        self._intake = intake

    def encode_text(self, text: str, done: OnEncoded) -> None:
        self._run(lambda tokenizer: text, len(text), done, add_special_tokens=True)

    def encode_chat(self, messages: list[dict[str, Any]], done: OnEncoded) -> None:
        def rendered(tokenizer: Tokenizer) -> str:
            if tokenizer.chat_template is None:
                raise UnsupportedFeature("this model has no chat template; send a prompt", param="messages")
            return tokenizer.chat_template.render(messages)

        num_chars = sum(len(str(message.get("content", ""))) for message in messages)
        self._run(rendered, num_chars, done, add_special_tokens=False)

    def check_token_ids(self, packed: bytes, sampling: SamplingSpec | None) -> None:
        last = self._tokenizer.max_token_id
        if last is None:
            return
        if (wrong := id_above(packed, last)) is not None:
            raise _unknown_id("prompt_token_ids", wrong, last)
        if sampling is None:
            return
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            for token_id in getattr(sampling, name) or ():
                if not 0 <= token_id <= last:
                    raise _unknown_id(name, token_id, last)

    def _run(
        self,
        text_of: Callable[[Tokenizer], str],
        num_chars: int,
        done: OnEncoded,
        *,
        add_special_tokens: bool,
    ) -> None:
        max_model_len = self._intake.facts().max_model_len

        def work(tokenizer: Tokenizer) -> bytes:
            text = text_of(tokenizer)
            if max_model_len is not None:
                tokenizer.check_length(text, max_model_len)
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)

        def deliver(result: bytes | ServingError) -> None:
            done(result)

        self._tokenizer.run(work, num_chars, deliver)


def _unknown_id(name: str, token_id: int, last: int) -> InvalidRequest:
    return InvalidRequest(f"{name} holds {token_id}, token ids go from 0 to {last}", param=name)
