"""Text to token ids for both doors, once per request and off the event loop.

The `tokenizers` library reads the model's tokenizer.json directly: 45 ms and 15 MB to import,
against 5 s and 400 MB for transformers' AutoTokenizer, which pulls in torch. Encoding runs in two
named threads (the library releases the GIL); texts short enough to cost less than a thread switch
are encoded in place.

The model is known when its first worker registers, so a `FleetTokenizer` starts empty, loads in its
thread, and answers requests that arrive meanwhile after loading. A model without tokenizer files
still serves token-id prompts; text prompts then get one sentence that says why not.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from baton.contract.errors import InvalidRequest, PromptTooLong, QueueFull, ServingError, UnsupportedFeature
from baton.contract.tokens import TOKEN_BYTES, pack_token_ids, unpack_token_ids
from coordinator.chat_template import ChatTemplate, load_chat_template

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_WAITING_JOBS = 1024
"""Encoding jobs queued for the threads; above it a request hears queue_full."""

INLINE_CHARS = 400
"""Longest text encoded on the event loop: 75 us for English; handing it to a thread costs 50 by itself."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja")


class TokenizerMissing(Exception):
    """A sentence: which file of which model is absent or unreadable."""


class Tokenizer:
    """One model's vocabulary, merges and chat template. Thread-safe: nothing in it changes."""

    def __init__(
        self, backend: tokenizers.Tokenizer, config: dict[str, Any], template: ChatTemplate | None
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.chat_template = template
        vocab = backend.get_vocab(with_added_tokens=True)
        self.max_token_id = max(vocab.values(), default=0)
        self._longest_token = max((len(token) for token in vocab), default=1)

    @classmethod
    def load(cls, model: str) -> Tokenizer:
        """From a local folder or, when `model` is not one, the local hub cache or the hub.

        Raises TokenizerMissing. Blocks; call it in a thread.
        """
        folder = model_folder(model)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerMissing(f"{folder} has no tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise TokenizerMissing(f"{path} cannot be read: {error}") from error
        config = read_json(folder / "tokenizer_config.json")
        return cls(backend, config, load_chat_template(folder, config))

    def encode(self, text: str, *, add_special_tokens: bool) -> bytes:
        """Packed token ids."""
        # The batch call is the one that can leave out character offsets: 0.7x the time.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return pack_token_ids(encoding.ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        return [self._backend.id_to_token(token_id) or "" for token_id in token_ids]

    def check_length(self, text: str, max_model_len: int) -> None:
        """Refuses text that cannot fit however it is cut, before time is spent on encoding it."""
        limit = max_model_len * self._longest_token
        if len(text) > limit:
            raise PromptTooLong(
                f"the prompt has {len(text)} characters; {max_model_len} tokens hold {limit} at most",
                param="prompt",
            )


class FleetTokenizer:
    """The tokenizer of whatever model the fleet serves; owned by the event loop."""

    def __init__(self, num_threads: int = 2) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenizer")
        self._num_waiting = 0
        self._tasks: set[asyncio.Future[None]] = set()
        self._model: str | None = None
        self._tokenizer: Tokenizer | None = None
        self._missing: str | None = None
        self._loading: asyncio.Future[None] | None = None

    @property
    def max_token_id(self) -> int | None:
        """None until loaded, and for a model without tokenizer."""
        return self._tokenizer.max_token_id if self._tokenizer is not None else None

    def start_loading(self, model: str) -> None:
        """Idempotent; the core calls it when the fleet's model becomes known. Needs a running loop."""
        if model == self._model:
            return
        self._model, self._tokenizer, self._missing = model, None, None
        self._loading = asyncio.ensure_future(self._load(model))

    async def loaded(self) -> bool:
        """Waits for the load in progress; whether text can be encoded."""
        if self._loading is not None:
            await asyncio.shield(self._loading)
        return self._tokenizer is not None

    def run(
        self, work: Callable[[Tokenizer], T], num_chars: int, done: Callable[[T | ServingError], None]
    ) -> None:
        """`done(work(tokenizer))`, or `done(error)`; in place and at once when the text is short.

        `work` may raise ServingError. Raises UnsupportedFeature and QueueFull itself; on neither is
        `done` called.
        """
        if self._missing is not None:
            raise self._unavailable()
        if self._tokenizer is not None and num_chars <= INLINE_CHARS:
            done(_attempt(work, self._tokenizer))
            return
        if self._num_waiting >= MAX_WAITING_JOBS:
            raise QueueFull(f"{self._num_waiting} texts wait for the tokenizer, the limit", retry_after_s=1.0)
        self._num_waiting += 1
        if self._tokenizer is None:
            task = asyncio.ensure_future(self._run_when_loaded(work, done))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            self._run_in_thread(self._tokenizer, work, done)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _run_in_thread(
        self, tokenizer: Tokenizer, work: Callable[[Tokenizer], T], done: Callable[[T | ServingError], None]
    ) -> None:
        future = asyncio.get_running_loop().run_in_executor(self._threads, _attempt, work, tokenizer)

        def deliver(ended: asyncio.Future[T | ServingError]) -> None:
            self._num_waiting -= 1
            if not ended.cancelled():
                done(ended.result())

        future.add_done_callback(deliver)

    async def _run_when_loaded(
        self, work: Callable[[Tokenizer], T], done: Callable[[T | ServingError], None]
    ) -> None:
        await self.loaded()
        if self._tokenizer is not None:
            self._run_in_thread(self._tokenizer, work, done)
            return
        self._num_waiting -= 1
        done(self._unavailable())

    def _unavailable(self) -> UnsupportedFeature:
        reason = self._missing or "none is loaded"
        return UnsupportedFeature(
            f"text needs a tokenizer, and this fleet has none: {reason}. Send token ids", param="prompt"
        )

    async def _load(self, model: str) -> None:
        try:
            tokenizer = await asyncio.get_running_loop().run_in_executor(self._threads, Tokenizer.load, model)
        except Exception as error:  # whatever is wrong with its files, somebody may be waiting for it
            is_expected = isinstance(error, TokenizerMissing)
            log.warning("tokenizer absent model=%s reason=%s", model, error, exc_info=not is_expected)
            if model == self._model:
                self._missing = str(error) if is_expected else f"its files break the loader: {error!r}"
            return
        log.info("tokenizer loaded model=%s max_token_id=%d", model, tokenizer.max_token_id)
        if model == self._model:
            self._tokenizer = tokenizer


def _attempt(work: Callable[[Tokenizer], T], tokenizer: Tokenizer) -> T | ServingError:
    try:
        return work(tokenizer)
    except ServingError as error:
        return error
    except UnicodeEncodeError as error:  # a lone surrogate, only possible from a chat template
        return InvalidRequest(f"the prompt is not valid Unicode: {error.reason}", param="prompt")
    except Exception as error:  # raised in a thread it would reach nobody, and a client would wait for ever
        log.exception("tokenizing broke")
        return ServingError(f"internal error while tokenizing: {type(error).__name__}")


def model_folder(model: str) -> Path:
    """Where the model's files are. Raises TokenizerMissing."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    if not _looks_like_hub_name(model):
        raise TokenizerMissing(f"{model} is not a folder")
    # Imported here: only models named by their hub id need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(_TOKENIZER_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError, ValueError) as error:
        first_line = str(error).partition("\n")[0]  # the hub's advice fills a screen
        raise TokenizerMissing(
            f"{model} is neither a folder nor to be had from the hub: {first_line}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """An absent file is empty. Raises TokenizerMissing for one that is not a JSON object."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TokenizerMissing(f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise TokenizerMissing(f"{path} is not a JSON object")
    return document


def id_above(packed: bytes, max_token_id: int) -> int | None:
    """The highest packed id if it is greater than the limit, else None.

    Looking at each id costs 16 us per thousand. The high bytes usually decide alone and C code can
    scan those: an id whose high byte is below the bound's is in range whatever its other bytes.
    """
    end = max_token_id + 1
    for position in (3, 2, 1):
        high = packed[position::TOKEN_BYTES]
        bound = (end >> (8 * position)) & 0xFF
        if bound == 0:
            if high.count(0) == len(high):
                continue
        elif not high.translate(None, bytes(range(bound))):
            return None
        break
    highest = max(unpack_token_ids(packed), default=0)
    return highest if highest > max_token_id else None


def _looks_like_hub_name(model: str) -> bool:
    return model.count("/") <= 1 and not model.startswith((".", "/", "~")) and bool(model)
