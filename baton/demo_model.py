"""A tiny Qwen3-style model made on the spot: nothing is downloaded, every run gives the same files.

    python -m baton.demo_model PATH

It does not talk sense, but it is honest about its input, so that comparing two runs proves
something. A random model at the usual scale prints one token for ever whatever it reads. Here the
embeddings are untied and the weights are wide, so greedy output varies from token to token, and
query and key norms above one make attention choose: what stands in any block of a long prompt
changes the output. Rows of the output matrix that belong to lone non-ASCII bytes are zero, so
greedy text is readable ASCII.

The tokenizer is byte-level BPE whose merges spell common English words: any text goes in, and a
word is mostly one or two tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

SEED = 20261121
HIDDEN_SIZE = 256
NUM_LAYERS = 4
NUM_HEADS = 8
NUM_KV_HEADS = 4
"""Four, so that tensor parallel sizes 2 and 4 divide it."""
HEAD_DIM = 32
INTERMEDIATE_SIZE = 512
MAX_POSITIONS = 8192
ROPE_THETA = 1_000_000.0

INITIALIZER_RANGE = 0.12
"""Six times the usual 0.02: hidden states differ enough for the next token to vary."""

QK_NORM_WEIGHT = 1.5
"""Attention scores get a standard deviation of about 2: peaked enough that single tokens matter
at a thousand tokens' distance, flat enough that no block is ignored."""

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

COMMON_WORDS = """
the of and to in is it that was for on are as with his they at be this from have or by one had not
but what all were when we there can an your which their said if do will each about how up out them
then she many some so these would other into has more her two like him see time could no make than
first been its who now people my made over did down only way find use may water long little very
after words called just where most know get through back much before go good new write our used me
man too any day same right look think also around another came come work three word must because
does part even place well such here take why things help put years different away again off went old
number great tell men say small every found still between name should home big give air line set own
under read last never us left end along while might next sound below saw something thought both few
those always looked show large often together asked house world going want school important until
form food keep children feet land side without boy once animals life enough took four head above
kind began almost live page got earth need far hand high year mother light country father let night
picture being study second book carry science eat room friend idea fish mountain north base hear
horse cut sure watch color face wood main open seem white paper hard near sentence better best
across during today however low hours black products happened whole measure remember early waves
reached listen wind rock space covered fast several hold himself toward five step morning passed
vowel true hundred against pattern numeral table slow money map farm pulled draw voice power town
fine certain fly unit lead cry dark machine note wait plan figure star box noun field rest correct
able pound done beauty drive stood contain front teach week final gave green oh quick develop sleep
warm free minute strong special mind behind clear tail produce fact street inch
"""


