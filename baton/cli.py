"""The `baton` command: picks a role and hands it the rest of the command line.

The only module above the roles. A role is imported when it is asked for, so `baton submit` starts
without torch and one role's missing package cannot break another's `--help`.

Exit codes: 0 clean, 1 runtime failure, 2 usage or settings, 3 doctor found a problem or plan no placement,
130 Ctrl-C.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import cast

DISTRIBUTION = "baton-serving"
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Command:
    module: str
    """Has `main(argv: list[str]) -> int`."""
    summary: str


COMMANDS = {
    "serve": Command(
        "baton.launch.serve", "coordinator + workers on this machine, checked and ready to call"
    ),
    "coordinator": Command("coordinator.__main__", "the control plane: HTTP and ZeroMQ doors"),
    "prefill": Command("prefill_worker.__main__", "one prefill worker"),
    "decode": Command("decode_worker.__main__", "one decode worker"),
    "both": Command("baton.worker.both", "one worker for both phases: small fleets, colocated serving"),
    "replay": Command("baton.replay.command", "request traces through a simulated fleet, in virtual time"),
    "plan": Command("placement.__main__", "which workers of which parallelism: the offline planner, no GPU"),
    "submit": Command("baton.submit", "send a prompt to a coordinator and print the tokens as they come"),
    "explain": Command("baton.explain", "why a request went where it went, from the decision log"),
    "story": Command(
        "baton.history.story_command", "all that happened to one request, from all processes' logs"
    ),
    "history": Command("baton.history.history_command", "check a recorded run against the promise"),
    "profile": Command(
        "baton.profiling.command", "measure how long an engine's steps take here, for planning"
    ),
    "doctor": Command("baton.doctor", "find what is wrong with this installation"),
}


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments:
        print(usage(), file=sys.stderr)
        return EXIT_USAGE
    name, *rest = arguments
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name in ("-V", "--version"):
        print(f"baton {version()}")
        return 0
    command = COMMANDS.get(name)
    if command is None:
        print(f"baton: no command {name!r}; commands: {', '.join(COMMANDS)}", file=sys.stderr)
        return EXIT_USAGE
    try:
        entry = cast(Callable[[list[str]], int], importlib.import_module(command.module).main)
    except ModuleNotFoundError as error:
        print(
            f"baton {name}: the package {error.name!r} is not installed; scripts/serve.sh and "
            f"scripts/test.sh install everything into .venv",
            file=sys.stderr,
        )
        return EXIT_FAILED
    try:
        return entry(rest)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def version() -> str:
    """The installed distribution's, or a plain word when run from a bare checkout."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def usage() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: baton COMMAND [OPTIONS]\n\n"
        f"commands:\n{commands}\n\n"
        "`baton COMMAND --help` lists the options; `baton --version` prints the version."
    )


if __name__ == "__main__":
    sys.exit(main())
