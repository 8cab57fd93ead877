"""Traces in files: which format a file has, and our own format written.

| format | recognised by |
| --- | --- |
| `mooncake` | JSON lines with `timestamp` (ms), `input_length`, `output_length`, `hash_ids` |
| `conversations` | the same and `conversation`, `turn`, `think_time` |
| `bailian` | JSON lines with `chat_id`, `parent_chat_id`, `timestamp` (s), `hash_ids` of 16 tokens |
| `plain` JSON lines | `num_prompt_tokens`, `num_output_tokens`, see `write_trace` |
| Azure CSV | `TIMESTAMP,ContextTokens,GeneratedTokens` |
| lengths CSV | `input_length,output_length`, with or without `timestamp_ms` |
| plain CSV | `arrival_s,num_prompt_tokens,num_output_tokens` and maybe session columns |

Any of them may be compressed with gzip. A line that cannot be used stops the reading with the file, the
line and what was expected: a replay of half a file would look like a result.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TextIO, cast

from baton.workload import csv_rows, json_lines
from baton.workload.trace import NO_SESSION, Trace, WorkloadError


def read_trace(path: str | Path, *, block_size_tokens: int | None = None) -> Trace:
    """The trace in one file. `block_size_tokens` overrides what the format implies (512 for Mooncake,
    64 for conversations, 16 for Bailian, the first line of a plain file).

    Raises WorkloadError with file, line and expectation."""
    path = Path(path)
    if block_size_tokens is not None and block_size_tokens < 1:
        raise WorkloadError(f"block_size_tokens is {block_size_tokens}, expected at least 1")
    name = path.name.removesuffix(".gz").rpartition(".")[0] or path.name
    with _opened(path) as file:
        first = next((line for line in file if line.strip()), "")
        if not first:
            raise WorkloadError(f"{path} is empty")
        file.seek(0)
        if first.lstrip().startswith("{"):
            return json_lines.read(file, str(path), name, block_size_tokens)
        return csv_rows.read(file, str(path), name)


def read_output_classes(path: str | Path) -> csv_rows.OutputClasses:
    """Real output lengths beside a length predictor's classes (`output_length,predicted_class_*`)."""
    with _opened(Path(path)) as file:
        return csv_rows.read_output_classes(file, str(path))


def write_trace(trace: Trace, path: str | Path) -> None:
    """Plain JSON lines, gzipped if the name ends in .gz: what `read_trace` reads back unchanged.
    The first line names the block size, then one object per request."""
    with _text(Path(path), "wt", is_gzip=str(path).endswith(".gz")) as file:
        file.write(json.dumps({"block_size_tokens": trace.block_size_tokens}) + "\n")
        for request in trace:
            line: dict[str, object] = {
                "arrival_s": request.arrival_s,
                "num_prompt_tokens": request.num_prompt_tokens,
                "num_output_tokens": request.num_output_tokens,
            }
            if trace.block_size_tokens:
                line["block_hashes"] = request.block_hashes.tolist()
            if request.session_id != NO_SESSION:
                line |= {"session_id": request.session_id, "turn": request.turn, "think_s": request.think_s}
            file.write(json.dumps(line, separators=(",", ":")) + "\n")


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        with path.open("rb") as raw:
            is_gzip = raw.read(2) == b"\x1f\x8b"
        with _text(path, "rt", is_gzip=is_gzip) as file:
            yield file
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise WorkloadError(f"{path} cannot be read: {error}") from error


def _text(path: Path, mode: Literal["rt", "wt"], *, is_gzip: bool) -> TextIO:
    if is_gzip:
        return cast(TextIO, gzip.open(path, mode, encoding="utf-8", newline=""))
    return path.open(mode, encoding="utf-8", newline="")
