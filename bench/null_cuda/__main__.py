"""Runs a command with null CUDA: see the package."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from bench.null_cuda.build import CannotBuildError
from bench.null_cuda.environment import environment


def main() -> None:
    """Entry point; the command takes this process's place."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--values", action="store_true", help="compute on the CPU, do not only count"
    )
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if not options.command:
        parser.error("expected a command")
    if options.devices < 1:
        parser.error(f"--devices: expected 1 or more, got {options.devices}")
    try:
        variables = environment(values=options.values, devices=options.devices)
    except CannotBuildError as error:
        raise SystemExit(f"null CUDA: {error}") from error
    variables["PATH"] = f"{Path(sys.executable).parent}:{variables.get('PATH', '')}"
    try:
        os.execvpe(options.command[0], options.command, variables)
    except OSError as error:
        raise SystemExit(f"null CUDA: {options.command[0]}: {error.strerror}") from error


if __name__ == "__main__":
    main()