def build_demo_model(path: str | Path) -> Path:
    """Write the model folder and return it. Existing files of the same names are replaced.

    Everything is written to temporary names first and renamed, config.json last: a folder that has
    a config.json is complete, also when the build was interrupted.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    vocab_size = len(tokenizer["model"]["vocab"])
    end_id = tokenizer["model"]["vocab"][TURN_END]
    pad_id = tokenizer["model"]["vocab"][END_OF_TEXT]
    _write(folder / "tokenizer.json", _json(tokenizer))
    _write(folder / "tokenizer_config.json", _json(_tokenizer_config()))
    _write(folder / "generation_config.json", _json({"eos_token_id": end_id, "pad_token_id": pad_id}))
    _write_weights(folder / "model.safetensors", vocab_size, _unreadable_token_ids(tokenizer))
    _write(folder / "config.json", _json(_config(vocab_size, end_id, pad_id)))
    return folder


def is_complete(path: str | Path) -> bool:
    return (Path(path) / "config.json").is_file()


def _config(vocab_size: int, end_id: int, pad_id: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITIONS,
        "initializer_range": INITIALIZER_RANGE,
        "rms_norm_eps": 1e-6,
        "rope_theta": ROPE_THETA,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "use_cache": True,
        "dtype": "float32",
        "torch_dtype": "float32",
        "eos_token_id": end_id,
        "pad_token_id": pad_id,
    }


def _write_weights(path: Path, vocab_size: int, silent_token_ids: list[int]) -> None:
    from safetensors.numpy import save_file

    # PCG64's raw integers are stable by promise; the Gaussian is drawn by inverting nothing clever:
    # twelve uniform bytes summed are normal enough, and integer arithmetic is equal everywhere.
    bits = np.random.PCG64(SEED)

    def normal(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        count = int(np.prod(shape))
        raw = bits.random_raw((count * 12 + 7) // 8).astype("<u8").view(np.uint8)[: count * 12]
        sums = raw.reshape(count, 12).sum(axis=1, dtype=np.int64)
        deviation = np.sqrt(12 * (256**2 - 1) / 12)  # of a sum of twelve uniform bytes
        values: np.ndarray[Any, np.dtype[np.float32]] = (
            ((sums - 12 * 127.5) / deviation * INITIALIZER_RANGE).astype(np.float32).reshape(shape)
        )
        return values

    tensors = {"model.embed_tokens.weight": normal(vocab_size, HIDDEN_SIZE)}
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        tensors |= {
            prefix + "input_layernorm.weight": np.ones(HIDDEN_SIZE, np.float32),
            prefix + "post_attention_layernorm.weight": np.ones(HIDDEN_SIZE, np.float32),
            attention + "q_proj.weight": normal(NUM_HEADS * HEAD_DIM, HIDDEN_SIZE),
            attention + "k_proj.weight": normal(NUM_KV_HEADS * HEAD_DIM, HIDDEN_SIZE),
            attention + "v_proj.weight": normal(NUM_KV_HEADS * HEAD_DIM, HIDDEN_SIZE),
            attention + "o_proj.weight": normal(HIDDEN_SIZE, NUM_HEADS * HEAD_DIM),
            attention + "q_norm.weight": np.full(HEAD_DIM, QK_NORM_WEIGHT, np.float32),
            attention + "k_norm.weight": np.full(HEAD_DIM, QK_NORM_WEIGHT, np.float32),
            mlp + "gate_proj.weight": normal(INTERMEDIATE_SIZE, HIDDEN_SIZE),
            mlp + "up_proj.weight": normal(INTERMEDIATE_SIZE, HIDDEN_SIZE),
            mlp + "down_proj.weight": normal(HIDDEN_SIZE, INTERMEDIATE_SIZE),
        }
    tensors["model.norm.weight"] = np.ones(HIDDEN_SIZE, np.float32)
    output = normal(vocab_size, HIDDEN_SIZE)
    output[silent_token_ids] = 0.0
    tensors["lm_head.weight"] = output

    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # save_file makes it private to its owner
    partial.replace(path)


def _byte_letters() -> list[str]:
    """The printable letter that stands for each byte in byte-level BPE (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def _tokenizer() -> dict[str, Any]:
    letters = _byte_letters()
    vocab = {letter: index for index, letter in enumerate(letters)}
    merges: list[list[str]] = []
    space = letters[ord(" ")]
    for word in COMMON_WORDS.split():
        for text in (space + word, word.capitalize()):
            # Left to right: each prefix of the word is a token of its own.
            for end in range(2, len(text) + 1):
                if text[:end] not in vocab:
                    vocab[text[:end]] = len(vocab)
                    merges.append([text[: end - 1], text[end - 1]])
    added = []
    for token in SPECIAL_TOKENS:
        vocab[token] = len(vocab)
        added.append(
            {
                "id": vocab[token],
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        )
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": SPLIT_PATTERN},
                    "behavior": "Isolated",
                    "invert": False,
                },
                byte_level,
            ],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_POSITIONS,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def _unreadable_token_ids(tokenizer: dict[str, Any]) -> list[int]:
    """Byte tokens outside printable ASCII, and special tokens a sequence never ends with."""
    letters = _byte_letters()
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    unreadable = [vocab[letters[b]] for b in range(256) if not 32 <= b < 127 and b != ord("\n")]
    return [*unreadable, vocab[END_OF_TEXT], vocab[TURN_START]]


def _json(document: Any) -> str:
    return json.dumps(document, ensure_ascii=False, indent=1) + "\n"


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m baton.demo_model PATH", file=sys.stderr)
        return 2
    print(build_demo_model(arguments[0]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
