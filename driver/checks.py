"""Checks all commands of a plan before the first one runs, by the rules of their own scripts.

Standard input is a JSON list of commands. Each script's parser reads its command; then its
`check_args(args)`, if there is one, looks at the values.
"""

import argparse
import json
import runpy
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformer.file_utils import UserError
from transformer.runtime import check_numbers, given_flags


@cache
def load(script: str) -> dict[str, Any]:
    """Return what a script defines."""
    return runpy.run_path(script, run_name="checked")


def parse(command: list[str]) -> argparse.Namespace:
    """Return a command's arguments; a `UserError` says what its script would refuse."""
    def refuse(message: str) -> None:  # in place of usage and exit
        raise UserError(message)

    parser = load(command[1])["get_args_parser"]()
    parser.error = refuse
    args = parser.parse_args(command[2:])
    args.given = given_flags(parser, command[2:])
    return args


def problems(commands: list[list[str]]) -> Iterator[str]:
    """Yield a line for each command that its script would refuse."""
    for command in (c for c in commands if c[0] == "python" and c[1].endswith(".py")):
        try:
            args = parse(command)
            check_numbers(args)
            load(command[1]).get("check_args", lambda _: None)(args)
        except UserError as error:
            yield f"{command[1]}: {error}"


if __name__ == "__main__":
    sys.exit("\n".join(dict.fromkeys(problems(json.load(sys.stdin)))) or 0)
