"""`baton history check RUN`: does a recorded run keep the promise?

    baton history check RUN       every rule over every request; 0 clean, 1 a violation, 2 nothing to check

RUN is a folder with the clients' records and the logs of the fleet (docs/reliability.md tells how to make
one). The first violations are printed with the whole story of their request.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from baton.history.checker import RULES, check, counts
from baton.history.reader import BrokenRun, read_run
from baton.history.story import story

EXIT_OK, EXIT_VIOLATION, EXIT_USAGE = 0, 1, 2
MAX_SHOWN, MAX_STORIES = 20, 3


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="baton history", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser("check", help="every rule over every request")
    checking.add_argument("run", type=Path, metavar="RUN", help="the folder")
    arguments = parser.parse_args(argv)
    try:
        return _check(arguments.run)
    except BrokenPipeError:
        return EXIT_OK
    except (BrokenRun, OSError) as error:
        print(f"baton history: {error}", file=sys.stderr)
        return EXIT_USAGE


def _check(folder: Path) -> int:
    history = read_run(folder)
    violations = check(history)
    found = counts(violations)
    print(
        f"{len(history.asks)} requests, {len(history.coordinators)} coordinators, "
        f"{len(history.workers)} workers, {len(history.kills)} kills"
    )
    for name in RULES:
        print(f"{'ok' if not found[name] else 'BROKEN':<7} {name}" + (f": {found[name]}" * bool(found[name])))
    for violation in violations[:MAX_SHOWN]:
        print(violation)
    told = dict.fromkeys(v.request_id for v in violations if v.request_id is not None)
    for request_id in list(told)[:MAX_STORIES]:
        print(f"\n{story(folder, request_id)}")
    return EXIT_VIOLATION if violations else EXIT_OK


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
