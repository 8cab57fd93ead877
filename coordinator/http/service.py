"""Routes that generate nothing: health, models, tokenize, version, metrics."""

from __future__ import annotations

import time
from typing import Any, cast

from baton.contract.errors import Draining, InvalidRequest, NoWorkers, ServingError
from baton.contract.tokens import unpack_token_ids
from coordinator.http.chat import num_chars, render
from coordinator.http.exchange import Exchange
from coordinator.http.openai_schema import BodyDecoder, DetokenizeBody, TokenizeBody
from coordinator.http.requests import Door, served_model, token_limits
from coordinator.http.sse import to_json
from coordinator.tokenizer import Tokenizer

_tokenize_decoder = BodyDecoder(TokenizeBody)
_detokenize_decoder = BodyDecoder(DetokenizeBody)
_started = int(time.time())


def live(door: Door, exchange: Exchange) -> None:
    """The process answers; nothing more."""
    exchange.respond(200, b'{"status":"live"}')


def fleet(door: Door, exchange: Exchange) -> None:
    """The coordinator's view of its workers."""
    exchange.respond(200, to_json(door.intake.snapshot()))


def health(door: Door, exchange: Exchange) -> None:
    """Serving, perhaps with nobody to serve with yet; not draining."""
    if door.is_draining:
        raise Draining("this coordinator is draining")
    exchange.respond(200, b'{"status":"healthy"}')


def ready(door: Door, exchange: Exchange) -> None:
    """A request would be served: one full prefill/decode pair is up."""
    if door.is_draining:
        raise Draining("this coordinator is draining")
    facts = door.intake.facts()
    if not facts.is_ready:
        raise NoWorkers(facts.why_not_ready or "no pair of prefill and decode worker is up")
    exchange.respond(200, b'{"status":"ready"}')


def version(door: Door, exchange: Exchange) -> None:
    exchange.respond(200, to_json({"version": door.version}))


def metrics(door: Door, exchange: Exchange) -> None:
    body, content_type = door.metrics.render()
    exchange.respond(200, body, content_type=content_type.encode("ascii"))


def models(door: Door, exchange: Exchange) -> None:
    exchange.respond(200, to_json({"object": "list", "data": _cards(door)}))


def model(door: Door, exchange: Exchange) -> None:
    """GET /v1/models/{id}; ids may hold slashes."""
    name = exchange.request.path.removeprefix("/v1/models/")
    served_model(name, door.names)
    exchange.respond(200, to_json(next(card for card in _cards(door) if card["id"] == name)))


def _cards(door: Door) -> list[dict[str, Any]]:
    facts = door.intake.facts()
    return [
        {
            "id": name, "object": "model", "created": _started, "owned_by": "baton",
            "root": facts.model, "parent": None, "max_model_len": facts.max_model_len, "permission": [],
        }
        for name in door.names.names()
    ]  # fmt: skip


def tokenize(door: Door, exchange: Exchange) -> None:
    body = cast(TokenizeBody, _tokenize_decoder.decode(exchange.request.body))
    served_model(body.model, door.names)
    max_model_len = token_limits(door.intake.facts(), door.tokenizer).max_model_len
    if (body.prompt is None) == (not body.messages):
        raise InvalidRequest("one of prompt and messages is needed", param="prompt")

    def encode(tokenizer: Tokenizer) -> dict[str, Any]:
        text, adds = body.prompt, body.add_special_tokens is not False
        if text is None:
            text, adds = render(tokenizer, body), bool(body.add_special_tokens)
        token_ids = unpack_token_ids(tokenizer.encode(text, add_special_tokens=adds))
        names = tokenizer.token_strings(token_ids) if body.return_token_strs else None
        return {
            "count": len(token_ids), "max_model_len": max_model_len, "tokens": token_ids, "token_strs": names,
        }  # fmt: skip

    _answer_later(door, exchange, encode, len(body.prompt) if body.prompt is not None else num_chars(body))


def detokenize(door: Door, exchange: Exchange) -> None:
    body = cast(DetokenizeBody, _detokenize_decoder.decode(exchange.request.body))
    served_model(body.model, door.names)

    def decode(tokenizer: Tokenizer) -> dict[str, Any]:
        for token_id in body.tokens:
            if not 0 <= token_id <= tokenizer.max_token_id:
                raise InvalidRequest(
                    f"tokens holds {token_id}, ids go from 0 to {tokenizer.max_token_id}", param="tokens"
                )
        return {"prompt": tokenizer.decode(body.tokens)}

    _answer_later(door, exchange, decode, 4 * len(body.tokens))


def _answer_later(door: Door, exchange: Exchange, work: Any, num_characters: int) -> None:
    def done(document: dict[str, Any] | ServingError) -> None:
        with door.guarded(exchange):
            if isinstance(document, ServingError):
                raise document
            exchange.respond(200, to_json(document))

    door.tokenizer.run(work, num_characters, done)
