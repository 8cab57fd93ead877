"""The requests whose answers are compared: prompts × ways of sampling. Imported, not collected.

`params` are named as vLLM's SamplingParams names them, which the reference run takes as they are and
which the doors translate. What depends on a prompt's own output (a stop string that really occurs)
is written as `derive` and filled in by the reference run.
"""

from __future__ import annotations

import random
from typing import Any, Literal

import msgspec

BLOCK = 32
MAX_MODEL_LEN = 2048
NUM_ORDINARY_IDS = 2000
"""Ids below are letters and words of the demo model; above are its special tokens."""


class Case(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    kind: str
    door: Literal["completions", "streamed", "chat", "zmq"]
    prompt: list[int] | str
    """For chat: what the user says."""
    params: dict[str, Any]
    derive: str | None = None
    echo: bool = False
    """Prompt and its log probabilities are part of the answer."""


def random_prompt(num_tokens: int, seed: object = 0) -> list[int]:
    """Ends with words: after a lone byte of a broken character stock vLLM repeats the prompt's end in
    the output's text, and nobody could say what the right text is."""
    rng = random.Random(f"{num_tokens}/{seed}")
    num_words = min(num_tokens, 8)
    anything = [rng.randrange(NUM_ORDINARY_IDS) for _ in range(num_tokens - num_words)]
    return anything + [rng.randrange(256, NUM_ORDINARY_IDS) for _ in range(num_words)]


LENGTHS = (
    1,
    2,
    BLOCK - 1,
    BLOCK,
    BLOCK + 1,
    2 * BLOCK,
    3 * BLOCK - 1,
    3 * BLOCK,
    3 * BLOCK + 1,
    5 * BLOCK + 7,
)
LONG = (500, 16 * BLOCK, 1000, 1500)

SEEDED = {"temperature": 0.9, "top_p": 0.95, "top_k": 60}
CALL_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "n": {"type": "integer"}},
    "required": ["name", "n"],
    "additionalProperties": False,
}

# One entry: how to sample, and what of it follows from the prompt's own output.
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True},
    "greedy to its end": {"temperature": 0.0, "max_tokens": 24},
    "greedy logprobs": {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, "logprobs": 5},
    "greedy logprobs 0": {"temperature": 0.0, "max_tokens": 6, "logprobs": 0},
    "greedy penalties": {
        "temperature": 0.0, "max_tokens": 12, "presence_penalty": 1.1, "frequency_penalty": 0.7,
        "logprobs": 1,
    },
    "greedy repetition": {"temperature": 0.0, "max_tokens": 12, "repetition_penalty": 1.4, "logprobs": 1},
    "greedy min_tokens": {"temperature": 0.0, "max_tokens": 12, "min_tokens": 9, "derive": "stop_token_ids"},
    "greedy stop token": {"temperature": 0.0, "max_tokens": 12, "derive": "stop_token_ids"},
    "greedy stop": {"temperature": 0.0, "max_tokens": 16, "ignore_eos": True, "derive": "stop"},
    "greedy stop included": {
        "temperature": 0.0, "max_tokens": 16, "include_stop_str_in_output": True, "derive": "stop",
    },
    "greedy bias": {"temperature": 0.0, "max_tokens": 8, "logit_bias": {"101": 3.0, "1200": 5.0, "7": -9.0}},
    "greedy allowed": {"temperature": 0.0, "max_tokens": 8, "allowed_token_ids": list(range(65, 500, 3))},
    "greedy bad words": {"temperature": 0.0, "max_tokens": 8, "derive": "bad_words"},
    "greedy one token": {"temperature": 0.0, "max_tokens": 1, "logprobs": 2},
    "greedy two tokens": {"temperature": 0.0, "max_tokens": 2, "logprobs": 2},
    "seeded": {**SEEDED, "seed": 11, "max_tokens": 12, "ignore_eos": True},
    "seeded logprobs": {**SEEDED, "seed": 12, "max_tokens": 8, "logprobs": 4},
    "seeded n=2": {**SEEDED, "seed": 13, "max_tokens": 8, "n": 2},
    "seeded penalties": {
        **SEEDED, "seed": 14, "max_tokens": 10, "presence_penalty": -0.6, "frequency_penalty": 0.9,
        "repetition_penalty": 1.2, "min_p": 0.01,
    },
    "seeded min_tokens": {**SEEDED, "seed": 15, "max_tokens": 10, "min_tokens": 10},
    "seeded stop": {**SEEDED, "seed": 16, "max_tokens": 16, "derive": "stop"},
    "seeded one token": {**SEEDED, "seed": 17, "max_tokens": 1, "logprobs": 1},
    "json schema": {"temperature": 0.0, "max_tokens": 24, "structured_outputs": {"json": CALL_SCHEMA}},
    "json object": {"temperature": 0.0, "max_tokens": 16, "structured_outputs": {"json_object": True}},
    "regex": {"temperature": 0.0, "max_tokens": 16, "structured_outputs": {"regex": "[a-c]{3}-[0-9]{4}"}},
    "choice": {
        "temperature": 0.0, "max_tokens": 16,
        "structured_outputs": {"choice": ["the red one", "the green one", "neither"]},
    },
    "seeded grammar": {
        **SEEDED, "seed": 18, "max_tokens": 20,
        "structured_outputs": {"grammar": 'root ::= item (", " item)*\nitem ::= "red" | "green" | "blue"'},
    },
    "one structured token": {
        "temperature": 0.0, "max_tokens": 1, "structured_outputs": {"regex": "[0-9]+"}, "logprobs": 1,
    },
}  # fmt: skip

