"""Request bodies, the compiled tools, and one run of the load generator."""

from __future__ import annotations

import json
import random
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.layout import BINARIES, NATIVE, SCRATCH

HEX_MARK, DIGIT_MARK, LEADING_DIGIT_MARK = "\x01", "\x02", "\x03"
"""Bytes the load generator replaces before each request; see loadgen.c."""
UNIQUE_CHARS = 16
LOWEST_ID, HIGHEST_ID = 1000, 3999
"""Four-digit token ids: every prompt of n ids is the same number of bytes on the wire."""


def compile_tools() -> None:
    """cc -O2 of each tool whose source is newer than its program."""
    BINARIES.mkdir(parents=True, exist_ok=True)
    for source in sorted(NATIVE.glob("*.c")):
        program = BINARIES / source.stem
        if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
            subprocess.run(["cc", "-O2", "-Wall", "-o", str(program), str(source)], check=True)


def ids_prompt(num_ids: int, *, all_unique: bool = False, highest: int = HIGHEST_ID) -> str:
    """A JSON list of token ids. Four ids in the middle (or all of them) differ in each request."""
    rng = random.Random(num_ids)
    ids = [str(rng.randint(LOWEST_ID, min(highest, 9999))) for _ in range(num_ids)]
    mark = f"{LEADING_DIGIT_MARK}{DIGIT_MARK * 3}"
    if all_unique:
        # A leading 1 keeps the ids inside a vocabulary of 2,000.
        ids = [f"1{DIGIT_MARK * 3}"] * num_ids
    else:
        middle = num_ids // 2 - UNIQUE_CHARS // 8
        ids[middle : middle + UNIQUE_CHARS // 4] = [mark] * (UNIQUE_CHARS // 4)
    return f"[{','.join(ids)}]"


def text_prompt(num_chars: int) -> str:
    """Random words as a JSON string, 16 characters in the middle different in each request."""
    rng = random.Random(num_chars)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 8))) for _ in range(num_chars // 3 + 1)]
    text = " ".join(words)[:num_chars]
    middle = num_chars // 2 - UNIQUE_CHARS // 2
    return f'"{text[:middle]}{HEX_MARK * UNIQUE_CHARS}{text[middle + UNIQUE_CHARS :]}"'


def completion_body(
    prompt_json: str, *, model: str, max_tokens: int, stream: bool, extra: dict[str, Any] | None = None
) -> bytes:
    """The body of POST /v1/completions; `prompt_json` comes ready, because it holds the marks."""
    rest = {"max_tokens": max_tokens, "stream": stream, "temperature": 0} | (extra or {})
    return f'{{"model":{json.dumps(model)},"prompt":{prompt_json},{json.dumps(rest)[1:]}'.encode()


@dataclass(frozen=True, slots=True)
class LoadResult:
    wall_s: float
    num_requests: int
    num_errors: int
    num_events: int
    num_stalls: int
    """Requests with more than a second of silence before or between events."""
    requests_per_s: float
    first_ms: dict[str, float]
    total_ms: dict[str, float]
    gap_ms: dict[str, float]
    tpot_ms: dict[str, float]
    message: str


class LoadFailed(Exception):
    """The generator could not run, or too many requests failed for the run to mean anything."""


def run_load(
    port: int,
    body: bytes,
    *,
    concurrency: int | None = None,
    rate_per_s: float | None = None,
    num_requests: int | None = None,
    duration_s: float | None = None,
    seed: int = 1,
    records: Path | None = None,
    path: str = "/v1/completions",
    may_fail: bool = False,
) -> LoadResult:
    """Blocks until every request it sent has ended. Raises LoadFailed on any error unless `may_fail`."""
    SCRATCH.mkdir(parents=True, exist_ok=True)
    body_file = SCRATCH / "body.json"
    body_file.write_bytes(body)
    flags: dict[str, object | None] = {
        "--port": port, "--path": path, "--body": body_file, "--concurrency": concurrency,
        "--rate": rate_per_s, "--requests": num_requests, "--duration": duration_s,
        "--seed": seed, "--records": records,
    }  # fmt: skip
    argv = [str(BINARIES / "loadgen")]
    for flag, value in flags.items():
        if value is not None:
            argv += [flag, str(value)]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise LoadFailed(f"loadgen ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    found = json.loads(done.stdout)
    known = {name: found[name] for name in LoadResult.__slots__ if name in found}
    result = LoadResult(**known, message=done.stderr.strip())
    if not may_fail and (result.num_errors or not result.num_requests):
        num_ended = result.num_errors + result.num_requests
        raise LoadFailed(f"{result.num_errors} of {num_ended} requests failed: {result.message}")
    return result
