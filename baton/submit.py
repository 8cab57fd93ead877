"""`baton submit`: send one prompt to a running fleet over ZeroMQ and print the answer as it comes."""

from __future__ import annotations

import argparse
import json
import socket
import sys

import msgspec

from baton.client import BatonClient
from baton.contract.errors import ServingError
from baton.wire.endpoints import DEFAULT_CLIENT_ADDRESS, DEFAULT_CLIENT_PORT, parse_address

EXIT_FAILED = 1
EXIT_USAGE = 2
CONNECT_TIMEOUT_S = 10.0


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    prompt = arguments.prompt if arguments.prompt is not None else sys.stdin.read()
    if not prompt:
        print("baton submit: the prompt is empty", file=sys.stderr)
        return EXIT_USAGE
    options = {
        name: value
        for name in ("max_tokens", "temperature", "top_p", "seed", "stop", "ignore_eos")
        if (value := getattr(arguments, name)) is not None
    }
    try:
        _knock(arguments.address)
        with BatonClient(arguments.address, timeout_s=arguments.timeout_s) as client:
            return _run(client, prompt, options, arguments)
    except ValueError as error:
        print(f"baton submit: {error}", file=sys.stderr)
        return EXIT_USAGE
    except OSError as error:
        print(
            f"baton submit: no coordinator at {arguments.address}: {error.strerror or error}", file=sys.stderr
        )
        return EXIT_FAILED
    except ServingError as error:
        print(f"baton submit: {error.code}: {error.message}", file=sys.stderr)
        return EXIT_FAILED


def _knock(address: str) -> None:
    """Raises OSError when nobody listens there: ZeroMQ would wait for somebody, without a word."""
    host, port = parse_address(address, DEFAULT_CLIENT_PORT)
    socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()


def _run(client: BatonClient, prompt: str, options: dict[str, object], arguments: argparse.Namespace) -> int:
    request = [{"role": "user", "content": prompt}] if arguments.chat else prompt
    if arguments.json:
        done = client.generate(request, model=arguments.model, **options)
        report = msgspec.to_builtins(done.report)
        print(json.dumps({"text": done.text, "token_ids": done.token_ids, "report": report}))
        return 0
    for delta in client.stream(request, model=arguments.model, **options):
        print(delta.text, end="", flush=True)
    print()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="baton submit", description=__doc__)
    parser.add_argument("prompt", nargs="?", help="the text; absent: standard input")
    parser.add_argument("--address", default=DEFAULT_CLIENT_ADDRESS, help="host:port of the ZeroMQ door")
    parser.add_argument("--model", help="served model name; absent: the fleet's model")
    parser.add_argument("--chat", action="store_true", help="send as a chat turn, with the chat template")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", help="stop string; repeat for several")
    parser.add_argument("--ignore-eos", action="store_true", default=None)
    parser.add_argument("--timeout-s", type=float, default=300.0, help="longest silence, seconds")
    parser.add_argument("--json", action="store_true", help="print text, token ids and the report as JSON")
    return parser


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
