"""Run a command: jaxgpt COMMAND [--FLAG=VALUE ...]

The same as `python -m jaxgpt.COMMAND [--FLAG=VALUE ...]`.
"""

import ast
import runpy
import sys
from pathlib import Path

from jaxgpt.cli.run import run
from jaxgpt.system.errors import BadInput, did_you_mean


def commands() -> dict[str, str]:
    """Returns what each command does, from the first line of its help."""
    lines = {}
    for file in sorted(Path(__file__).parent.glob("[!_]*.py")):
        doc = ast.get_docstring(ast.parse(file.read_bytes()))
        lines[file.stem] = doc.partition(":")[0]
    return lines


def main(argv: list[str]) -> None:
    known, name = commands(), argv[1] if len(argv) > 1 else "--help"
    if name in ("-h", "-help", "--help"):
        print("\n".join(f"jaxgpt {command:<12}{line}" for command, line in known.items()))
        print("\nEach says more: jaxgpt COMMAND --help")
        return
    if name.startswith("-"):
        raise BadInput(f"say which command, then its flags: {', '.join(known)}")
    if name not in known:
        near = did_you_mean(name, known) or f"; choose {', '.join(known)}"
        raise BadInput(f"unknown command {name}{near}")
    del sys.argv[1]
    runpy.run_module(f"jaxgpt.{name}", run_name="__main__", alter_sys=True)


def start() -> None:
    """Runs what the command line says and ends the process: the console script `jaxgpt`."""
    run(main)


if __name__ == "__main__":
    start()