DOORS: tuple[Literal["completions", "streamed", "zmq"], ...] = ("completions", "streamed", "zmq")

TEXTS = (
    "a", "Once upon a time there was a little house by the sea.", "naïve café, 東京, 🙂 and \t tabs\n",
    "the " * 40, "What is 12 * 34?",
)  # fmt: skip


def all_cases() -> list[Case]:
    cases: list[Case] = []

    def add(kind: str, prompt: list[int] | str, label: str, **changes: Any) -> None:
        params = dict(KINDS[kind])
        derive = params.pop("derive", None)
        door = changes.pop("door", None) or DOORS[len(cases) % len(DOORS)]
        if door == "zmq" and params.get("n", 1) > 1:
            door = "completions"  # that door takes one sequence per request
        params |= changes.pop("params", {})
        name = f"{len(cases)} {kind}, {label}, {door}"
        cases.append(
            Case(name=name, kind=kind, door=door, prompt=prompt, params=params, derive=derive, **changes)
        )

    for number, kind in enumerate(KINDS):
        # Each kind meets six of the lengths and a long one; over all kinds, every length several times.
        for offset in range(6):
            num_tokens = LENGTHS[(number + offset * 3) % len(LENGTHS)]
            add(kind, random_prompt(num_tokens, kind), f"{num_tokens} tokens")
        num_tokens = LONG[number % len(LONG)]
        add(kind, random_prompt(num_tokens, kind), f"{num_tokens} tokens")

    for num_output in (1, 2, 8):
        prompt = random_prompt(MAX_MODEL_LEN - num_output, "full")
        add("greedy", prompt, "up to the last position", params={"max_tokens": num_output, "logprobs": 1})

    for kind in ("seeded one token", "seeded logprobs", "seeded penalties"):
        add(kind, random_prompt(1800, kind), "1800 tokens, in chunks")

    shared = random_prompt(4 * BLOCK, "shared")
    for tail in (1, BLOCK - 1, BLOCK, BLOCK + 1, 70):
        for kind in ("greedy logprobs", "seeded"):
            add(kind, [*shared, *random_prompt(tail, f"tail {kind}")], f"shared prefix + {tail}")
    for length in (BLOCK, 2 * BLOCK + 1, 5 * BLOCK):
        for time in range(3):
            add("greedy logprobs", random_prompt(length, "again"), f"{length} tokens, time {time + 1}")

    for text in TEXTS:
        add("greedy", text, f"text {text[:12]!r}", door="completions", params={"logprobs": 2})
        add("seeded", text, f"text {text[:12]!r}", door="zmq")
        add("greedy to its end", text, f"says {text[:12]!r}", door="chat", params={"logprobs": 3})
        add("seeded n=2", text, f"says {text[:12]!r}", door="chat")
    for number, length in enumerate((1, 2, BLOCK, BLOCK + 1, 150)):
        for kind in ("greedy", "greedy one token"):
            params = {"logprobs": number % 3, "prompt_logprobs": number % 3}
            prompt = random_prompt(length, "echo")
            add(kind, prompt, f"{length} tokens echoed", door="completions", params=params, echo=True)
    add("greedy logprobs", random_prompt(90, "pl"), "prompt logprobs", params={"prompt_logprobs": 2},
        door="completions")  # fmt: skip
    return cases
