"""`baton explain`: why a request went where it went, from the coordinator's decision log.

    baton explain REQUEST_ID      all terms of all workers, for each attempt
    baton explain --last          the same, of the request that ended last
    baton explain --replay FILE   decide everything in FILE again; exits with 1 on any difference

The coordinator writes the log when it is started with `--decision-log FILE`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from baton.policy.explain import decide_again, story

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2

DEFAULT_LOG = ".run/decisions.jsonl"
MAX_SHOWN = 20
"""Differences printed in full."""


class BrokenLog(Exception):
    """A sentence."""


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    asked = [arguments.request_id is not None, arguments.last, arguments.replay is not None]
    if sum(asked) != 1:
        print("baton explain: give one of REQUEST_ID, --last and --replay FILE", file=sys.stderr)
        return EXIT_USAGE
    try:
        if arguments.replay is not None:
            return _replay(Path(arguments.replay))
        return _show(Path(arguments.log), arguments.request_id)
    except BrokenPipeError:
        return EXIT_OK
    except (BrokenLog, OSError) as error:
        reason = error.strerror or error if isinstance(error, OSError) else error
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        print(f"baton explain: {where}{reason}", file=sys.stderr)
        return EXIT_FAILED


def read_log(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, line). Raises BrokenLog or OSError."""
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            try:
                line = json.loads(text)
                if not isinstance(line["decisions"], list) or not isinstance(line["request_id"], str):
                    raise TypeError
            except (ValueError, TypeError, KeyError) as error:
                raise BrokenLog(f"{path}:{number} is no line of a decision log") from error
            yield number, line


# ── one request ───────────────────────────────────────────────────────────────────────────────


def _show(path: Path, request_id: str | None) -> int:
    found = None
    for _, line in read_log(path):
        if request_id is None or _is_of(line["request_id"], request_id):
            found = line
    if found is None:
        what = "no request yet" if request_id is None else f"no request {request_id}"
        raise BrokenLog(f"{path} holds {what}")
    try:
        print(describe(found))
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise BrokenLog(f"the record of {found['request_id']} is incomplete: {error!r}") from error
    return EXIT_OK


def _is_of(logged: str, asked: str) -> bool:
    """The doors make ids unique: `zmq7-` before a ZeroMQ client's, `-1` or `~ab` after HTTP's."""
    rest = logged.partition("-")[2] if logged.startswith("zmq") else logged
    return logged == asked or rest == asked or (
        logged.startswith(asked) and logged[len(asked)] in "-~"
    )  # fmt: skip


def describe(line: dict[str, Any]) -> str:
    """A whole line of the log for people."""
    report = line["report"]
    placement, phases = report.get("placement", {}), report["phases"]
    parts = [f"request {line['request_id']}: {report['outcome']}"]
    for number, decision in enumerate(line["decisions"], 1):
        if len(line["decisions"]) > 1:
            parts.append(f"── attempt {number} ──")
        parts.append(story(decision))
    total_s = sum(phases.values())
    predicted = placement.get("predicted_hit_tokens")
    found = placement.get("hit_tokens")
    parts.append(
        f"{report.get('num_prompt_tokens', 0)} prompt tokens, of these cached: "
        f"{'not predicted' if predicted is None else f'{predicted} predicted'}, "
        f"{'not reported' if found is None else f'{found} found'}; "
        f"{report.get('num_output_tokens', 0)} output tokens; "
        f"{report.get('kv_bytes', 0)} bytes of KV handed over\n"
        f"{total_s:.4f} s = "
        + " + ".join(f"{name.removesuffix('_s')} {seconds:.4f}" for name, seconds in phases.items())
    )
    return "\n\n".join(parts)


# ── all of them ───────────────────────────────────────────────────────────────────────────────


def _replay(path: Path) -> int:
    num_requests = num_decisions = num_different = 0
    for number, line in read_log(path):
        num_requests += 1
        for decision in line["decisions"]:
            num_decisions += 1
            found = decide_again(decision)
            num_different += bool(found)
            if found and num_different <= MAX_SHOWN:
                for difference in found:
                    print(f"{path}:{number} {line['request_id']}: {difference}", file=sys.stderr)
    print(
        f"{num_decisions} decisions of {num_requests} requests decided again, "
        f"{num_different} of them differently"
    )
    return EXIT_FAILED if num_different or not num_decisions else EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="baton explain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("request_id", nargs="?", help="as in the x-request-id header")
    parser.add_argument("--last", action="store_true", help="the request that ended last")
    parser.add_argument("--log", default=DEFAULT_LOG, help=f"the decision log; absent: {DEFAULT_LOG}")
    parser.add_argument("--replay", metavar="FILE", help="decide everything in FILE again")
    return parser


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
